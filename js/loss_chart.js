// Curves on a canvas: two y axes, linear or log, values under the pointer. Drawn only after changes.
import { button, el, figure } from "./dom.js";

const TOP = 18, BOTTOM = 20, SIDE = 44; // margins in CSS pixels
const charts = new Set();

// The theme is a class and style of the page.
const palette = new MutationObserver(() => charts.forEach((chart) => chart.redraw()));
for (const page of [document.documentElement, document.body])
  palette.observe(page, { attributeFilter: ["class", "style"] });

/**
 * Shows series {name, colour (or CSS variable), points: [[step, value], ...]}; also faint (outliers do not set the
 * limits), dots, right (axis), listed (only under the pointer), legend (false: no name above the chart).
 */
export class LineChart {
  constructor(ariaLabel) {
    this.canvas = el("canvas");
    this.tip = el("div", "tip", { hidden: true });
    this.element = el("div", "plot", { role: "img", ariaLabel }, this.canvas, this.tip);
    this.scale = button("linear", "Scale of the left axis", () => {
      this.log = !this.log;
      this.scale.textContent = this.log ? "log" : "linear";
      this.redraw();
    });
    this.series = [];
    this.hover = null;
    this.observer = new ResizeObserver(() => this.redraw());
    this.observer.observe(this.element);
    this.canvas.onpointermove = (event) => this.point(event.offsetX);
    this.canvas.onpointerleave = () => this.point(null);
    charts.add(this);
  }

  show(series) {
    this.series = series.filter((s) => s.points.length);
    this.redraw();
  }

  dispose() {
    this.observer.disconnect();
    charts.delete(this);
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.draw();
    });
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!width || !height) return;
    const c = this.canvas.getContext("2d"), ratio = Math.max(2, devicePixelRatio); // nodes may be shown enlarged
    Object.assign(this.canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    c.scale(ratio, ratio);
    c.font = "11px system-ui, sans-serif";
    this.style = getComputedStyle(this.element);
    const drawn = this.series.filter((s) => !s.listed), right = drawn.filter((s) => s.right);
    const box = { left: SIDE, top: TOP, right: width - (right.length ? SIDE : 10), bottom: height - BOTTOM };
    this.x = scale(0, Math.max(1, ...drawn.map((s) => s.points.at(-1)[0])), box.left, box.right);
    if (!drawn.length) return;
    const y = [drawn.filter((s) => !s.right), right].map((s, i) => yScale(s, this.log && !i, box));
    this.drawAxes(c, box, drawn, y);
    c.save();
    c.beginPath();
    c.rect(box.left, box.top - 3, box.right - box.left, box.bottom - box.top + 6);
    c.clip();
    for (const series of drawn) this.drawLine(c, series, y[series.right ? 1 : 0]);
    c.restore();
    if (this.hover === null) return;
    c.strokeStyle = this.colour("--retune-quiet");
    c.lineWidth = 1;
    line(c, [[this.x(this.hover), box.top], [this.x(this.hover), box.bottom]]);
  }

  drawAxes(c, box, drawn, [leftY, rightY]) {
    const write = (text, x, y, colour, textAlign, textBaseline) =>
      Object.assign(c, { fillStyle: this.colour(colour), textAlign, textBaseline }).fillText(text, x, y);
    const quiet = "--retune-quiet", right = drawn.find((s) => s.right), below = box.bottom + 6;
    c.strokeStyle = this.colour("--retune-grid");
    for (const value of leftY.ticks) {
      line(c, [[box.left, leftY(value)], [box.right, leftY(value)]]);
      write(figure(value), box.left - 6, leftY(value), quiet, "right", "middle");
    }
    for (const step of ticks(0, this.x.high, Math.max(2, (box.right - box.left) / 70)))
      if (step % 1 === 0) write(String(step), this.x(step), below, quiet, "center", "top");
    write("step", box.left - 10, below, quiet, "right", "top");
    let across = 4;
    for (const { name, colour } of drawn.filter((s) => !s.right && s.legend !== false)) {
      write(name, across, 1, colour, "left", "top");
      across += c.measureText(name).width + 9;
    }
    if (!right) return;
    for (const value of rightY.ticks) write(figure(value), box.right + 5, rightY(value), right.colour, "left", "middle");
    write(right.name, box.right + SIDE - 4, 1, right.colour, "right", "top");
  }

  drawLine(c, { points, colour, faint, dots }, y) {
    const placed = points.map(([step, value]) => [this.x(step), y(value)]).filter((p) => Number.isFinite(p[1]));
    c.strokeStyle = c.fillStyle = this.colour(colour);
    c.lineWidth = faint ? 1 : 2;
    c.lineJoin = "round";
    line(c, placed);
    if (!dots && placed.length > 1) return;
    for (const [x, height] of placed) {
      c.beginPath();
      c.arc(x, height, 2.5, 0, 7);
      c.fill();
    }
  }

  /** x: of the pointer; null when it is elsewhere. */
  point(x) {
    const step = x === null || !this.x ? null : this.nearest(this.x.back(x));
    if (step === this.hover) return;
    this.hover = step;
    this.tip.hidden = step === null;
    if (step !== null) this.fillTip(step);
    this.redraw();
  }

  nearest(step) {
    const near = this.series.flatMap(({ points }) => points.slice(Math.max(0, until(points, step) - 1)).slice(0, 2));
    return near.map((point) => point[0]).sort((a, b) => Math.abs(a - step) - Math.abs(b - step))[0] ?? null;
  }

  fillTip(step) {
    this.tip.replaceChildren(el("b", "", { textContent: `step ${step}` }));
    for (const { name, points, colour } of this.series) {
      const found = points[until(points, step) - 1];
      if (!found) continue;
      const textContent = `${name} ${figure(found[1])}${found[0] === step ? "" : ` (step ${found[0]})`}`;
      const entry = el("div", "key", { textContent });
      entry.style.setProperty("--key", this.colour(colour));
      this.tip.append(entry);
    }
    const sides = this.x(step) < this.element.clientWidth / 2 ? ["auto", "8px"] : ["8px", "auto"];
    [this.tip.style.left, this.tip.style.right] = sides;
  }

  colour(name) {
    return this.style.getPropertyValue(name) || name;
  }
}

