// Small helpers: elements, numbers and the server's answers. Text always goes in as text, never as HTML.
import { api } from "../../scripts/api.js";

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("retune.css", import.meta.url).href;
document.head.append(style);

/** An element with a class, properties and children. */
export function el(tag, className = "", properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Puts text into an element unless it is there already: an unchanged page costs no layout. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A figure in about three digits. */
export function figure(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(size < 1 ? 3 : 4)));
}

export function duration(seconds) {
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60), two = (n) => String(n).padStart(2, "0");
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
  return minutes ? `${minutes} min ${two(whole % 60)} s` : `${whole} s`;
}

const part = encodeURIComponent;
export const address = (id, ...rest) => ["/retune/runs", part(id), ...rest.map(part)].join("/");
export const sampleURL = (id, file) => api.apiURL(address(id, "samples", file));

/** The JSON that a route answers, or null for a run that is not there; throws an Error with the server's reason. */
export async function ask(path, method = "GET") {
  const answer = await api.fetchApi(path, { method, cache: "no-store" });
  if (answer.status === 204) return null;
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}
