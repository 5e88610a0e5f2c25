// A grid of variations as one labelled sheet: live while it is made, and a picture to keep once it is.
import { html, useEffect, useReducer, useRef, useState } from "./vendor/preact-htm.js";
import { get } from "./api.js";
import { axisOf } from "./axes.js";
import { draw } from "./drawing.js";
import { Pictures } from "./gallery.js";
import { ENDED, store } from "./store.js";
import { standing } from "./words.js";

const PAGES = 20; // of the list in which the jobs of a grid are looked for, each of up to 500 jobs

export function Sheet({ id, say }) {
  const [ids, setIds] = useState(null);
  const [problem, setProblem] = useState(null);
  const [, redraw] = useReducer((n) => n + 1, 0);
  const section = useRef(null);
  useEffect(() => store.subscribe(redraw), []);
  useEffect(() => {
    let wanted = true;
    setIds(null);
    setProblem(null);
    jobsOf(id).then((found) => wanted && setIds(found), (error) => wanted && setProblem(error.message));
    section.current.scrollIntoView({ block: "nearest" });
    return () => (wanted = false);
  }, [id]);
  const jobs = (ids ?? []).map((one) => store.jobs.get(one)).filter(Boolean);
  return html`<section class="sheet" ref=${section} aria-label="Grid">
    <p><a href="#/">All pictures</a></p>
    ${problem && html`<p class="problem" role="alert">${problem}</p>`}
    ${jobs.length > 0 && html`<${Table} grid=${gridOf(jobs)} say=${say} />`}
    ${ids && !jobs.length && html`<p class="empty">The jobs of this grid are no longer kept.</p>`}
  </section>`;
}

// The ids of a grid's jobs; their records go into the store, which follows those that are alive.
async function jobsOf(id) {
  const found = [];
  let cursor = null;
  for (let page = 0; page < PAGES; page++) {
    const query = new URLSearchParams({ limit: 100, metadata: `grid:${id}` });
    if (cursor) query.set("cursor", cursor);
    const answer = await get(`v1/jobs?${query}`);
    // Others may write what they like into the metadata of their jobs.
    for (const job of answer.jobs.filter((one) => typeof one.request.metadata.grid_x === "string")) {
      store.merge(job);
      found.push(job);
    }
    cursor = answer.next_cursor;
    if (!cursor || (found.length && found.length >= sizeOf(found[0]))) break;
  }
  return found.map((job) => job.id);
}

function axesOf(job) {
  const { grid_x: x, grid_y: y } = job.request.metadata;
  return [axisOf(x), typeof y === "string" ? axisOf(y) : null];
}

function sizeOf(job) {
  const [x, y] = axesOf(job);
  return x.values.length * (y?.values.length ?? 1);
}

function gridOf(jobs) {
  const { request } = jobs[0];
  const at = new Map(jobs.map((job) => [`${job.request.metadata.grid_column} ${job.request.metadata.grid_row}`, job]));
  const [x, y] = axesOf(jobs[0]);
  const varied = new Set([x.name, y?.name]);
  const same = [
    ["model", request.model], ["size", `${request.width} × ${request.height}`], ["seed", request.seed], ["scheduler", request.scheduler],
    ["num_inference_steps", `${request.num_inference_steps} steps`], ["guidance_scale", `guidance ${request.guidance_scale}`],
  ].filter(([name]) => !varied.has(name)).map(([name, value]) => (name === "seed" ? `seed ${value}` : value));
  return {
    title: request.prompt, subtitle: same.join(", "), columns: x.values.map((value) => `${x.label} ${value}`),
    rows: y ? y.values.map((value) => `${y.label} ${value}`) : [""], job: (column, row) => at.get(`${column} ${row}`), jobs,
  };
}

function Table({ grid, say }) {
  const [busy, setBusy] = useState(false);
  const alive = grid.jobs.filter((job) => !ENDED.has(job.status)).length;
  const save = () => {
    setBusy(true);
    draw(grid).then(download, () => say("The sheet could not be drawn.")).finally(() => setBusy(false));
  };
  return html`<h2>${grid.title}</h2><p class="hint">${grid.subtitle}</p>
    <div class="scroll"><table><thead><tr>${grid.rows.length > 1 && html`<td></td>`}${grid.columns.map((label) => html`<th scope="col">${label}</th>`)}</tr></thead>
      <tbody>${grid.rows.map((label, row) => html`<tr>${grid.rows.length > 1 && html`<th scope="row">${label}</th>`}
        ${grid.columns.map((_, column) => html`<td><${Cell} job=${grid.job(column, row)} label=${`${label} ${grid.columns[column]}`} /></td>`)}</tr>`)}</tbody></table></div>
    <div class="actions"><button type="button" class="primary" disabled=${busy || alive > 0} onClick=${save}>Save the sheet</button>
      <p class="hint" role="status">${alive ? `${alive} of ${grid.jobs.length} are being made.` : "All else is equal: what differs comes from what varies."}</p></div>`;
}

function Cell({ job, label }) {
  if (!job) return html`<span class="frame"><span class="pictures"></span><span class="badge">Deleted</span></span>`;
  return html`<a class="frame" href=${`#/job/${job.id}`} aria-label=${`${label}: ${standing(job)}`}><${Pictures} job=${job} />
    ${job.status !== "succeeded" && html`<span class="badge">${standing(job)}</span>`}</a>`;
}

function download(blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "grid.png";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
