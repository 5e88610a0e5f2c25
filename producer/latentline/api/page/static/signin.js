// Sign-in: the key goes into a cookie that no script can read, and is not kept here.
import { html, useState } from "./vendor/preact-htm.js";
import { post } from "./api.js";

export function SignIn({ done }) {
  const [problem, setProblem] = useState(null);
  async function enter(event) {
    event.preventDefault();
    const key = new FormData(event.target).get("key");
    try {
      done(await post("session", { key }));
    } catch (error) {
      setProblem(error.message);
    }
  }
  return html`<main class="signin"><form onSubmit=${enter}>
    <img src="page/logo.svg" alt="" width="56" height="56" />
    <h1>latentline</h1>
    <label class="field"><span>API key</span><input name="key" type="password" autocomplete="current-password" placeholder="ll_…" autofocus required /></label>
    ${problem && html`<p class="problem" role="alert">${problem}</p>`}
    <button class="primary" type="submit">Sign in</button>
    <p class="hint">An administrator makes one with <code>latentline keys create</code>.</p>
  </form></main>`;
}
