// The fleet at a glance, for administrators: workers, queues, dead letters.
import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { call, get, post } from "./api.js";
import { seconds } from "./words.js";

const EVERY_MS = 2000;

export function Fleet({ say }) {
  const [fleet, setFleet] = useState(null);
  const [problem, setProblem] = useState(null);
  const look = () => get("v1/fleet").then((found) => (setFleet(found), setProblem(null)), setProblem);
  useEffect(() => {
    look();
    const timer = setInterval(() => document.hidden || look(), EVERY_MS);
    return () => clearInterval(timer);
  }, []);
  if (!fleet) return html`<section class="fleet">${problem ? html`<p class="problem" role="alert">${problem.message}</p>` : html`<p class="empty">Looking…</p>`}</section>`;
  return html`<section class="fleet" aria-label="Fleet">
    ${problem && html`<p class="problem" role="alert">${problem.message}</p>`}
    <${Tiles} fleet=${fleet} />
    <h2>Workers</h2>
    ${fleet.workers.length ? html`<div class="workers">${fleet.workers.map((worker) => html`<${Worker} key=${worker.name} worker=${worker} />`)}</div>` : html`<p class="empty">No worker is alive.</p>`}
    <h2>Queues</h2><${Queues} queues=${fleet.queues} />
    <h2>Dead letters</h2><${Dead} letters=${fleet.dead_letters} look=${look} say=${say} />
  </section>`;
}

function Tiles({ fleet }) {
  const oldest = Math.max(0, ...fleet.queues.map((queue) => queue.oldest_s));
  const sum = (name) => fleet.workers.reduce((total, worker) => total + (worker[name] ?? 0), 0);
  const steps = sum("steps_per_s");
  const tiles = [
    ["Workers", fleet.workers.length], ["Running", fleet.running], ["Queued", fleet.queued], ["Oldest waits", fleet.queued ? seconds(oldest) : "–"],
    ["Steps a second", steps ? steps.toFixed(1) : "0"], ["Dead letters", fleet.num_dead_letters],
  ];
  return html`<div class="tiles">${tiles.map(([label, value]) => html`<div class="tile" key=${label}><b>${value}</b><span>${label}</span></div>`)}</div>`;
}

function Worker({ worker }) {
  const share = worker.capacity ? Math.min(1, worker.jobs / worker.capacity) : 0;
  return html`<article class="worker">
    <h3>${worker.name}</h3>
    <p class="device">${worker.device ?? "an earlier version"}</p>
    <div class="bar" role="img" aria-label=${`${worker.jobs ?? 0} of ${worker.capacity ?? 0} places in use`}><span style=${{ width: `${100 * share}%` }}></span></div>
    <dl>
      <div><dt>Jobs</dt><dd>${worker.jobs ?? "–"} of ${worker.capacity ?? "–"}</dd></div>
      <div><dt>Rows a step</dt><dd>${worker.rows_per_step?.toFixed(1) ?? "–"}</dd></div>
      <div><dt>Steps a second</dt><dd>${worker.steps_per_s?.toFixed(1) ?? "–"}</dd></div>
      <div><dt>Heard of</dt><dd>${seconds(worker.heard_s)} ago</dd></div>
    </dl>
    <ul class="models">${worker.models.map((model) => html`<li key=${model.id} class=${model.warm ? "warm" : "cold"} title=${model.warm ? "in memory" : "loaded when a job asks for it"}>${model.id}</li>`)}</ul>
  </article>`;
}

function Queues({ queues }) {
  if (!queues.length) return html`<p class="empty">Nothing waits.</p>`;
  return html`<div class="scroll"><table><thead><tr><th>Model</th><th>Tenant</th><th class="number">Jobs</th><th class="number">Oldest waits</th></tr></thead>
    <tbody>${queues.map((queue) => html`<tr key=${`${queue.model} ${queue.tenant}`}><td>${queue.model}</td><td>${queue.tenant}</td><td class="number">${queue.jobs}</td><td class="number">${seconds(queue.oldest_s)}</td></tr>`)}</tbody></table></div>`;
}

function Dead({ letters, look, say }) {
  if (!letters.length) return html`<p class="empty">None. Jobs that failed for good would be here, to be sent again.</p>`;
  const act = (work, done) => work().then(() => (say(done), look()), (error) => say(error.message));
  return html`<div class="scroll"><table><thead><tr><th>When</th><th>What</th><th>Why</th><th></th></tr></thead>
    <tbody>${letters.map((letter) => html`<tr key=${letter.id}><td>${seconds(letter.age_s)} ago</td><td>${letter.kind}<br /><small>${letter.id}</small></td><td>${letter.reason}</td>
      <td class="actions">${letter.replayable && html`<button type="button" onClick=${() => act(() => post(`v1/dead/${encodeURIComponent(letter.id)}/replay`), "Sent again.")}>Replay</button>`}
      <button type="button" class="danger" onClick=${() => act(() => call("DELETE", `v1/dead/${encodeURIComponent(letter.id)}`), "Forgotten.")}>Forget</button></td></tr>`)}</tbody></table></div>`;
}
