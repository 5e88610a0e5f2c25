// Numbers and times as people read them.

export function seconds(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  if (value < 129600) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} d`;
}

export function ago(iso) {
  const passed = (Date.now() - Date.parse(iso)) / 1000;
  return passed < 5 ? "just now" : `${seconds(passed)} ago`;
}

export const between = (from, to) => (from && to ? (Date.parse(to) - Date.parse(from)) / 1000 : null);

export const STATUS = { queued: "Queued", running: "Running", succeeded: "Done", failed: "Failed", cancelled: "Cancelled" };

export function standing(job) {
  if (job.status === "queued") {
    const place = job.queue_position === null || job.queue_position === undefined ? "" : ` · ${job.queue_position === 0 ? "next" : `${job.queue_position} ahead`}`;
    return `Queued${place}${job.eta_s ? ` · about ${seconds(job.eta_s)}` : ""}`;
  }
  if (job.status === "running") {
    if (job.phase === "decoding" || job.phase === "uploading") return "Finishing";
    if (!job.step) return "Starting";
    return `Step ${job.step} of ${job.num_steps}`;
  }
  return STATUS[job.status] ?? job.status;
}
