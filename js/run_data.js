// What is known of one run: the server's answer for it, and the events that came since.

const POINTS = 2400; // more steps than this are thinned: a chart is some hundred pixels wide
const NOT_SHOWN = new Set(["step", "steps", "epoch", "loss", "smoothed", "seconds_per_step"]);
const words = (key) => key.replaceAll("_", " ");
const numbers = (row) => Object.keys(row ?? {}).filter((k) => typeof row[k] === "number" && !NOT_SHOWN.has(k));

export class RunData {
  /** @param details the answer of GET /retune/runs/{id} */
  constructor(details) {
    Object.assign(this, details);
    const last = this.rows.at(-1);
    this.average = last ? last.smoothed * (1 - this.smoothing ** this.count) : 0;
  }

  /** A retune.step event. A step that was there before begins the rest anew: a run went back to its last state. */
  addStep({ node, run, validation, ...row }) {
    this.cut(row.step - 1);
    this.count += 1;
    this.average = this.smoothing * this.average + (1 - this.smoothing) * row.loss;
    row.smoothed = this.average / (1 - this.smoothing ** this.count);
    this.rows.push(row);
    this.validation.push(...(validation ?? []));
    Object.assign(this, { live: row, state: "running", message: "", step: row.step, steps: row.steps, loss: row.loss });
    if (this.rows.length > POINTS) this.rows = this.rows.filter((_, i) => i % 2 || i > POINTS - 200);
  }

  addSample({ node, run, ...row }) {
    this.samples = [...this.samples.filter((s) => s.step < row.step), row];
  }

  setState({ state, step, message }) {
    if (state === "running" && !message) this.cut(step);
    Object.assign(this, { state, message });
  }

  cut(step) {
    if (!this.rows.length || this.rows.at(-1).step <= step) return;
    const before = (rows) => rows.filter((row) => row.step <= step);
    this.rows = before(this.rows);
    this.validation = before(this.validation);
    this.samples = before(this.samples);
    this.count = this.rows.length ? step : 0;
    this.average = this.count ? this.rows.at(-1).smoothed * (1 - this.smoothing ** this.count) : 0;
  }

  /** The loss of a reward tuning is minus its reward. */
  get main() {
    return this.rows.at(-1) && "reward" in this.rows.at(-1) ? "reward" : "loss";
  }

  /** Names of further figures, of steps, validations and samples, with the list that holds each. */
  get figures() {
    const found = new Map();
    for (const rows of [this.samples, this.validation, this.rows])
      for (const key of numbers(rows.at(-1))) if (key !== this.main) found.set(key, rows);
    return found;
  }

  points(rows, key) {
    const sign = this.main === "reward" && (key === "loss" || key === "smoothed") ? -1 : 1;
    return rows.filter((row) => Number.isFinite(row[key])).map((row) => [row.step, sign * row[key]]);
  }

  /** Series for a chart with this figure on the right axis ("" for none). */
  series(right) {
    const main = this.main, { figures } = this;
    const found = [
      { name: main, colour: "--retune-raw", faint: true, points: this.points(this.rows, "loss") },
      { name: "smoothed", colour: "--retune-smooth", points: this.points(this.rows, "smoothed") },
      { name: "validation", colour: "--retune-validation", dots: true, points: this.points(this.validation, "loss") },
    ];
    for (const key of new Set([right, "learning_rate", "alignment"])) {
      const rows = figures.get(key);
      if (!rows) continue;
      const more = { right: true, dots: rows !== this.rows, listed: key !== right };
      found.push({ name: words(key), colour: "--retune-right", points: this.points(rows, key), ...more });
    }
    return found;
  }

  /** Choices for the right axis: key -> words. */
  get choices() {
    const order = ["alignment", "learning_rate"], keys = [...this.figures.keys()];
    keys.sort((a, b) => (order.indexOf(b) - order.indexOf(a)) || a.localeCompare(b));
    return new Map(keys.map((key) => [key, words(key)]));
  }
}
