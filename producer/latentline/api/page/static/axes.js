// The axes of a grid of variations: what may differ between its pictures, while all else stays as the form says.

const MOST_JOBS = 64; // of one grid, as for `latentline grid`

const number = (name) => (text) => {
  const value = Number(text);
  if (!Number.isFinite(value)) throw new BadValues(`${AXES[name].label}: ${text} is no number.`);
  return { [name]: value };
};

// What an axis is called, the values that it begins with, and how one value becomes settings.
export const AXES = {
  num_inference_steps: { label: "Steps", first: () => "8, 16, 32", read: number("num_inference_steps") },
  guidance_scale: { label: "Guidance", first: () => "2, 5, 8", read: number("guidance_scale") },
  scheduler: { label: "Sampler", first: (model) => (model?.schedulers ?? []).slice(0, 4).join(", "), read: (text) => ({ scheduler: text }) },
  loras: { label: "Adapter", first: (model) => ["none", ...(model?.loras ?? []).slice(0, 3)].join(", "), read: adapter },
  seed: { label: "Seed", first: () => "1, 2, 3, 4", read: number("seed") },
};

export class BadValues extends Error {
  constructor(message, field = "values") {
    super(message);
    this.field = field;
  }
}

// NAME or NAME:STRENGTH, as on the command line; "none" for no adapter.
function adapter(text) {
  if (text === "none") return { loras: {} };
  const [name, strength = "1"] = text.split(":");
  if (!Number.isFinite(Number(strength))) throw new BadValues(`Adapter: ${text} is neither NAME nor NAME:STRENGTH.`);
  return { loras: { [name]: Number(strength) } };
}

function valuesOf(name, text, field) {
  const labels = text.split(",").map((value) => value.trim()).filter(Boolean);
  if (!labels.length) throw new BadValues("Write the values of the variation, with commas between them.", field);
  if (new Set(labels).size < labels.length) throw new BadValues("One of the values stands twice.", field);
  return labels;
}

// The settings of each picture, row by row, with its place; one alone where nothing varies.
export function cells(settings) {
  if (!settings.axis) return [{ settings }];
  const columns = valuesOf(settings.axis, settings.values, "values");
  const rows = settings.second ? valuesOf(settings.second, settings.second_values, "second_values") : [null];
  if (columns.length * rows.length > MOST_JOBS)
    throw new BadValues(`A grid has at most ${MOST_JOBS} pictures; this one would have ${columns.length * rows.length}.`);
  const seeds = String(settings.seed).trim() === "" ? { seed: String(Math.floor(Math.random() * 2 ** 31)) } : {};
  const grid = { grid: newId(), grid_x: `${settings.axis}=${columns.join(",")}` };
  if (settings.second) grid.grid_y = `${settings.second}=${rows.join(",")}`;
  return rows.flatMap((y, row) => columns.map((x, column) => ({
    settings: { ...settings, ...seeds, ...AXES[settings.axis].read(x), ...(y === null ? {} : AXES[settings.second].read(y)) },
    metadata: { ...grid, grid_column: column, grid_row: row },
  })));
}

// It begins with a letter, so that it is text wherever it is read as JSON.
const newId = () => "g" + Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");

// An axis as a job's metadata tells it: what varies, and the values in order.
export function axisOf(text) {
  const [name, values] = [text.slice(0, text.indexOf("=")), text.slice(text.indexOf("=") + 1)];
  return { name, label: AXES[name]?.label ?? name, values: values.split(",") };
}
