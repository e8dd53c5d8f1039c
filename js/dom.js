// Elements, numbers, requests to the server. Text is never inserted as HTML.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const href = new URL("retune.css", import.meta.url).href;
document.head.append(el("link", "", { rel: "stylesheet", href }));

/** names: class names without their prefix. */
export function el(tag, names = "", properties, ...children) {
  const className = names.replace(/\S+/g, "retune-$&");
  const element = Object.assign(document.createElement(tag), { className }, properties);
  element.append(...children);
  return element;
}

export const row = (...children) => el("div", "row", {}, ...children);
export const gap = () => el("span", "grow");
export const button = (textContent, title, onclick) => el("button", "", { textContent, title, onclick });

export function fillSelect(select, pairs) {
  select.replaceChildren(...pairs.map(([value, textContent]) => el("option", "", { value, textContent })));
}

/** Unchanged text costs no layout. */
export function say(element, text) {
  if (element.textContent !== text) element.title = element.textContent = text;
}

export function sayState(element, state) {
  element.dataset.state = state;
  say(element, state);
}

export function figure(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(size < 1 ? 3 : 4)));
}

export function duration(seconds) {
  const minutes = Math.round(seconds / 60), hours = Math.floor(minutes / 60);
  return hours ? `${hours} h ${minutes % 60} min` : seconds > 90 ? `${minutes} min` : `${Math.round(seconds)} s`;
}

export const words = (key) => key.replaceAll("_", " ");
export const steps = (run) => `step ${run.step}${run.steps ? ` of ${run.steps}` : ""}`;

export const isBusy = (run) => ["running", "preparing"].includes(run?.state);
export const remark = (run) => ({ interrupted: "queue it again to go on", finished: "" })[run.state] ?? run.message;

export const address = (...names) => ["/retune/runs", ...names.map(encodeURIComponent)].join("/");

/** Shows a sample. File names recur after a restart, hence the version. */
export function picture(image, { id, version }, file, title) {
  const src = api.apiURL(`${address(id, "samples", file)}?v=${version}`);
  if (image.getAttribute("src") !== src) Object.assign(image, { src, title, alt: title, draggable: false });
  image.onclick = () => open(src, "", "noopener");
  return image;
}

/** A route's JSON, null for no run; throws the server's error. */
export async function ask(path, method = "GET") {
  const answer = await api.fetchApi(path, { method });
  if (answer.status === 204) return null;
  const body = await answer.json().catch(() => ({ error: answer.statusText }));
  if (!answer.ok) throw new Error(body.error);
  return body;
}

export const toast = (severity, detail) =>
  app.extensionManager.toast.add({ severity, summary: "Retune", detail, life: 6000 });

/** The result of an action; shows its error. */
export async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    toast("error", error.message);
  }
}
