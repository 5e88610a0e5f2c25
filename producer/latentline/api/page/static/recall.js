// Reads the parameters that latentline writes into its pictures: PNG text, or the EXIF image description of WebP and JPEG.

const MOST_BYTES = 32 * 1024 * 1024;
const IMAGE_DESCRIPTION = 0x010e;

export class NotOurs extends Error {}

export async function recall(file) {
  if (file.size > MOST_BYTES) throw new NotOurs(`${file.name} has ${Math.round(file.size / 1048576)} MB; allowed: 32 MB.`);
  const bytes = new DataView(await file.arrayBuffer());
  let text = null;
  try {
    if (ascii(bytes, 1, 3) === "PNG") text = fromPng(bytes);
    else if (ascii(bytes, 0, 4) === "RIFF" && ascii(bytes, 8, 4) === "WEBP") text = fromWebp(bytes);
    else if (bytes.getUint16(0) === 0xffd8) text = fromJpeg(bytes);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // a file that ends early
  }
  let facts = null;
  try {
    facts = text && JSON.parse(text);
  } catch {
    // another program's text
  }
  if (!facts || typeof facts !== "object" || typeof facts.prompt !== "string" || typeof facts.model !== "string")
    throw new NotOurs(`${file.name} holds no parameters of latentline. Programs that edit pictures often drop them.`);
  return facts.request && typeof facts.request === "object" ? { ...facts, ...facts.request } : facts;
}

function ascii(view, at, length) {
  let text = "";
  for (let i = 0; i < length; i++) text += String.fromCharCode(view.getUint8(at + i));
  return text;
}

const utf8 = (view, at, length) => new TextDecoder().decode(new Uint8Array(view.buffer, at, length));

function fromPng(view) {
  for (let at = 8; at + 12 <= view.byteLength; ) {
    const length = view.getUint32(at);
    const kind = ascii(view, at + 4, 4);
    if (kind === "tEXt" || kind === "iTXt") {
      const text = utf8(view, at + 8, length);
      const [keyword] = text.split("\0", 1);
      if (keyword === "latentline") {
        // iTXt has two flags and two more texts in front of its value.
        return kind === "tEXt" ? text.slice(keyword.length + 1) : text.slice(keyword.length + 3).split("\0").slice(2).join("\0");
      }
    }
    if (kind === "IEND") return null;
    at += length + 12;
  }
  return null;
}

function fromWebp(view) {
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const length = view.getUint32(at + 4, true);
    if (ascii(view, at, 4) === "EXIF") return fromExif(view, ascii(view, at + 8, 4) === "Exif" ? at + 14 : at + 8);
    at += 8 + length + (length % 2);
  }
  return null;
}

function fromJpeg(view) {
  for (let at = 2; at + 4 <= view.byteLength && view.getUint8(at) === 0xff; ) {
    const marker = view.getUint8(at + 1);
    const length = view.getUint16(at + 2);
    if (marker === 0xe1 && ascii(view, at + 4, 4) === "Exif") return fromExif(view, at + 10);
    if (marker === 0xda) return null; // the picture itself
    at += 2 + length;
  }
  return null;
}

function fromExif(view, start) {
  const little = ascii(view, start, 2) === "II";
  const directory = start + view.getUint32(start + 4, little);
  const entries = view.getUint16(directory, little);
  for (let i = 0; i < entries; i++) {
    const entry = directory + 2 + i * 12;
    if (view.getUint16(entry, little) !== IMAGE_DESCRIPTION) continue;
    const length = view.getUint32(entry + 4, little);
    const at = length <= 4 ? entry + 8 : start + view.getUint32(entry + 8, little);
    return utf8(view, at, length).replace(/\0+$/, "");
  }
  return null;
}
