// The submission form: everything that the chosen model offers, presets, and grids of variations.
import { html, useEffect, useMemo, useRef, useState } from "./vendor/preact-htm.js";
import { post } from "./api.js";
import { cells } from "./axes.js";
import { store } from "./store.js";
import { follow } from "./stream.js";
import * as kept from "./presets.js";
import { submitGrid, Variations } from "./variations.js";

const PREVIEWS = 8; // pictures of one job while it sharpens

export const FIELDS = {
  prompt: "Prompt", negative_prompt: "Leave out", model: "Model", width: "Width", height: "Height", scheduler: "Sampler",
  num_inference_steps: "Steps", guidance_scale: "Guidance", seed: "Seed", num_images: "Pictures", loras: "Adapters",
};

export function defaults(model) {
  return {
    model: model?.id ?? "", prompt: "", negative_prompt: "", width: model?.default_width ?? 0, height: model?.default_height ?? 0,
    num_inference_steps: model?.default_num_inference_steps ?? 20, guidance_scale: model?.default_guidance_scale ?? 5,
    scheduler: model?.default_scheduler ?? "", seed: "", num_images: 1, loras: {}, format: "png",
    axis: "", values: "", second: "", second_values: "",
  };
}

// Settings from a job's request, or from the parameters of a dropped picture.
export function fromRequest(request, models) {
  const model = models.find((one) => one.id === request.model);
  const loras = Object.fromEntries((request.loras ?? []).map((lora) => [lora.name, lora.scale ?? 1]));
  const given = Object.fromEntries(Object.entries(request).filter(([name, value]) => name in FIELDS && value !== null && name !== "loras"));
  return { ...defaults(model), ...given, seed: String(request.seed ?? ""), loras };
}

function toRequest(settings, model) {
  const steps = Number(settings.num_inference_steps);
  const request = {
    model: settings.model, prompt: settings.prompt, width: Number(settings.width), height: Number(settings.height),
    num_inference_steps: steps, guidance_scale: Number(settings.guidance_scale), scheduler: settings.scheduler,
    num_images: Number(settings.num_images), preview_every: Math.max(1, Math.ceil(steps / PREVIEWS)),
  };
  if (settings.negative_prompt.trim() && model?.negative_prompts) request.negative_prompt = settings.negative_prompt;
  if (String(settings.seed).trim() !== "") request.seed = Number(settings.seed);
  if (settings.format !== "png") request.output = { format: settings.format };
  const loras = Object.entries(settings.loras).filter(([name]) => model?.loras.includes(name));
  if (loras.length) request.loras = loras.map(([name, scale]) => ({ name, scale: Number(scale) }));
  return request;
}

