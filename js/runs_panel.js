// The sidebar tab: all runs, their curves, reports and workflows; deleting them.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { address, ask, attempt, button, el, figure, fillSelect, gap, isBusy, picture } from "./dom.js";
import { remark, row, say, sayState, steps, toast, words } from "./dom.js";
import { LineChart } from "./loss_chart.js";
import { RunData } from "./run_data.js";

const COLOURS = ["#4f8fea", "#e0792f", "#3fa66b", "#b565d0", "#d4525f", "#2aa5b0", "#b08a2e"];
const askWorkflow = (id) => attempt(() => ask(`${address(id)}/workflow`));
const REFRESH = 1500; // ms between readings
const CURVES = ["smoothed", "loss", "validation", "learning_rate", "alignment"];

export class RunsPanel {
  constructor(element) {
    this.cards = new Map(); // id -> parts of its card
    this.chosen = new Map(); // id -> {colour, data: RunData}
    this.chart = new LineChart("Curves of the chosen runs");
    this.note = el("span", "grow quiet");
    this.curve = el("select", "", { ariaLabel: "Which curves", onchange: () => this.draw() });
    fillSelect(this.curve, CURVES.map((key) => [key, key === "smoothed" ? "average" : words(key)]));
    this.compare = row(gap(), this.curve, this.chart.scale);
    this.list = el("div", "list");
    const top = row(el("h3", "", { textContent: "Runs" }), this.note, button("Refresh", "", () => this.refresh()));
    this.element = el("div", "root panel", {}, top, this.compare, this.chart.element, this.list);
    element.replaceChildren(this.element);
    this.refresh();
  }

  destroy() {
    clearTimeout(this.waiting);
    this.chart.dispose();
  }

  event(kind, event) {
    const chosen = this.chosen.get(event.run);
    if (chosen && kind === "state" && !event.message) this.read(event.run); // starts, resumes or ends
    if (kind === "step") chosen?.data?.addStep(event);
    this.draw();
    this.refreshSoon();
  }

  refreshSoon() {
    this.waiting ??= setTimeout(() => this.refresh(), REFRESH);
  }

  async refresh() {
    clearTimeout(this.waiting);
    this.waiting = undefined;
    const runs = await attempt(() => ask("/retune/runs"));
    if (!runs) return;
    say(this.note, runs.length ? `${runs.length} in output/retune` : "none yet");
    for (const id of this.cards.keys())
      if (!runs.some((run) => run.id === id)) [this.cards, this.chosen].forEach((map) => map.delete(id));
    const order = runs.map((run) => this.fillCard(this.cards.get(run.id) ?? this.makeCard(run.id), run));
    const { children } = this.list, moved = order.some((card, i) => card !== children[i]);
    if (moved || order.length < children.length) this.list.replaceChildren(...order);
    this.draw();
  }

  makeCard(id) {
    const box = el("input", "", { type: "checkbox", title: "Show its curve", onchange: () => this.choose(id, box) });
    const [about, message] = [0, 0].map(() => el("div", "quiet"));
    const grid = el("img"), state = el("span", "state");
    const load = button("Load", "Open its workflow", () => this.loadWorkflow(id));
    const copy = button("Copy", "Copy its workflow", () => this.copyWorkflow(id));
    const remove = button("Delete", "Delete the run's folder", () => this.remove(id));
    const page = api.apiURL(`${address(id)}/report`);
    const report = button("Report", "Open its page", () => open(page, "", "noopener"));
    const title = row(el("label", "grow name", { title: id }, box, ` ${id}`), state);
    const buttons = row(report, load, copy, gap(), remove);
    const element = el("div", "card", {}, title, about, message, grid, buttons);
    const card = { element, state, about, message, grid, load, copy, remove };
    this.cards.set(id, card);
    return card;
  }

  fillCard(card, run) {
    const when = new Date(run.changed * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
    const key = run.reward === null ? "loss" : "reward", last = run[key] === null ? "" : `${key} ${figure(run[key])}`;
    sayState(card.state, run.state);
    say(card.about, [run.kind, steps(run), last, when].filter(Boolean).join(" · "));
    say(card.message, remark(run));
    card.message.hidden = !remark(run);
    card.grid.hidden = !run.grid;
    if (run.grid) picture(card.grid, run, run.grid, "the last samples");
    card.load.disabled = card.copy.disabled = !run.workflow;
    card.remove.disabled = isBusy(run);
    return card.element;
  }

  choose(id, box) {
    const used = [...this.chosen.values()].map((chosen) => chosen.colour);
    const colour = COLOURS.find((free) => !used.includes(free)) ?? COLOURS[0];
    box.style.setProperty("--key", colour);
    this.chosen.delete(id);
    if (box.checked) this.chosen.set(id, { colour });
    if (box.checked) this.read(id);
    this.draw();
  }

  async read(id) {
    const details = await attempt(() => ask(address(id))), chosen = this.chosen.get(id);
    if (details && chosen) chosen.data = new RunData(details);
    this.draw();
  }

  draw() {
    this.chart.element.hidden = this.compare.hidden = !this.chosen.size;
    const key = this.curve.value, series = [];
    for (const [name, { colour, data }] of this.chosen) {
      if (!data) continue;
      const rows = key === "validation" ? data.validation : data.figures.get(key) ?? data.rows;
      const points = data.points(rows, key === "validation" ? "loss" : key);
      series.push({ name, colour, points, legend: false, faint: key === "loss", dots: rows !== data.rows });
    }
    this.chart.show(series);
  }

  async loadWorkflow(id) {
    const made = await askWorkflow(id);
    if (made?.workflow) await app.loadGraphData(made.workflow, true, true, id);
    else if (made) await app.loadApiJson(made.prompt, id);
  }

  async copyWorkflow(id) {
    const made = await askWorkflow(id);
    if (!made) return;
    if (!navigator.clipboard) return toast("error", "Only pages of https or localhost may write to the clipboard.");
    await attempt(() => navigator.clipboard.writeText(JSON.stringify(made.workflow ?? made.prompt)));
    toast("success", `The workflow of ${id} is in the clipboard.`);
  }

  async remove(id) {
    const message = `Delete the folder of run "${id}" with its state, samples and result for good?`;
    const sure = await app.extensionManager.dialog.confirm({ title: "Delete run", message, type: "delete" });
    if (sure && (await attempt(() => ask(address(id), "DELETE")))) await this.refresh();
  }
}
