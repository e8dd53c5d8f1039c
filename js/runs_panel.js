// The sidebar tab: all runs, their curves compared, their report and workflow, and deleting them.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { address, ask, el, figure, sampleURL, say } from "./dom.js";
import { LineChart } from "./loss_chart.js";
import { RunData } from "./run_data.js";

const COLOURS = ["#4f8fea", "#e0792f", "#3fa66b", "#b565d0", "#d4525f", "#2aa5b0", "#b08a2e", "#7d86e8"];
const REFRESH = 1500; // milliseconds between two readings of the list while runs are going on
const CURVES = new Map([
  ["smoothed", "loss or reward, smoothed"],
  ["loss", "loss or reward"],
  ["validation", "validation"],
  ["learning_rate", "learning rate"],
  ["alignment", "alignment"],
]);

export class RunsPanel {
  constructor(element) {
    this.chosen = new Map(); // id -> colour
    this.data = new Map(); // id -> RunData
    this.cards = new Map(); // id -> {element, ...its parts}
    this.chart = new LineChart("Curves of the chosen runs");
    const again = el("button", "", { type: "button", textContent: "Refresh", onclick: () => this.refresh() });
    this.note = el("span", "retune-grow retune-quiet");
    this.curve = el("select", "", { ariaLabel: "Which curves", onchange: () => this.draw() });
    this.curve.append(...[...CURVES].map(([value, textContent]) => el("option", "", { value, textContent })));
    this.scale = el("button", "", { type: "button", textContent: "linear", onclick: () => this.changeScale() });
    this.compare = el("div", "retune-row", {}, el("span", "retune-grow"), this.curve, this.scale);
    this.list = el("div", "retune-list");
    const top = el("div", "retune-row", {}, el("h3", "", { textContent: "Runs" }), this.note, again);
    this.element = el("div", "retune retune-panel", {}, top, this.compare, this.chart.element, this.list);
    element.replaceChildren(this.element);
    this.refresh();
  }

  destroy() {
    clearTimeout(this.waiting);
    this.chart.dispose();
    this.element.remove();
  }

  event(kind, event) {
    if (kind === "step") this.data.get(event.run)?.addStep(event);
    const card = this.cards.get(event.run);
    if (kind === "step" && card) {
      this.fillCard(card, { ...card.run, ...pick(event), state: "running", message: "" });
      if (this.chosen.has(event.run)) this.draw();
    } else this.refreshSoon();
  }

  refreshSoon() {
    this.waiting ??= setTimeout(() => this.refresh(), REFRESH);
  }

  async refresh() {
    clearTimeout(this.waiting);
    this.waiting = undefined;
    try {
      const runs = await ask("/retune/runs");
      say(this.note, runs.length ? `${runs.length} in output/retune` : "none yet: they come with the first training");
      for (const id of [...this.cards.keys()]) if (!runs.some((run) => run.id === id)) this.forget(id);
      for (const run of runs) this.fillCard(this.cards.get(run.id) ?? this.makeCard(run.id), run);
      const order = runs.map((run) => this.cards.get(run.id).element);
      if (order.some((card, i) => card !== this.list.children[i])) this.list.replaceChildren(...order);
    } catch (error) {
      say(this.note, error.message);
    }
    this.draw();
  }

  makeCard(id) {
    const box = el("input", "", { type: "checkbox", title: "Show its curve", ariaLabel: `Show the curve of ${id}` });
    box.addEventListener("change", () => this.choose(id, box.checked));
    const name = el("label", "retune-grow retune-name", { title: id }, box, ` ${id}`);
    const state = el("span", "retune-state"), about = el("div", "retune-quiet"), message = el("div", "retune-quiet");
    const grid = el("img", "", { alt: "the last samples", loading: "lazy", hidden: true });
    grid.addEventListener("click", () => window.open(grid.src, "_blank"));
    const button = (textContent, title, act) => el("button", "", { type: "button", textContent, title, onclick: act });
    const report = button("Report", "Open the run's page", () => window.open(api.apiURL(`${address(id)}/report`), "_blank"));
    const load = button("Load", "Open the workflow that made it", () => this.loadWorkflow(id));
    const copy = button("Copy", "Copy the workflow that made it; paste it into a graph", () => this.copyWorkflow(id));
    const remove = button("Delete", "Delete the run's folder", () => this.remove(id));
    const buttons = el("div", "retune-row", {}, report, load, copy, el("span", "retune-grow"), remove);
    const top = el("div", "retune-row", {}, name, state);
    const card = { box, state, about, message, grid, load, copy, remove };
    card.element = el("div", "retune-card", {}, top, about, message, grid, buttons);
    this.cards.set(id, card);
    return card;
  }