export function Form({ models, settings, change, say }) {
  const [unfolded] = useState(wide);
  const model = models.find((one) => one.id === settings.model);
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);
  const set = (fields) => change({ ...settings, ...fields });

  async function submit(event) {
    event?.preventDefault();
    if (busy) return;
    setProblem(null);
    setBusy(true);
    try {
      const made = cells(settings);
      if (settings.axis) await submitGrid(made.map((cell) => ({ ...toRequest(cell.settings, model), metadata: cell.metadata })));
      else store.add(await post("v1/jobs", toRequest(settings, model)));
      say(settings.axis ? `${made.length} jobs submitted.` : "Submitted.");
    } catch (error) {
      setProblem(error);
    } finally {
      setBusy(false);
      follow();
    }
  }

  const wrong = (name) => problem?.field?.split(".")[0] === name;
  return html`<form class="form" aria-label="New picture" onSubmit=${submit}>
    <${Prompt} value=${settings.prompt} wrong=${wrong("prompt")} onInput=${(prompt) => set({ prompt })} submit=${submit} />
    <details class="settings" open=${unfolded}><summary>Settings</summary>
    ${model?.negative_prompts && html`<${Text} name="negative_prompt" label="Leave out" wrong=${wrong("negative_prompt")} value=${settings.negative_prompt} set=${set} placeholder="what should not be in it" />`}
    ${models.length > 1 && html`<${Choice} name="model" label="Model" options=${models.map((one) => one.id)} value=${settings.model}
        set=${({ model: id }) => change({ ...settings, ...withModel(settings, models.find((one) => one.id === id)) })} />`}
    <div class="pair">
      <${Choice} name="scheduler" label="Sampler" options=${model?.schedulers ?? []} value=${settings.scheduler} wrong=${wrong("scheduler")} set=${set} />
      <${Size} model=${model} settings=${settings} set=${set} wrong=${wrong("width") || wrong("height")} />
    </div>
    <${Slider} name="num_inference_steps" label="Steps" min="1" max="60" step="1" most="150" value=${settings.num_inference_steps} wrong=${wrong("num_inference_steps")} set=${set} />
    <${Slider} name="guidance_scale" label="Guidance" min="1" max="15" step="0.5" most="30" value=${settings.guidance_scale} wrong=${wrong("guidance_scale")} set=${set} />
    <div class="pair">
      <label class="field ${wrong("seed") ? "wrong" : ""}"><span>Seed</span>
        <span class="joined"><input name="seed" inputmode="numeric" placeholder="random" value=${settings.seed} onInput=${(e) => set({ seed: e.target.value })} />
        <button type="button" title="Draw a seed and keep it" aria-label="Draw a seed and keep it" onClick=${() => set({ seed: String(Math.floor(Math.random() * 2 ** 31)) })}>⚄</button></span></label>
      <label class="field ${wrong("num_images") ? "wrong" : ""}"><span>Pictures</span>
        <input name="num_images" type="number" min="1" max="10" value=${settings.num_images} onInput=${(e) => set({ num_images: e.target.value })} /></label>
    </div>
    ${model?.loras.length > 0 && html`<${Loras} names=${model.loras} chosen=${settings.loras} wrong=${wrong("loras")} set=${set} />`}
    </details>
    <details class="more"><summary>Variations and presets</summary>
      <${Variations} settings=${settings} model=${model} set=${set} wrong=${wrong} />
      <${Choice} name="format" label="File" options=${["png", "webp", "jpeg"]} value=${settings.format} set=${set} />
      <${Presets} settings=${settings} change=${change} say=${say} />
    </details>
    ${!models.length && html`<p class="warning">No worker has announced a model yet. The form opens as soon as one does.</p>`}
    ${problem && html`<p class="problem" role="alert">${explain(problem)}</p>`}
    <button class="primary" type="submit" disabled=${busy || !model || !settings.prompt.trim()}>${busy ? "Submitting…" : settings.axis ? "Make the grid" : "Make it"}</button>
    <p class="hint">Ctrl + Enter submits. Drop a picture of latentline anywhere to take over its settings.</p>
  </form>`;
}

// On a narrow screen the settings are folded, so that the pictures come into view.
const wide = () => matchMedia("(min-width: 861px)").matches;

function explain(problem) {
  if (!problem.field || !problem.allowed) return problem.message;
  return `${FIELDS[problem.field.split(".")[0]] ?? problem.field}: allowed is ${problem.allowed}.`;
}

// What another model does not offer falls back to its defaults.
export function withModel(settings, model) {
  const own = defaults(model);
  for (const name of ["prompt", "negative_prompt", "seed", "num_images", "format", "axis", "values", "second", "second_values"]) own[name] = settings[name];
  return own;
}

function Prompt({ value, wrong, onInput, submit }) {
  const box = useRef(null);
  useEffect(() => {
    box.current.style.height = "auto";
    box.current.style.height = `${Math.min(box.current.scrollHeight + 2, 240)}px`;
  }, [value]);
  return html`<label class="field prompt ${wrong ? "wrong" : ""}"><span>Prompt</span>
    <textarea name="prompt" ref=${box} rows="3" placeholder="a red apple on a blue background" value=${value} onInput=${(e) => onInput(e.target.value)}
      onKeyDown=${(e) => e.key === "Enter" && (e.ctrlKey || e.metaKey) && submit(e)}></textarea></label>`;
}

