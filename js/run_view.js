// The run in its training node: state, chart, and the samples over time.
import { app } from "../../scripts/app.js";
import { address, ask, duration, el, figure, sampleURL, say } from "./dom.js";
import { LineChart } from "./loss_chart.js";
import { RunData } from "./run_data.js";

const EMPTY = 40, CHART = 270, STRIP = 108; // heights in pixels
const MARGIN = 20; // of a DOM widget in the classic renderer, both sides
const BUSY = ["running", "preparing"];
const views = new Set();

export const forEachView = (act) => views.forEach(act);

export class RunView {
  constructor(node) {
    this.node = node;
    this.run = null; // RunData, once the server knows the run
    this.height = EMPTY;
    this.build();
    views.add(this);
    this.widget = node.addDOMWidget("retune_run_view", "retune_run_view", this.element, {
      serialize: false,
      getMinHeight: () => this.height + MARGIN,
      getValue: () => undefined,
      setValue: () => {},
    });
    this.widget.serialize = false;
    this.load();
  }

  build() {
    this.state = el("span", "retune-state");
    this.progress = el("span", "retune-grow");
    this.stop = el("button", "", { type: "button", textContent: "Finish now", onclick: () => this.finish() });
    this.stop.title = "End the run cleanly at this step: the result is written and the graph goes on.";
    this.pace = el("span", "retune-grow retune-quiet");
    this.scale = el("button", "", { type: "button", textContent: "linear", onclick: () => this.changeScale() });
    this.scale.title = "Scale of the left axis";
    this.choice = el("select", "", { ariaLabel: "Figure on the right axis", onchange: () => this.draw() });
    this.choice.style.maxWidth = "9.5em";
    this.chart = new LineChart("Curves of the run");
    this.strip = el("div", "retune-strip");
    this.slider = el("input", "", { type: "range", min: 0, step: 1, ariaLabel: "Samples over time" });
    this.slider.addEventListener("input", () => this.showSamples());
    this.when = el("span", "retune-quiet");
    const controls = el("div", "retune-row", {}, el("span", "retune-grow"), this.choice, this.scale);
    this.rows = [el("div", "retune-row", {}, this.pace), this.chart.element, controls];
    this.sampleRows = [this.strip, el("div", "retune-row", {}, this.slider, this.when)];
    const top = el("div", "retune-row", {}, this.state, this.progress, this.stop);
    this.element = el("div", "retune retune-view", {}, top, ...this.rows, ...this.sampleRows);
    // A wheel over the chart zooms the graph, as beside it. Nodes 2.0 sees to that itself.
    this.element.addEventListener("wheel", (event) => {
      if (!globalThis.LiteGraph?.vueNodesMode) app.canvas.processMouseWheel(event);
    });
    this.fill();
  }

  /** The run's name as the node has it; null where a link brings it. */
  get name() {
    const slot = this.node.findInputSlot?.("run_name") ?? -1;
    if (slot >= 0 && this.node.isInputConnected(slot)) return null;
    return this.node.widgets?.find((widget) => widget.name === "run_name")?.value ?? null;
  }

  dispose() {
    views.delete(this);
    clearTimeout(this.waiting);
    this.chart.dispose();
  }

  /** Reads the run from the server, a moment later, so that several reasons to do it are one. */
  load(id = this.name, after = 50) {
    clearTimeout(this.waiting);
    this.waiting = setTimeout(async () => {
      const name = id ?? this.run?.id;
      if (!name) return;
      try {
        const details = await ask(address(name));
        if ((id ?? this.run?.id) !== name || !views.has(this)) return;
        this.run = details && new RunData(details);
      } catch (error) {
        this.run = null;
        this.problem = error.message;
      }
      this.fill();
    }, after);
  }

  /** Whether an event is about this node: its run, or, where a link names the run, the node itself. */
  concerns(event) {
    const name = this.name;
    if (name !== null) return event.run === name;
    return event.run === this.run?.id || nodeAt(event.node) === this.node;
  }

  event(kind, event) {
    if (!this.concerns(event)) return;
    if (!this.run || this.run.id !== event.run) {
      if (kind !== "state" || event.message === "") this.load(event.run); // the folder is there by the first row
      else this.say(event.state, event.message);
      return;
    }
    const before = this.run.state;
    if (kind === "step") this.run.addStep(event);
    else if (kind === "sample") this.run.addSample(event);
    else this.run.setState(event);
    if (kind === "state" && before !== this.run.state && !BUSY.includes(this.run.state)) this.load(this.run.id);
    this.fill(kind === "sample");
  }

  /** The queue was stopped or broke: what the run says of itself may be out of date. */
  queueEnded() {
    if (this.run ? BUSY.includes(this.run.state) : !this.pace.hidden) this.load(this.run?.id ?? this.name, 300);
  }

