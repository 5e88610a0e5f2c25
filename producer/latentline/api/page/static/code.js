// A job's request as code that makes the same picture again.

const OWN = ["model", "prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "scheduler", "seed", "num_images"];

function fields(request) {
  const found = {};
  for (const name of OWN) if (request[name] !== undefined && request[name] !== null && request[name] !== "") found[name] = request[name];
  if (request.loras?.length) found.loras = request.loras;
  if (request.output && request.output.format !== "png") found.output = request.output;
  return found;
}

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const python = (value) =>
  JSON.stringify(value, null, 4).replace(/\n/g, "\n    ").replace(/\btrue\b(?=,?\n)/g, "True").replace(/\bnull\b(?=,?\n)/g, "None");

function curl(request, keys) {
  const lines = [`curl ${location.origin}/v1/jobs`];
  if (keys) lines.push(`-H "Authorization: Bearer $LATENTLINE_API_KEY"`);
  lines.push(`-H 'Content-Type: application/json'`, `-d ${shell(JSON.stringify(fields(request), null, 1))}`);
  return lines.join(" \\\n  ");
}

function pythonCode(request, keys) {
  const header = keys ? `,\n    headers={"Authorization": f"Bearer {os.environ['LATENTLINE_API_KEY']}"}` : "";
  return `${keys ? "import os\n\n" : ""}import httpx

api = httpx.Client(base_url="${location.origin}"${header})
request = ${python(fields(request)).replace(/\n {4}/g, "\n")}
job = api.post("/v1/jobs", json=request).raise_for_status().json()
while job["status"] in ("queued", "running"):
    job = api.get(f"/v1/jobs/{job['id']}", params={"wait": 20}, timeout=30).raise_for_status().json()
for n in range(len(job["images"])):
    with open(f"{job['id']}-{n}.png", "wb") as file:
        file.write(api.get(f"/v1/jobs/{job['id']}/images/{n}").content)
`;
}

function openai(request, keys) {
  const extra = { ...fields(request) };
  for (const name of ["model", "prompt", "width", "height", "num_images", "output"]) delete extra[name];
  const rename = { num_inference_steps: "steps", guidance_scale: "guidance" };
  const body = Object.fromEntries(Object.entries(extra).map(([name, value]) => [rename[name] ?? name, value]));
  return `import base64${keys ? "\nimport os" : ""}

from openai import OpenAI

client = OpenAI(base_url="${location.origin}/openai/v1", api_key=${keys ? `os.environ["LATENTLINE_API_KEY"]` : `"none"`})
answer = client.images.generate(
    model=${JSON.stringify(request.model)},
    prompt=${JSON.stringify(request.prompt)},
    size="${request.width}x${request.height}",
    n=${request.num_images ?? 1},
    response_format="b64_json",
    extra_body=${python(body)},
)
for n, picture in enumerate(answer.data):
    with open(f"picture-{n}.png", "wb") as file:
        file.write(base64.b64decode(picture.b64_json))
`;
}

export const LANGUAGES = [
  ["curl", curl],
  ["Python", pythonCode],
  ["openai", openai],
];
