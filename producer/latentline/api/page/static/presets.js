// Named settings, kept in this browser alone.

const KEY = "latentline.presets";

export function presets() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY));
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

export function keep(name, settings) {
  localStorage.setItem(KEY, JSON.stringify({ ...presets(), [name]: settings }));
}

export function forget(name) {
  const rest = presets();
  delete rest[name];
  localStorage.setItem(KEY, JSON.stringify(rest));
}