/** The number of points up to and with this step. */
function until(points, step) {
  return points.findLastIndex((point) => point[0] <= step) + 1;
}

function line(c, points) {
  c.beginPath();
  for (const [x, y] of points) c.lineTo(x, y);
  c.stroke();
}

function scale(low, high, from, to) {
  const place = (value) => from + ((value - low) / (high - low)) * (to - from);
  return Object.assign(place, { high, back: (pixel) => low + ((pixel - from) / (to - from)) * (high - low) });
}

/** value -> height, with `ticks`; log only where all values are above 0. */
function yScale(series, log, box) {
  let [low, high] = limits(series);
  const count = Math.max(2, (box.bottom - box.top) / 34), isLog = log && low > 0, to = isLog ? Math.log10 : (v) => v;
  if (!isLog && low > 0 && (low < 0.6 * high || high - low < 1e-6 * high)) low = 0;
  const margin = Math.max(0.06 * (to(high) - to(low)), 1e-6 * (isLog || Math.abs(high))) || 0.1;
  [low, high] = [low === 0 ? 0 : to(low) - margin, to(high) + margin];
  const linear = scale(low, high, box.bottom, box.top);
  return Object.assign((v) => linear(to(v)), { ticks: (isLog ? logTicks : ticks)(low, high, count) });
}

/** Lowest and highest value; faint series without 2 % at each end. */
function limits(series) {
  const ends = series.flatMap(({ points, faint }) => {
    const values = points.map((p) => p[1]).sort((a, b) => a - b), cut = faint ? Math.floor(values.length / 50) : 0;
    return [values[cut], values.at(-1 - cut)];
  });
  return ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const spacing = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const first = Math.ceil(low / spacing), length = Math.floor(high / spacing) - first + 1;
  return Array.from({ length }, (_, i) => Number(((first + i) * spacing).toPrecision(12)));
}

function logTicks(low, high, count) {
  const values = [];
  for (let e = Math.floor(low); e <= high; e++)
    for (const m of high - low > count / 2 ? [1] : [1, 2, 5]) values.push(Number(`${m}e${e}`));
  const inside = values.filter((value) => value >= 10 ** low && value <= 10 ** high);
  return inside.length > 2 ? inside : ticks(10 ** low, 10 ** high, count);
}
