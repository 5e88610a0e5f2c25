// The page: who is signed in, which part is shown, and what drops onto it.
import { html, render, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { call, get } from "./api.js";
import { Detail } from "./detail.js";
import { Fleet } from "./fleet.js";
import { defaults, Form, fromRequest, withModel } from "./form.js";
import { Gallery } from "./gallery.js";
import { NotOurs, recall } from "./recall.js";
import { Sheet } from "./sheet.js";
import { SignIn } from "./signin.js";
import { store } from "./store.js";
import { follow, unfollow } from "./stream.js";

const THEME = "latentline.theme";
const SAID_MS = 4000;
const MODELS_MS = 5000; // between two looks at the models

function App() {
  const [session, setSession] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    get("session").then(setSession, (error) => (error.status === 401 ? setSession(false) : setProblem(error)));
  }, []);
  if (problem) return html`<p class="boot">${problem.message}</p>`;
  if (session === null) return html`<p class="boot">latentline</p>`;
  if (!session) return html`<${SignIn} done=${setSession} />`;
  return html`<${Studio} session=${session} leave=${() => {
    unfollow();
    store.reset("");
    location.hash = "#/";
    call("DELETE", "session").finally(() => setSession(false));
  }} />`;
}

function Studio({ session, leave }) {
  const [models, setModels] = useState([]);
  const [settings, setSettings] = useState(defaults());
  const [said, setSaid] = useState("");
  const [dragged, setDragged] = useState(false);
  const route = useRoute();
  const behind = useRef({ part: "", hash: "#/" }); // what a job's detail stands in front of
  if (route.part !== "job") behind.current = route;
  const { part: shown, id: gridId } = behind.current;

  const say = (text) => {
    setSaid(text);
    clearTimeout(say.timer);
    say.timer = setTimeout(() => setSaid(""), SAID_MS);
  };
  const reuse = (request) => {
    setSettings(fromRequest(request, models));
    location.hash = "#/";
    say("Settings taken over.");
  };

  useEffect(() => {
    const load = () => get("v1/models").then(({ models: found }) => {
      setModels(found);
      setSettings((now) => (now.model || !found.length ? now : withModel(now, found[0])));
    }, (error) => say(error.message));
    load();
    const timer = setInterval(() => document.hidden || load(), MODELS_MS);
    store.more().catch((error) => say(error.message));
    const unwatch = store.watchNews();
    const unsubscribe = store.subscribe(follow);
    return () => {
      clearInterval(timer);
      unwatch();
      unsubscribe();
    };
  }, []);

  async function dropped(event) {
    event.preventDefault();
    setDragged(false);
    const [file] = event.dataTransfer?.files ?? [];
    if (!file) return;
    try {
      reuse(await recall(file));
    } catch (error) {
      say(error instanceof NotOurs ? error.message : `${file.name} cannot be read.`);
    }
  }

  const admin = session.scopes.includes("admin");
  const canSubmit = admin || session.scopes.includes("submit");
  return html`<div class="page ${dragged ? "dragged" : ""}" onDragOver=${(e) => (e.preventDefault(), setDragged(true))}
      onDragLeave=${(e) => e.relatedTarget ?? setDragged(false)} onDrop=${dropped}>
    <a class="skip" href="#main" onClick=${(e) => (e.preventDefault(), document.getElementById("main").focus())}>Skip to the pictures</a>
    <header><a class="brand" href="#/"><img src="page/logo.svg" alt="" width="28" height="28" />latentline</a>
      <nav aria-label="Parts of the page"><a href="#/" aria-current=${shown === "fleet" ? undefined : "page"}>Pictures</a>
        ${admin && html`<a href="#/fleet" aria-current=${shown === "fleet" ? "page" : undefined}>Fleet</a>`}<a href="docs">API</a></nav>
      <span class="who">${session.tenant ?? ""}</span><${Theme} />
      ${session.keys && html`<button type="button" class="quiet" onClick=${leave}>Sign out</button>`}</header>
    <main id="main" tabindex="-1">${shown === "fleet" && admin
      ? html`<${Fleet} say=${say} />`
      : html`<div class="studio">${canSubmit && html`<${Form} models=${models} settings=${settings} change=${setSettings} say=${say} />`}
        ${shown === "grid" ? html`<${Sheet} id=${gridId} say=${say} />` : html`<${Gallery} />`}</div>`}</main>
    ${route.part === "job" && html`<${Detail} id=${route.id} back=${behind.current.hash} session=${session} reuse=${reuse} say=${say} />`}
    <p class="said ${said ? "" : "silent"}" role="status">${said}</p>
  </div>`;
}

function useRoute() {
  const read = () => {
    const [, part, id] = location.hash.split("/");
    const known = ((part === "job" || part === "grid") && id) || part === "fleet";
    return { part: known ? part : "", id: id && decodeURIComponent(id), hash: known ? location.hash : "#/" };
  };
  const [route, setRoute] = useState(read);
  useEffect(() => {
    const changed = () => setRoute(read());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return route;
}

function Theme() {
  const [theme, setTheme] = useState(localStorage.getItem(THEME) ?? "");
  useEffect(() => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    if (theme) localStorage.setItem(THEME, theme);
    else localStorage.removeItem(THEME);
  }, [theme]);
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  return html`<button type="button" class="quiet theme" aria-label=${dark ? "Light theme" : "Dark theme"} onClick=${() => setTheme(dark ? "light" : "dark")}>${dark ? "☀" : "☾"}</button>`;
}

render(html`<${App} />`, document.getElementById("app"));
