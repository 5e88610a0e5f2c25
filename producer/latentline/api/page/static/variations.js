// The part of the form that makes a grid of one or two settings.
import { html } from "./vendor/preact-htm.js";
import { ApiError, jobPath, post } from "./api.js";
import { AXES } from "./axes.js";
import { store } from "./store.js";

export function Variations({ settings, model, set, wrong }) {
  const offered = Object.entries(AXES).filter(([name]) => name !== "loras" || model?.loras.length);
  const axis = (name, values, label, others) => html`<div class="pair">
    <label class="field"><span>${label}</span><select name=${name} value=${settings[name]} onChange=${(e) => set({ [name]: e.target.value, [values]: AXES[e.target.value]?.first(model) ?? "", ...others(e.target.value) })}>
      <option value="">nothing</option>${offered.map(([one, { label: words }]) => (name === "axis" || one !== settings.axis) && html`<option value=${one}>${words}</option>`)}</select></label>
    ${settings[name] && html`<label class="field ${wrong(values) ? "wrong" : ""}"><span>Values</span>
      <input name=${values} value=${settings[values]} maxlength="1000" onInput=${(e) => set({ [values]: e.target.value })} /></label>`}</div>`;
  return html`${axis("axis", "values", "Vary across", (chosen) => (!chosen || chosen === settings.second ? { second: "", second_values: "" } : {}))}
    ${settings.axis && axis("second", "second_values", "and down", () => ({}))}
    ${settings.axis && html`<p class="hint">One job for each value, or for each pair of values, ${[settings.axis, settings.second].includes("seed") ? "equal in all else" : "all with the same seed"}.</p>`}`;
}

// Submits the jobs of a grid: all of them or none, since a part of a grid compares nothing.
export async function submitGrid(requests) {
  const { results } = await post("v1/jobs/batch", { jobs: requests });
  const accepted = results.flatMap((one) => one.job ?? []);
  const refused = results.find((one) => one.error);
  if (refused) {
    await Promise.allSettled(accepted.map((job) => post(jobPath(job.id, "/cancel"))));
    throw new ApiError(refused.status, refused.error);
  }
  for (const job of accepted.toReversed()) store.add(job);
  location.hash = `#/grid/${requests[0].metadata.grid}`;
}