  fillCard(card, run) {
    card.run = run;
    card.state.dataset.state = run.state;
    say(card.state, run.state);
    const what = run.reward !== null ? ["reward", run.reward] : ["loss", run.loss];
    const words = [run.kind, `step ${run.step}${run.steps ? ` of ${run.steps}` : ""}`];
    if (Number.isFinite(what[1])) words.push(`${what[0]} ${figure(what[1])}`);
    words.push(new Date(run.changed * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" }));
    say(card.about, words.filter(Boolean).join(" · "));
    say(card.message, run.message ?? "");
    card.message.hidden = !run.message;
    const src = run.grid ? sampleURL(run.id, run.grid) : "";
    card.grid.hidden = !src;
    if (src && card.grid.getAttribute("src") !== src) card.grid.src = src;
    card.load.disabled = card.copy.disabled = !run.workflow;
    card.remove.disabled = run.state === "running" || run.state === "preparing";
  }

  forget(id) {
    this.cards.get(id).element.remove();
    for (const known of [this.cards, this.chosen, this.data]) known.delete(id);
  }

  async choose(id, chosen) {
    const { box } = this.cards.get(id);
    if (!chosen) this.chosen.delete(id);
    else {
      const used = [...this.chosen.values()], free = COLOURS.find((colour) => !used.includes(colour));
      this.chosen.set(id, free ?? COLOURS[this.chosen.size % COLOURS.length]);
      box.style.setProperty("--key", this.chosen.get(id));
      const details = await this.attempt(() => ask(address(id)));
      if (details) this.data.set(id, new RunData(details));
    }
    this.draw();
  }

  changeScale() {
    this.chart.log = !this.chart.log;
    say(this.scale, this.chart.log ? "log" : "linear");
    this.chart.redraw();
  }

  draw() {
    this.chart.element.hidden = this.compare.hidden = !this.chosen.size;
    const key = this.curve.value, series = [];
    for (const [id, colour] of this.chosen) {
      const run = this.data.get(id);
      if (!run) continue;
      const rows = key === "validation" ? run.validation : run.figures.get(key) ?? run.rows;
      const points = run.points(rows, key === "validation" ? "loss" : key);
      series.push({ name: id, colour, points, legend: false, faint: key === "loss", dots: rows !== run.rows });
    }
    this.chart.show(series);
  }

  async loadWorkflow(id) {
    const made = await this.attempt(() => ask(`${address(id)}/workflow`));
    if (made?.workflow) await app.loadGraphData(made.workflow, true, true, id);
    else if (made) await app.loadApiJson(made.prompt, id);
  }

  async copyWorkflow(id) {
    const made = await this.attempt(() => ask(`${address(id)}/workflow`));
    if (!made) return;
    const text = JSON.stringify(made.workflow ?? made.prompt);
    if (await this.attempt(() => copy(text))) toast("success", `The workflow of ${id} is in the clipboard.`);
  }

  async remove(id) {
    const message = `Delete the folder of run "${id}" with its state, samples and result? This cannot be undone.`;
    const sure = await app.extensionManager.dialog.confirm({ title: "Delete run", message, type: "delete" });
    if (sure && (await this.attempt(() => ask(address(id), "DELETE")))) await this.refresh();
  }

  /** What the action gives; tells its error to the user. */
  async attempt(action) {
    try {
      return await action();
    } catch (error) {
      toast("error", error.message);
      return null;
    }
  }
}

const pick = ({ step, steps, loss, reward = null }) => ({ step, steps, loss, reward, changed: Date.now() / 1000 });

function toast(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "Runs", detail, life: 6000 });
}

/** To the clipboard; a page that is not on this machine or https has none to write to. */
async function copy(text) {
  if (!navigator.clipboard) throw new Error("This page may not write to the clipboard (it needs https or localhost).");
  await navigator.clipboard.writeText(text);
  return true;
}