  async finish() {
    this.stop.disabled = true;
    try {
      await ask(`${address(this.run.id)}/finish`, "POST");
      say(this.progress, "finishing after this step");
    } catch (error) {
      this.stop.disabled = false;
      app.extensionManager.toast.add({ severity: "error", summary: "Finish now", detail: error.message, life: 6000 });
    }
  }

  changeScale() {
    this.chart.log = !this.chart.log;
    say(this.scale, this.chart.log ? "log" : "linear");
    this.draw();
  }

  /** Writes everything anew; parts that are unchanged cost nothing. */
  fill(newSample = false) {
    const run = this.run;
    const shown = Boolean(run && (run.rows.length || run.samples.length)), sampled = Boolean(run?.samples.length);
    for (const row of this.rows) row.hidden = !shown;
    for (const row of this.sampleRows) row.hidden = !sampled;
    this.stop.hidden = run?.state !== "running";
    if (this.stop.hidden) this.stop.disabled = false;
    if (run) this.fillState(run);
    else this.say("none", this.problem ?? "the run's chart and samples will be here");
    this.problem = undefined;
    this.fit(shown ? CHART + (sampled ? STRIP : 0) : EMPTY);
    if (!shown) return;
    this.fillChoice(run);
    this.draw();
    this.fillSamples(run, newSample);
  }

  say(state, text) {
    this.state.dataset.state = state;
    say(this.state, state === "none" ? "no run yet" : state);
    say(this.progress, text);
    this.progress.title = text;
  }

  fillState(run) {
    const { live } = run, busy = run.state === "running";
    const steps = `step ${run.step}${run.steps ? ` of ${run.steps}` : ""}`;
    if (!(this.stop.disabled && busy)) this.say(run.state, run.message ? `${steps}: ${run.message}` : steps);
    const words = [];
    if (run.rows.length) words.push(`${run.main} ${figure(run.points(run.rows.slice(-1), "smoothed")[0][1])}`);
    if (busy && live) {
      const left = (live.steps - live.step) * live.seconds_per_step;
      words.push(`${Number(live.seconds_per_step.toPrecision(2))} s/step`, `${duration(left)} left`);
      const [used, total] = [live.memory.used, live.memory.total].map((n) => (n / 2 ** 30).toFixed(1));
      words.push(`memory ${used} of ${total} GB`);
    }
    say(this.pace, words.join(" · "));
    this.pace.title = this.pace.textContent;
  }

  fillChoice(run) {
    const { choices } = run, keys = ["", ...choices.keys()].join();
    if (this.choice.dataset.keys === keys) return;
    const old = this.choice.dataset.keys === undefined ? null : this.choice.value;
    this.choice.replaceChildren(
      el("option", "", { value: "", textContent: "one axis" }),
      ...[...choices].map(([value, textContent]) => el("option", "", { value, textContent })),
    );
    this.choice.dataset.keys = keys;
    const first = ["alignment", "learning_rate"].find((key) => choices.has(key)) ?? "";
    this.choice.value = old !== null && (old === "" || choices.has(old)) ? old : first;
  }

  draw() {
    if (this.run) this.chart.show(this.run.series(this.choice.value));
  }

  /** The slider stays where it was put, or at its end, where new samples come. */
  fillSamples(run, newSample) {
    const last = run.samples.length - 1, atEnd = Number(this.slider.value) >= Number(this.slider.max);
    const moves = this.shown?.id !== run.id || atEnd;
    if (!newSample && this.slider.max === String(last) && this.shown?.id === run.id) return;
    this.slider.max = String(Math.max(0, last));
    if (moves) this.slider.value = String(last);
    this.showSamples();
  }

  showSamples() {
    const sample = this.run?.samples[Number(this.slider.value)];
    if (!sample) return;
    say(this.when, `step ${sample.step}${"alignment" in sample ? `, alignment ${figure(sample.alignment)}` : ""}`);
    if (this.shown?.id === this.run.id && this.shown.grid === sample.grid) return;
    this.shown = { id: this.run.id, grid: sample.grid };
    this.strip.replaceChildren(
      ...sample.files.map((file, i) => {
        const src = sampleURL(this.run.id, file), title = sample.prompts[i] ?? "";
        return el("img", "", { src, title, alt: title, draggable: false, onclick: () => window.open(src, "_blank") });
      }),
    );
  }

  /** Makes room in the node; it never shrinks again by itself. */
  fit(height) {
    if (height === this.height && this.element.style.minHeight) return;
    this.height = height;
    this.element.style.minHeight = `${height}px`;
    const { node } = this, [width, needed] = node.computeSize();
    if (node.size[1] < needed) node.setSize([Math.max(width, node.size[0]), needed]);
    node.graph?.setDirtyCanvas(true, true);
  }
}

/** The node that an execution id such as "5:3" names: node 3 in the subgraph of node 5 of the root graph. */
function nodeAt(id) {
  let graph = app.rootGraph ?? app.graph, node;
  for (const part of String(id).split(":")) {
    node = graph?.nodes.find((found) => String(found.id) === part);
    graph = node?.subgraph;
  }
  return node;
}
