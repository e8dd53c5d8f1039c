// The run in its training node: state, chart, and the samples over time.
import { app } from "../../scripts/app.js";
import { addElement, address, ask, attempt, button, duration, el, figure, fillSelect, gap, growToFit } from "./dom.js";
import { isBroken, isBusy, nodeAt, picture, remark, row, say, sayState, steps, t, words } from "./dom.js";
import { advice } from "./advice.js";
import { LineChart } from "./loss_chart.js";
import { RunData } from "./run_data.js";

const EMPTY = 40, CHART = 270, SAMPLES = 108, MESSAGE = 108, MARGIN = 20; // pixels; the margin is the classic renderer's

export const views = new Set();
export const nameWidget = (node) => node.widgets?.find((widget) => widget.name === "run_name");

export class RunView {
  constructor(node) {
    this.node = node;
    this.run = null; // RunData, once the server has the run
    this.recent = []; // the last steps, which a request may miss
    this.error = null; // a retune.error of the node, until it is queued again
    this.build();
    views.add(this);
    addElement(node, "retune_run_view", this.element, () => this.height + MARGIN);
    this.fill();
    this.load();
  }

  build() {
    this.state = el("span", "state");
    this.progress = el("span", "grow");
    const hint = t("End after this step; the graph goes on.");
    this.end = button(t("Finish now"), hint, () => this.finish());
    this.message = el("div", "message", { tabIndex: 0 });
    this.advice = el("div", "advice");
    this.pace = el("span", "grow quiet");
    this.used = el("div", "used quiet");
    this.choice = el("select", "", { ariaLabel: "Figure on the right axis", onchange: () => this.draw() });
    this.chart = new LineChart("Curves of the run");
    this.strip = el("div", "strip");
    this.slider = el("input", "", { type: "range", min: 0, max: 0, ariaLabel: "Samples over time" });
    this.slider.oninput = () => this.showSamples();
    this.when = el("span", "quiet");
    this.rows = [row(this.pace), this.used, this.chart.element, row(gap(), this.choice, this.chart.scale)];
    this.sampleRows = [this.strip, row(this.slider, this.when)];
    const top = row(this.state, this.progress, this.end);
    const told = [this.message, this.advice];
    this.element = el("div", "root view", {}, top, ...told, ...this.rows, ...this.sampleRows);
  }

  /** The run's name in the node's widget; null where it is linked. */
  get name() {
    const { node } = this, slot = node.findInputSlot("run_name");
    return slot >= 0 && node.isInputConnected(slot) ? null : nameWidget(node)?.value ?? null;
  }

  dispose() {
    views.delete(this);
    clearTimeout(this.waiting);
    this.chart.dispose();
  }

  /** Requests a run soon, and again if called meanwhile. */
  load(id, after = 50) {
    this.again = true;
    if (id && id === this.loading) return;
    clearTimeout(this.waiting);
    this.loading = id;
    const { properties } = this.node;
    if (id) properties.retune_run = id; // finds a linked name after a reload
    const ticket = (this.waiting = setTimeout(async () => {
      this.again = false;
      const wanted = id ?? this.name ?? this.run?.id ?? properties.retune_run;
      const details = wanted ? await attempt(() => ask(address(wanted))) : null;
      if (ticket !== this.waiting || !views.has(this)) return;
      this.loading = null;
      if (details !== undefined) this.run = details && new RunData(details);
      for (const step of this.recent) if (step.run === this.run?.id) this.run.addStep(step);
      this.fill();
      if (this.again) this.load(id);
    }, after));
  }

  /** An event of its run or, where the name is linked, of its node. */
  event(kind, event) {
    const { name, run } = this;
    if (name === null ? nodeAt(event.node) !== this.node : event.run !== name) return;
    this.recent = kind === "state" ? [] : [...this.recent.slice(-300), ...(kind === "step" ? [event] : [])];
    const known = run?.id === event.run;
    if (!known || (kind === "state" && (event.state !== run.state || !event.message))) this.load(event.run);
    else if (kind === "step") run.addStep(event);
    else if (kind === "sample") run.addSample(event);
    if (known && kind === "state") Object.assign(run, { state: event.state, message: event.message });
    if (known) this.fill();
    else if (kind === "state") this.say(event.state, event.message);
  }

  /** An error that ended its node, or what followed from it; null when the queue begins anew. */
  setError(error, undo = null) {
    if (error === this.error) return;
    this.undo?.();
    Object.assign(this, { error, undo });
    const follow = (message, undo) => this.setError({ state: "changed", message }, undo);
    this.advice.replaceChildren(...(error ? advice(this.node, error, follow) : []));
    this.fill();
  }

