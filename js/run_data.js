// A run's data from the server and from events since.
import { words } from "./dom.js";

const POINTS = 2400; // more steps are thinned

export class RunData {
  constructor(details) {
    Object.assign(this, details);
    this.average = this.rows.length ? this.rows.at(-1).smoothed * (1 - this.smoothing ** this.count) : 0;
  }

  /** A retune.step event, unless the step is here already. */
  addStep({ validation, ...row }) {
    if (row.step <= (this.rows.at(-1)?.step ?? 0)) return;
    this.count += 1;
    this.average = this.smoothing * this.average + (1 - this.smoothing) * row.loss;
    row.smoothed = this.average / (1 - this.smoothing ** this.count);
    this.rows.push(row);
    if (this.rows.length > POINTS) this.rows = this.rows.filter((_, i) => i % 2 || i > POINTS - 200);
    this.validation.push(...validation);
    Object.assign(this, { live: row, state: "running", message: "", step: row.step, steps: row.steps });
  }

  addSample(row) {
    this.samples = [...this.samples.filter((s) => s.step < row.step), row];
  }

  /** The loss of a reward tuning is minus its reward. */
  get main() {
    return "reward" in (this.rows.at(-1) ?? {}) ? "reward" : "loss";
  }

  /** Further figures, of steps, validations and samples: name -> the rows that hold it. */
  get figures() {
    const found = new Map(), ignored = ["step", "steps", "epoch", "loss", "smoothed", "seconds_per_step", this.main];
    for (const rows of [this.rows, this.validation, this.samples])
      for (const [key, value] of Object.entries(rows.at(-1) ?? {}))
        if (typeof value === "number" && !ignored.includes(key) && !found.has(key)) found.set(key, rows);
    return found;
  }

  points(rows, key) {
    const sign = this.main === "reward" && ["loss", "smoothed"].includes(key) ? -1 : 1;
    return rows.filter((row) => Number.isFinite(row[key])).map((row) => [row.step, sign * row[key]]);
  }

  /** Series for a chart with this figure on the right axis ("" for none). */
  series(right) {
    const { figures, rows, validation } = this;
    const found = [
      { name: this.main, colour: "--retune-raw", faint: true, points: this.points(rows, "loss") },
      { name: "average", colour: "--retune-smooth", points: this.points(rows, "smoothed") },
      { name: "validation", colour: "--retune-validation", dots: true, points: this.points(validation, "loss") },
    ];
    for (const key of new Set([right, "learning_rate", "alignment"])) {
      if (!figures.has(key)) continue;
      const about = { right: true, listed: key !== right, dots: figures.get(key) !== rows };
      found.push({ name: words(key), colour: "--retune-right", points: this.points(figures.get(key), key), ...about });
    }
    return found;
  }

  get choices() {
    return [["", "one axis"], ...[...this.figures.keys()].sort().map((key) => [key, words(key)])];
  }
}
