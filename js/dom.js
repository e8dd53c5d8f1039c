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
  say(element, t(state));
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

/** Translations from locales/; a text that has none stays as it is. */
const languages = await api.fetchApi("/i18n").then((answer) => answer.json()).catch(() => ({}));

/** t("step {step}", {step: 4}) in the language of the page. */
export function t(text, values = {}) {
  const known = languages[app.extensionManager?.setting?.get("Comfy.Locale")]?.retune?.[text] ?? text;
  return known.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export const words = (key) => key.replaceAll("_", " ");
export const steps = (run) => run.steps ? t("step {step} of {steps}", run) : t("step {step}", run);

export const isBusy = (run) => ["running", "preparing"].includes(run?.state);
export const isBroken = (run) => ["failed", "damaged"].includes(run?.state);
export const remark = (run) => ({ interrupted: t("queue it again to go on"), finished: "" })[run.state] ?? run.message;

export const address = (...names) => ["/retune/runs", ...names.map(encodeURIComponent)].join("/");

/** Shows a sample. File names recur after a restart, hence the version. */
export function picture(image, { id, version }, file, title) {
  const src = api.apiURL(`${address(id, "samples", file)}?v=${version}`);
  if (image.getAttribute("src") !== src) Object.assign(image, { src, title, alt: title, draggable: false });
  image.onclick = () => open(src, "", "noopener");
  return image;
}

/** Sets a widget as a user does. */
export function setWidget(node, widget, value) {
  widget.value = Array.isArray(value) ? value.join("\n") : value;
  widget.callback?.(widget.value, app.canvas, node);
  node.graph?.setDirtyCanvas(true, true);
}

/** Calls `more` after a method or callback of an object. */
export function extend(object, name, more) {
  const before = object[name];
  object[name] = function (...values) {
    const result = before?.apply(this, values);
    more(...values);
    return result;
  };
}

/** "5:3": node 3 in the subgraph of node 5. */
export function nodeAt(id) {
  let graph = app.rootGraph ?? app.graph, node;
  for (const part of String(id).split(":")) {
    node = graph?.nodes.find((found) => String(found.id) === part);
    graph = node?.subgraph;
  }
  return node;
}

/** An element as the last widget of a node, in neither its saved values nor the properties panel. */
export function addElement(node, name, element, getHeight) {
  const options = { serialize: false, hideInPanel: true, getMinHeight: getHeight };
  const widget = node.addDOMWidget(name, name, element, options);
  widget.serialize = false;
  element.onwheel = (event) => {
    if (!LiteGraph.vueNodesMode) app.canvas.processMouseWheel(event); // zooms the graph
  };
  return widget;
}

/** Grows a node to its content; never shrinks it. */
export function growToFit(node) {
  const [width, needed] = node.computeSize();
  if (node.size[1] < needed) node.setSize([Math.max(width, node.size[0]), needed]);
  node.graph?.setDirtyCanvas(true, true);
}

/** Hides ComfyUI's line of progress in a node that has a line of ours. */
export function hideProgressText(node) {
  const widget = node.widgets?.find(({ name }) => name === "$$node-text-preview");
  if (!widget || widget.hidden) return;
  widget.hidden = widget.options.hidden = true;
  node.graph?.setDirtyCanvas(true, true);
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