  queueEnded() {
    if (isBusy(this.run) || this.state.dataset.state === "preparing") this.load(undefined, 300);
  }

  async finish() {
    this.end.disabled = true;
    say(this.progress, t("finishing after this step"));
    this.end.disabled = Boolean(await attempt(() => ask(`${address(this.run.id)}/finish`, "POST")));
  }

  fill() {
    const { run } = this, sampled = run?.samples.length > 0, shown = sampled || run?.rows.length > 0;
    for (const part of this.rows) part.hidden = !shown;
    for (const part of this.sampleRows) part.hidden = !sampled;
    this.end.hidden = run?.state !== "running";
    if (this.end.hidden) this.end.disabled = false;
    const told = this.error?.message ?? (isBroken(run) ? run.message : "");
    say(this.message, told);
    this.message.hidden = !told;
    this.advice.hidden = !this.advice.childElementCount;
    if (this.error) this.say(this.error.state, run ? t("the run has {steps}", { steps: steps(run) }) : "");
    else if (!run) this.say("no run yet", t("its chart and samples will be here"));
    else if (!this.end.disabled) this.say(run.state, [steps(run), told ? "" : remark(run)].filter(Boolean).join(": "));
    this.fit((shown ? CHART : EMPTY) + (sampled ? SAMPLES : 0) + (told ? MESSAGE : 0));
    if (!shown) return;
    say(this.pace, pace(run));
    const used = differences(this.node, run.config);
    say(this.used, used && t("the run has {values}", { values: used }));
    this.used.hidden = !used;
    this.fillChoice(run.choices);
    this.draw();
    this.fillSamples(run);
  }

  say(state, text) {
    sayState(this.state, state);
    say(this.progress, text);
  }

  fillChoice(choices) {
    const { choice } = this, old = choice.length ? choice.value : null, keys = String(choices);
    if (this.keys === keys) return;
    this.keys = keys;
    fillSelect(choice, choices);
    choice.value = [old, "alignment", "learning_rate", ""].find((key) => choices.some(([known]) => known === key));
  }

  draw() {
    this.chart.show(this.run.series(this.choice.value));
  }

  /** The slider stays where it is, or at its end. */
  fillSamples({ id, samples }) {
    const { slider } = this, last = String(samples.length - 1), follows = slider.value === slider.max;
    slider.max = last;
    if (follows || this.shown !== id) slider.value = last;
    this.shown = id;
    this.showSamples();
  }

  showSamples() {
    const { run } = this, sample = run.samples[Number(this.slider.value)];
    if (!sample) return;
    say(this.when, `step ${sample.step}${sample.alignment == null ? "" : `, alignment ${figure(sample.alignment)}`}`);
    const { children } = this.strip, image = (i) => children[i] ?? this.strip.appendChild(el("img"));
    sample.files.forEach((file, i) => picture(image(i), run, file, sample.prompts[i]));
    while (children.length > sample.files.length) children[sample.files.length].remove();
  }

  fit(height) {
    if (height === this.height) return;
    this.height = height;
    this.element.style.minHeight = `${height}px`;
    growToFit(this.node);
  }
}

/** Values of a run that differ from those in its node, such as a preset's through the API: "rank 32, alpha 16". */
function differences(node, config) {
  const ignored = ["run_name", "steps", "resume"];
  const differ = ({ name, value }) => {
    const before = config?.[name], slot = node.findInputSlot(name);
    if (ignored.includes(name) || before == null || typeof before === "object" || before === value) return false;
    return slot < 0 || !node.isInputConnected(slot);
  };
  return (node.widgets ?? []).filter(differ).map(({ name }) => `${words(name)} ${config[name]}`).join(", ");
}

function pace(run) {
  const { live, state } = run, [now, average] = ["loss", "smoothed"].map((key) => run.points(run.rows.slice(-1), key)[0]);
  const found = [now && `${t(run.main)} ${figure(now[1])}`, average && `${t("average")} ${figure(average[1])}`];
  found.splice(0, 2, found.filter(Boolean).join(", "));
  if (!live || state !== "running") return found.join();
  const [used, total] = [live.memory.used, live.memory.total].map((n) => (n / 2 ** 30).toFixed(1));
  found.push(t("{pace} s/step", { pace: Number(live.seconds_per_step.toPrecision(2)) }));
  found.push(t("{time} left", { time: duration((live.steps - live.step) * live.seconds_per_step) }));
  found.push(t("{used} of {total} GB", { used, total }));
  return found.join(" · ");
}
