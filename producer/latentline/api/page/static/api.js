// Requests to the API. Every error that it answers becomes an ApiError with the field and what is allowed.

export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.message);
    this.status = status;
    this.code = problem.code;
    this.field = problem.field;
    this.allowed = problem.allowed;
  }
}

export async function call(method, path, body) {
  // The header marks requests of this page: the server takes no change from a session's cookie without it.
  const headers = { "X-Latentline-Page": "1" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new ApiError(0, { code: "unreachable", message: "The API does not answer. The page tries again." });
  }
  if (answer.status === 204) return null;
  let data;
  try {
    data = await answer.json();
  } catch {
    data = {};
  }
  if (!answer.ok) throw new ApiError(answer.status, data.error ?? { code: "http_error", message: `The API answered ${answer.status}.` });
  return data;
}

export const get = (path) => call("GET", path);
export const post = (path, body) => call("POST", path, body);

export const jobPath = (id, rest = "") => `v1/jobs/${encodeURIComponent(id)}${rest}`;
export const picturePath = (id, number) => jobPath(id, `/images/${number}`);
