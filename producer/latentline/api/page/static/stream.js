// Follows every job that has not ended, on one stream for all of them: a browser opens six connections to a server and no more.
import { store } from "./store.js";

const MOST = 50; // jobs on one stream; the rest follow when some of these have ended
const SETTLE_MS = 150; // submissions that come close together open one stream
const AGAIN_MS = 3000; // after an answer that was no stream, such as 429

let source = null;
let following = "";
let last = ""; // the id of the newest event: a new stream, also for other jobs, goes on from it
let timer = null;

export function follow() {
  clearTimeout(timer);
  timer = setTimeout(open, SETTLE_MS);
}

export function unfollow() {
  clearTimeout(timer);
  source?.close();
  source = null;
  following = "";
}

function open() {
  const wanted = store.open().slice(-MOST).join(",");
  if (wanted === following) return;
  unfollow();
  if (!wanted) return;
  following = wanted;
  const query = new URLSearchParams({ jobs: wanted });
  if (last) query.set("last_event_id", last);
  source = new EventSource(`v1/events?${query}`);
  for (const type of ["queued", "running", "progress", "preview", "succeeded", "failed", "cancelled", "position", "gone"])
    source.addEventListener(`job.${type}`, (event) => heard(type, event));
  source.addEventListener("end", () => {
    unfollow();
    follow();
  });
  source.onerror = () => {
    // EventSource comes back by itself after a broken connection; only an answer that is no stream closes it.
    if (source?.readyState !== EventSource.CLOSED) return;
    unfollow();
    last = "";
    timer = setTimeout(open, AGAIN_MS);
  };
}

function heard(type, event) {
  if (event.lastEventId) last = event.lastEventId;
  const data = JSON.parse(event.data);
  const id = data.job_id;
  const known = store.jobs.get(id);
  if (!known) return;
  if (type === "progress") store.patch(id, { status: "running", phase: data.phase, step: data.step ?? known.step, eta_s: data.eta_s });
  else if (type === "preview") {
    if (data.images?.length) store.patch(id, { status: "running", previews: data.images });
  } else if (type === "running") store.patch(id, { status: "running", queue_position: null });
  else if (type === "queued") store.patch(id, { status: "queued", queue_position: data.queue_position ?? known.queue_position });
  else if (type === "position") store.patch(id, { queue_position: data.queue_position, eta_s: data.eta_s });
  else if (type === "gone") store.drop(id);
  else {
    store.refresh(id).catch(() => {});
    follow();
  }
}
