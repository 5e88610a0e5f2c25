// A grid of variations as a PNG file: title, what is the same everywhere, the labels, and each job's first picture.
import { picturePath } from "./api.js";
import { standing } from "./words.js";

const LEAST = 160; // px of a cell: small pictures are enlarged by a whole factor
const MOST = 512; // large ones are reduced
const LONGEST = 16000; // px of the file's side, which browsers can draw
const MARGIN = 16;
const GAP = 8;
const LINE = 22;
const FONT = "14px system-ui, sans-serif";

// Resolves to a Blob. `grid`: title, subtitle, labels of columns and rows, jobs, and job(column, row).
export async function draw(grid) {
  const images = new Map(await Promise.all(grid.jobs.filter((job) => job.images.length).map(async (job) => [job.id, await loaded(job)])));
  const longer = Math.max(1, ...[...images.values()].map((image) => Math.max(image.naturalWidth, image.naturalHeight)));
  const canvas = document.createElement("canvas");
  const pen = canvas.getContext("2d");
  pen.font = FONT;
  const at = layout(grid, longer, Math.max(...grid.rows.map((label) => pen.measureText(label).width)));
  canvas.width = at.width;
  canvas.height = at.height;
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, at.width, at.height);
  pen.imageSmoothingEnabled = longer > LEAST; // pixels that are enlarged stay what they are
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "#1a1a1a";
  labels(pen, grid, at);
  for (let row = 0; row < grid.rows.length; row++)
    for (let column = 0; column < grid.columns.length; column++) cell(pen, grid.job(column, row), images, at.x(column), at.y(row), at.side);
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the browser draws no PNG")))));
}

async function loaded(job) {
  const image = new Image();
  image.src = picturePath(job.id, 0);
  await image.decode();
  return image;
}

function layout(grid, longer, labelWidth) {
  const [columns, rows] = [grid.columns.length, grid.rows.length];
  const wanted = longer < LEAST ? longer * Math.ceil(LEAST / longer) : Math.min(longer, MOST);
  const side = Math.min(wanted, Math.floor((LONGEST - 400) / Math.max(columns, rows)) - GAP);
  const left = MARGIN + (rows > 1 ? Math.min(260, Math.ceil(labelWidth)) + GAP : 0);
  const top = MARGIN + 3 * LINE + GAP;
  const [x, y] = [(column) => left + column * (side + GAP), (row) => top + row * (side + GAP)];
  return { side, left, top, x, y, width: x(columns) - GAP + MARGIN, height: y(rows) - GAP + MARGIN };
}

function labels(pen, grid, at) {
  const write = (text, x, y, align, width) => {
    pen.textAlign = align;
    pen.fillText(text, x, y, width);
  };
  pen.font = "600 16px system-ui, sans-serif";
  write(grid.title.slice(0, 300), MARGIN, MARGIN + LINE / 2, "left", at.width - 2 * MARGIN);
  pen.font = FONT;
  write(grid.subtitle, MARGIN, MARGIN + 1.5 * LINE, "left", at.width - 2 * MARGIN);
  grid.columns.forEach((label, column) => write(label, at.x(column) + at.side / 2, at.top - GAP, "center", at.side));
  grid.rows.forEach((label, row) => label && write(label, at.left - GAP, at.y(row) + at.side / 2, "right", at.left - MARGIN - GAP));
}

function cell(pen, job, images, x, y, side) {
  const image = job && images.get(job.id);
  if (!image) {
    pen.textAlign = "center";
    pen.fillText(job ? standing(job) : "Deleted", x + side / 2, y + side / 2, side);
    return;
  }
  const scale = side / Math.max(image.naturalWidth, image.naturalHeight);
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  pen.drawImage(image, x + (side - width) / 2, y + (side - height) / 2, width, height);
}
