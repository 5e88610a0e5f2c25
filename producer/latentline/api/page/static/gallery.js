// The gallery: cards in a grid of which only those near the window exist, so that ten thousand jobs scroll as ten do.
import { html, useEffect, useLayoutEffect, useReducer, useRef, useState } from "./vendor/preact-htm.js";
import { picturePath } from "./api.js";
import { ENDED, store } from "./store.js";
import { standing } from "./words.js";

const LEAST = 168; // px, width of a card
const GAP = 14;
const CAPTION = 50; // px under the picture
const AROUND = 3; // rows kept above and below the window

const FILTERS = [["", "All"], ["running", "Running"], ["queued", "Queued"], ["succeeded", "Done"], ["failed", "Failed"]];

export function Gallery() {
  const [, redraw] = useReducer((n) => n + 1, 0);
  const box = useRef(null);
  const [view, setView] = useState({ width: 0, top: 0, height: 800 });

  useEffect(() => store.subscribe(redraw), []);
  useLayoutEffect(() => {
    const measure = () => {
      const place = box.current.getBoundingClientRect();
      setView({ width: place.width, top: -place.top, height: innerHeight });
    };
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(box.current);
    addEventListener("scroll", measure, { passive: true });
    return () => {
      observer.disconnect();
      removeEventListener("scroll", measure);
    };
  }, []);

  const columns = Math.max(2, Math.floor((view.width + GAP) / (LEAST + GAP)));
  const side = Math.max(80, (view.width - GAP * (columns - 1)) / columns);
  const row = side + CAPTION + GAP;
  const rows = Math.ceil(store.order.length / columns);
  const first = Math.max(0, Math.floor(view.top / row) - AROUND);
  const last = Math.min(rows, Math.ceil((view.top + view.height) / row) + AROUND);
  useEffect(() => {
    if (store.loaded && !store.complete && last >= rows - 2) store.more().catch(() => {});
  }, [last, rows]);

  const shown = store.order.slice(first * columns, last * columns);
  return html`<section class="gallery" aria-label="Pictures">
    <${Filter} />
    <div class="grid" ref=${box} style=${{ height: `${Math.max(rows * row, 1)}px` }}>
      ${view.width > 0 && shown.map((id, i) => {
        const at = first * columns + i;
        const place = { width: `${side}px`, transform: `translate(${(at % columns) * (side + GAP)}px, ${Math.floor(at / columns) * row}px)` };
        return html`<${Card} key=${id} job=${store.jobs.get(id)} place=${place} side=${side} />`;
      })}
    </div>
    ${store.loaded && !store.order.length && html`<p class="empty">${store.status ? "No job is in this state." : "Nothing yet. Write a prompt, and watch it sharpen."}</p>`}
  </section>`;
}

function Filter() {
  return html`<div class="filter" role="group" aria-label="Which jobs">${FILTERS.map(([status, label]) => html`<button type="button" key=${status} aria-pressed=${store.status === status}
    onClick=${() => {
      store.reset(status);
      store.more().catch(() => {});
      store.changed();
    }}>${label}</button>`)}</div>`;
}

function Card({ job, place, side }) {
  const alive = !ENDED.has(job.status);
  return html`<a class="card ${job.status}" href=${`#/job/${job.id}`} style=${place} aria-label=${`${job.request.prompt.slice(0, 120)}: ${standing(job)}`}>
    <span class="frame" style=${{ height: `${side}px` }}>
      <${Pictures} job=${job} />
      ${alive && html`<span class="progress"><span style=${{ width: `${job.num_steps ? (100 * job.step) / job.num_steps : 0}%` }}></span></span>`}
      ${job.status !== "succeeded" && html`<span class="badge">${standing(job)}</span>`}
    </span>
    <span class="caption">${job.request.prompt}</span>
  </a>`;
}

// The pictures of a job, or the newest previews of them: several stand in a square.
export function Pictures({ job, full = false }) {
  const done = job.images?.length ? job.images.map((image, n) => picturePath(job.id, n) + (full ? "" : thumbnail(image))) : null;
  const sources = (done ?? job.previews ?? []).slice(0, full ? 16 : 4);
  const across = Math.ceil(Math.sqrt(sources.length));
  return html`<span class="pictures ${done ? "done" : "preview"}" style=${{ gridTemplateColumns: `repeat(${across || 1}, 1fr)` }}>
    ${sources.map((source, n) => html`<img key=${n} src=${source} alt="" decoding="async" draggable=${false} />`)}
    ${!sources.length && html`<span class="noise ${ENDED.has(job.status) ? "" : "alive"}"></span>`}
  </span>`;
}

// Cards of large pictures show small copies.
const thumbnail = (image) => (image.width > 512 || image.height > 512 ? "/thumbnail?width=512" : "");
