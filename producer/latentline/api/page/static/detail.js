// One job: its pictures, what made them, how long it took, and the same as code.
import { html, useEffect, useReducer, useRef, useState } from "./vendor/preact-htm.js";
import { call, jobPath, picturePath, post } from "./api.js";
import { LANGUAGES } from "./code.js";
import { FIELDS } from "./form.js";
import { Pictures } from "./gallery.js";
import { ENDED, store } from "./store.js";
import { follow } from "./stream.js";
import { Timeline } from "./timeline.js";
import { ago, standing } from "./words.js";

export function Detail({ id, back, session, reuse, say }) {
  const dialog = useRef(null);
  const [missing, setMissing] = useState(null);
  const [, redraw] = useReducer((n) => n + 1, 0);
  useEffect(() => store.subscribe(redraw), []);
  useEffect(() => {
    setMissing(null);
    if (!store.jobs.has(id)) store.refresh(id).then(follow, setMissing);
    if (!dialog.current.open) dialog.current.showModal();
  }, [id]);
  const job = store.jobs.get(id);
  const close = () => (location.hash = back);

  return html`<dialog class="detail" ref=${dialog} aria-label=${job ? job.request.prompt.slice(0, 120) : "Job"} onClose=${close}
      onClick=${(e) => e.target === dialog.current && dialog.current.close()}>
    <button class="close quiet" type="button" aria-label="Close" onClick=${() => dialog.current.close()}>×</button>
    ${missing && html`<p class="problem">${missing.message}</p>`}
    ${job && html`<div class="sides"><${Show} job=${job} /><${Facts} job=${job} session=${session} reuse=${reuse} say=${say} close=${close} /></div>`}
  </dialog>`;
}

function Show({ job }) {
  const alive = !ENDED.has(job.status);
  return html`<div class="show">
    <div class="stage"><${Pictures} job=${job} full=${true} />
      ${alive && html`<span class="progress"><span style=${{ width: `${job.num_steps ? (100 * job.step) / job.num_steps : 0}%` }}></span></span>`}</div>
    <p class="state ${job.status}" role="status">${standing(job)}${job.finished_at ? ` · ${ago(job.finished_at)}` : ""}</p>
    ${job.error && html`<p class="problem">${job.error.message} <small>(${job.error.code})</small></p>`}
    ${(job.warnings ?? []).map((warning) => html`<p class="warning">${warning.message}</p>`)}
  </div>`;
}

function Facts({ job, session, reuse, say, close }) {
  const alive = !ENDED.has(job.status);
  const change = async (work, done) => {
    try {
      await work();
      say(done);
    } catch (error) {
      say(error.message);
    }
  };
  return html`<div class="facts">
    <h2>${job.request.prompt}</h2>
    <div class="actions">
      <button type="button" class="primary" onClick=${() => reuse(job.request)}>Use these settings</button>
      ${job.images?.map((image, n) => html`<a class="button" key=${n} href=${picturePath(job.id, n)} download=${`${job.id}-${n}.${image.content_type.split("/")[1]}`}>Save${job.images.length > 1 ? ` ${n + 1}` : ""}</a>`)}
      ${typeof job.request.metadata?.grid_x === "string" && html`<a class="button" href=${`#/grid/${encodeURIComponent(job.request.metadata.grid)}`}>Its grid</a>`}
      ${alive && html`<button type="button" disabled=${job.cancel_requested} onClick=${() => change(async () => store.merge(await post(jobPath(job.id, "/cancel"))), "Cancelled.")}>${job.cancel_requested ? "Cancelling…" : "Cancel"}</button>`}
      ${!alive && html`<button type="button" class="danger" onClick=${() => change(async () => {
        await call("DELETE", jobPath(job.id));
        store.drop(job.id);
        close();
      }, "Deleted.")}>Delete</button>`}
    </div>
    <dl>${rows(job).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
    <${Timeline} job=${job} />
    <${Code} job=${job} keys=${session.keys} say=${say} />
  </div>`;
}

function rows(job) {
  const request = job.request;
  const found = [];
  for (const [name, label] of Object.entries(FIELDS)) {
    if (["prompt", "width", "height", "num_images", "loras", "seed"].includes(name)) continue;
    if (request[name] !== undefined && request[name] !== null && request[name] !== "") found.push([label, String(request[name])]);
  }
  found.push(["Size", `${request.width} × ${request.height}`]);
  found.push(["Seed", job.images?.length > 1 ? `${request.seed} to ${request.seed + job.images.length - 1}` : String(request.seed)]);
  if (request.loras?.length) found.push(["Adapters", request.loras.map((lora) => `${lora.name} ${lora.scale ?? 1}`).join(", ")]);
  found.push(["Job", job.id]);
  return found;
}

function Code({ job, keys, say }) {
  const [chosen, choose] = useState(0);
  const text = LANGUAGES[chosen][1](job.request, keys);
  return html`<section class="code"><h3>As code</h3>
    <div class="tabs" role="group" aria-label="Language">${LANGUAGES.map(([name], n) => html`<button type="button" key=${name} aria-pressed=${n === chosen} onClick=${() => choose(n)}>${name}</button>`)}
      <button type="button" class="copy" onClick=${() => navigator.clipboard.writeText(text).then(() => say("Copied."), () => say("The browser does not let this page copy."))}>Copy</button></div>
    <pre tabindex="0"><code>${text}</code></pre></section>`;
}
