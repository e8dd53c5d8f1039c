// What a loading node found, or its error, in the node.
import { addElement, el, extend, growToFit, say, sayState } from "./dom.js";

const EMPTY = 40, TOLD = 120, MARGIN = 20; // pixels
const KINDS = ["RetuneLoadDataset", "RetuneLoadT5", "RetuneLoadEmbedding", "RetuneLoadReward"];

export const notes = new Set();
export const hasNote = (node) => KINDS.includes(node.comfyClass);

export class Note {
  constructor(node) {
    this.node = node;
    this.height = EMPTY;
    this.state = el("span", "state");
    this.message = el("div", "message found", { tabIndex: 0 });
    this.element = el("div", "root view", {}, this.state, this.message);
    addElement(node, "retune_note", this.element, () => this.height + MARGIN);
    notes.add(this);
    this.forget();
    for (const widget of node.widgets ?? []) extend(widget, "callback", () => this.forget());
    extend(node, "onConfigure", () => node.properties.retune_found && this.say("found", node.properties.retune_found));
  }

  forget() {
    delete this.node.properties.retune_found;
    this.say("not loaded yet", "");
  }

  dispose() {
    notes.delete(this);
  }

  /** The node's output: what it found. */
  found(output) {
    if (!output?.text) return;
    this.node.properties.retune_found = output.text.join("\n"); // a node that is not executed again says nothing
    this.say("found", this.node.properties.retune_found);
  }

  /** A node that was stopped while it loaded. */
  queueEnded() {
    if (this.state.dataset.state === "loading") this.forget();
  }

  say(state, text) {
    sayState(this.state, state);
    say(this.message, text);
    this.message.hidden = !text;
    this.height = text ? TOLD : EMPTY;
    this.element.style.minHeight = `${this.height}px`;
    growToFit(this.node);
  }
}