const Text = ({ name, label, value, wrong, set, placeholder }) => html`<label class="field ${wrong ? "wrong" : ""}"><span>${label}</span>
  <input name=${name} value=${value} placeholder=${placeholder} onInput=${(e) => set({ [name]: e.target.value })} /></label>`;

const Choice = ({ name, label, options, value, wrong, set }) => html`<label class="field ${wrong ? "wrong" : ""}"><span>${label}</span>
  <select name=${name} value=${value} onChange=${(e) => set({ [name]: e.target.value })}>
  ${!options.includes(value) && html`<option value=${value}>${value || "–"}</option>`}
  ${options.map((one) => html`<option value=${one}>${one}</option>`)}</select></label>`;

const Slider = ({ name, label, min, max, step, most, value, wrong, set }) => html`<div class="field slider ${wrong ? "wrong" : ""}">
  <label for=${name}>${label}</label>
  <input type="range" aria-label=${`${label}, slider`} min=${min} max=${max} step=${step} value=${value} onInput=${(e) => set({ [name]: e.target.value })} />
  <input id=${name} name=${name} type="number" min="0" max=${most} step=${step} value=${value} onInput=${(e) => set({ [name]: e.target.value })} /></div>`;

function Size({ model, settings, set, wrong }) {
  const sizes = useMemo(() => (model ? sizesOf(model) : []), [model]);
  const value = `${settings.width}x${settings.height}`;
  return html`<label class="field ${wrong ? "wrong" : ""}"><span>Size</span>
    <select name="size" value=${value} onChange=${(e) => {
      const [width, height] = e.target.value.split("x").map(Number);
      set({ width, height });
    }}>${!sizes.includes(value) && html`<option value=${value}>${value.replace("x", " × ")}</option>`}
    ${sizes.map((one) => html`<option value=${one}>${one.replace("x", " × ")}</option>`)}</select></label>`;
}

// The default size, and wider and taller ones of about as many pixels, as the model's multiple and its limit allow.
function sizesOf(model) {
  const { default_width: width, default_height: height, size_multiple: multiple, max_pixels: most } = model;
  const found = new Set([`${width}x${height}`]);
  for (const ratio of [1, 4 / 3, 3 / 4, 16 / 9, 9 / 16]) {
    const sides = [Math.sqrt(width * height * ratio), Math.sqrt((width * height) / ratio)].map((side) => Math.max(64, Math.round(side / multiple) * multiple));
    if (sides[0] * sides[1] <= most) found.add(sides.join("x"));
  }
  return [...found];
}

const Loras = ({ names, chosen, wrong, set }) => html`<fieldset class="loras ${wrong ? "wrong" : ""}"><legend>Adapters</legend>
  ${names.map((name) => html`<div class="lora" key=${name}>
    <label><input type="checkbox" checked=${name in chosen} onChange=${(e) => {
      const { [name]: _, ...rest } = chosen;
      set({ loras: e.target.checked ? { ...rest, [name]: 1 } : rest });
    }} /> ${name}</label>
    ${name in chosen && html`<input type="number" aria-label=${`Strength of ${name}`} min="-10" max="10" step="0.1" value=${chosen[name]} onInput=${(e) => set({ loras: { ...chosen, [name]: e.target.value } })} />`}
  </div>`)}</fieldset>`;

function Presets({ settings, change, say }) {
  const [all, setAll] = useState(kept.presets());
  const [name, setName] = useState("");
  return html`<div class="presets">
    <span class="joined"><input aria-label="Name of the preset" placeholder="name of a preset" value=${name} onInput=${(e) => setName(e.target.value)} />
    <button type="button" disabled=${!name.trim()} onClick=${() => {
      kept.keep(name.trim(), settings);
      setAll(kept.presets());
      setName("");
      say(`Preset ${name.trim()} kept in this browser.`);
    }}>Keep</button></span>
    <ul>${Object.keys(all).map((one) => html`<li key=${one}><button type="button" onClick=${() => change({ ...settings, ...all[one] })}>${one}</button>
      <button type="button" class="quiet" aria-label=${`Forget the preset ${one}`} onClick=${() => {
        kept.forget(one);
        setAll(kept.presets());
      }}>×</button></li>`)}</ul></div>`;
}
