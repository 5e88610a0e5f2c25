// The jobs that the page knows, newest first, and who wants to hear of changes. Changes are announced once a frame.
import { get, jobPath } from "./api.js";

const PAGE = 100; // jobs of one request
const NEWS_MS = 4000; // between two looks for jobs that somebody else submitted

export const ENDED = new Set(["succeeded", "failed", "cancelled"]);

class Store {
  constructor() {
    this.jobs = new Map(); // all that is known, also what was opened by its address
    this.order = []; // ids of the list
    this.listed = new Set(); // the same ids
    this.listeners = new Set();
    this.reset("");
  }

  reset(status) {
    this.status = status;
    this.jobs.clear();
    this.order = [];
    this.listed.clear();
    this.cursor = null;
    this.complete = false;
    this.loading = null;
    this.loaded = false;
    this.version = (this.version ?? 0) + 1;
  }

  subscribe(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  changed() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      for (const listener of this.listeners) listener();
    });
  }

  path(cursor) {
    const query = new URLSearchParams({ limit: PAGE });
    if (this.status) query.set("status", this.status);
    if (cursor) query.set("cursor", cursor);
    return `v1/jobs?${query}`;
  }

  // The next page of older jobs; calls that come meanwhile wait for the same answer.
  more() {
    if (this.complete) return Promise.resolve();
    this.loading ??= this._more(this.version).finally(() => (this.loading = null));
    return this.loading;
  }

  async _more(version) {
    const page = await get(this.path(this.cursor));
    if (version !== this.version) return; // another filter was chosen meanwhile
    this.order.push(...this.unlisted(page.jobs));
    for (const job of page.jobs) this.merge(job);
    this.cursor = page.next_cursor;
    this.complete = !page.next_cursor;
    this.loaded = true;
    this.changed();
  }

  // Jobs that have come since the page was loaded, from the top of the list.
  async news() {
    const version = this.version;
    const page = await get(this.path(null));
    if (version !== this.version) return;
    const fresh = this.unlisted(page.jobs);
    for (const job of page.jobs) this.merge(job);
    this.order.unshift(...fresh);
    if (fresh.length) this.changed();
  }

  // The ids of jobs that the list does not have yet; from now on it has them.
  unlisted(jobs) {
    const fresh = jobs.map((job) => job.id).filter((id) => !this.listed.has(id));
    for (const id of fresh) this.listed.add(id);
    return fresh;
  }

  watchNews() {
    const timer = setInterval(() => document.hidden || !this.loaded || this.news().catch(() => {}), NEWS_MS);
    return () => clearInterval(timer);
  }

  add(job) {
    this.order.unshift(...this.unlisted([job]));
    this.merge(job);
  }

  // What an answer says of a job; a preview is kept until the pictures are there.
  merge(job) {
    const known = this.jobs.get(job.id);
    if (known && ENDED.has(known.status) && !ENDED.has(job.status)) return; // an answer that was overtaken
    this.jobs.set(job.id, { ...known, ...job });
    this.changed();
  }

  patch(id, fields) {
    const known = this.jobs.get(id);
    if (known) {
      this.jobs.set(id, { ...known, ...fields });
      this.changed();
    }
  }

  drop(id) {
    this.jobs.delete(id);
    this.listed.delete(id);
    this.order = this.order.filter((one) => one !== id);
    this.changed();
  }

  async refresh(id) {
    this.merge(await get(jobPath(id)));
  }

  open() {
    return [...this.jobs.values()].filter((job) => !ENDED.has(job.status)).map((job) => job.id);
  }
}

export const store = new Store();
