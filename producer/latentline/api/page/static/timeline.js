// What happened to a job, drawn to scale: waiting, phases, each denoise step with how many jobs shared it, checkpoints, callbacks.
import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { get, jobPath } from "./api.js";
import { ENDED } from "./store.js";
import { seconds } from "./words.js";

const LABELS = {
  queued: "Waiting in the queue", encoding: "Reading the prompt", waiting: "Waiting for memory", denoising: "Denoising", decoding: "Decoding",
  uploading: "Upload",
};
const EVERY_MS = 1000; // while the job is alive
const LANES = [1, 2, 4, 8, 16]; // jobs that shared a step, as shades

export function Timeline({ job }) {
  const [timeline, setTimeline] = useState(null);
  const alive = !ENDED.has(job.status);
  useEffect(() => {
    let wanted = true;
    const look = () => get(jobPath(job.id, "/timeline")).then((found) => wanted && setTimeline(found), () => {});
    look();
    const timer = alive ? setInterval(look, EVERY_MS) : null;
    return () => {
      wanted = false;
      clearInterval(timer);
    };
  }, [job.id, job.status]);
  if (!timeline?.attempts.length) return null;
  const total = Math.max(timeline.ended_s ?? timeline.now_s, 0.001);
  return html`<section class="timeline"><h3>Timeline</h3>
    ${timeline.attempts.map((attempt) => html`<${Attempt} key=${attempt.number} attempt=${attempt} total=${total} many=${timeline.num_attempts > 1} />`)}
    ${timeline.callbacks.length > 0 && html`<ul class="legend">${timeline.callbacks.map((one) => html`<li>Callback ${one.event}: <b>${one.status}</b>, ${one.num_tries} ${one.num_tries === 1 ? "try" : "tries"}</li>`)}</ul>`}
  </section>`;
}

function Attempt({ attempt, total, many }) {
  const end = attempt.ended_s ?? total;
  const spans = [{ name: "queued", start_s: attempt.queued_s, duration_s: attempt.claimed_s - attempt.queued_s }, ...attempt.phases];
  const percent = (value) => `${(100 * value) / total}%`;
  return html`<div class="attempt">
    ${many && html`<p class="hint">Attempt ${attempt.number}${attempt.worker_name ? ` on ${attempt.worker_name}` : `, worker ${attempt.worker}`}: ${attempt.outcome.replace("_", " ")}${attempt.resumed_from ? `, went on from step ${attempt.resumed_from}` : ""}</p>`}
    <div class="track" role="img" aria-label=${spans.map((span) => `${LABELS[span.name] ?? span.name} ${seconds(span.duration_s)}`).join(", ")}>
      ${spans.map((span) => html`<span key=${span.name} class=${`span ${span.name}`} title=${`${LABELS[span.name] ?? span.name}: ${seconds(span.duration_s)}`}
        style=${{ left: percent(span.start_s), width: percent(Math.max(span.duration_s, total / 400)) }}></span>`)}
      ${attempt.outcome === "lost" && html`<span class="span lost" title="The worker was lost" style=${{ left: percent(end), width: "3px" }}></span>`}
      ${attempt.checkpoints.map((mark) => html`<i class="mark" key=${mark.step} title=${`Checkpoint of step ${mark.step}`} style=${{ left: percent(mark.at_s) }}></i>`)}
    </div>
    <ul class="legend">${spans.filter((span) => span.duration_s > 0).map((span) => html`<li key=${span.name}><i class=${span.name}></i>${LABELS[span.name] ?? span.name} <b>${seconds(span.duration_s)}</b></li>`)}</ul>
    <${Steps} runs=${attempt.steps} />
    ${attempt.made && html`<${Made} made=${attempt.made} />`}
  </div>`;
}

function Steps({ runs }) {
  const steps = runs.flatMap((run) => run.durations_ms.map((ms, i) => ({ number: run.first + i, ms: ms ?? 0, jobs: run.jobs, rows: run.rows })));
  if (!steps.length) return null;
  const longest = Math.max(...steps.map((step) => step.ms), 1);
  const shared = steps.filter((step) => step.jobs > 1).length;
  return html`<div class="steps" role="img" aria-label=${`${steps.length} denoise steps, ${shared} of them shared with other jobs`}>
    ${steps.map((step) => html`<i key=${step.number} class=${`shade-${LANES.filter((lane) => lane <= step.jobs).length}`} style=${{ height: `${Math.max(6, (100 * step.ms) / longest)}%` }}
      title=${`Step ${step.number}: ${seconds(step.ms / 1000)}, ${step.jobs === 1 ? "alone" : `shared by ${step.jobs} jobs`}${step.rows ? ` (${step.rows} rows)` : ""}`}></i>`)}</div>
    <p class="hint">Each bar is a denoise step, as high as it was long; ${shared ? `${shared} of ${steps.length} ran together with other jobs (darker: more of them)` : "none was shared"}.</p>`;
}

const Made = ({ made }) => html`<details class="more"><summary>What made it</summary><dl>${facts(made).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl></details>`;

function facts(value, prefix = "") {
  return Object.entries(value).flatMap(([name, one]) => {
    const label = prefix + name.replaceAll("_", " ");
    if (one === null || one === undefined || one === "" || (Array.isArray(one) && !one.length)) return [];
    return typeof one === "object" && !Array.isArray(one) ? facts(one, `${label}: `) : [[label, Array.isArray(one) ? one.map((part) => (typeof part === "object" ? JSON.stringify(part) : part)).join(", ") : String(one)]];
  });
}
