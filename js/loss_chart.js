// Lines on a canvas: two y axes, linear or log, values under the pointer. It draws only when something has changed.
import { el, figure, say } from "./dom.js";

const SHARP = 2; // canvas pixels per CSS pixel at least: nodes are looked at enlarged
const TOP = 18, BOTTOM = 20, SIDE = 44;
const charts = new Set();

// A changed palette is a changed style or class of the page itself.
const palette = new MutationObserver(() => charts.forEach((chart) => chart.redraw()));
for (const page of [document.documentElement, document.body])
  palette.observe(page, { attributes: true, attributeFilter: ["class", "style"] });

/**
 * A series is {name, colour, points: [[step, value], ...]}, colour being a CSS variable or colour; also
 * faint (thin, and its outliers do not set the limits), dots, right (on the right axis), listed (only under the pointer),
 * legend (whether its name stands above the chart).
 */
export class LineChart {
  constructor(label) {
    this.canvas = el("canvas");
    this.tip = el("div", "retune-tip", { hidden: true });
    this.element = el("div", "retune-plot", { role: "img", ariaLabel: label }, this.canvas, this.tip);
    this.series = [];
    this.log = false;
    this.hover = null;
    this.observer = new ResizeObserver(() => this.redraw());
    this.observer.observe(this.element);
    this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    charts.add(this);
  }

  show(series, log = this.log) {
    this.series = series.filter((s) => s.points.length);
    this.log = log;
    this.redraw();
  }

  dispose() {
    this.observer.disconnect();
    cancelAnimationFrame(this.frame);
    charts.delete(this);
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.draw();
    });
  }

  draw() {
    const width = this.element.clientWidth, height = this.element.clientHeight;
    if (!width || !height) return;
    const ratio = Math.max(SHARP, window.devicePixelRatio || 1), context = this.canvas.getContext("2d");
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif";
    this.style = getComputedStyle(this.element);
    const drawn = this.series.filter((s) => !s.listed), left = drawn.filter((s) => !s.right);
    const right = drawn.filter((s) => s.right);
    this.box = { left: SIDE, top: TOP, right: width - (right.length ? SIDE : 10), bottom: height - BOTTOM };
    const last = Math.max(1, ...drawn.map((s) => s.points.at(-1)[0]));
    this.x = scale(0, last, this.box.left, this.box.right);
    if (drawn.length) this.drawAxes(context, left, right);
    context.save();
    context.beginPath();
    context.rect(this.box.left, this.box.top - 3, this.box.right - this.box.left, this.box.bottom - this.box.top + 6);
    context.clip();
    for (const series of drawn) this.drawLine(context, series, series.right ? this.rightY : this.leftY);
    context.restore();
    if (this.hover !== null) this.drawCursor(context);
  }

  drawAxes(context, left, right) {
    const { box } = this, quiet = this.colour("--retune-quiet");
    this.leftY = yScale(left, this.log, box);
    this.rightY = yScale(right, false, box);
    context.lineWidth = 1;
    context.strokeStyle = this.colour("--retune-grid");
    context.fillStyle = quiet;
    context.textAlign = "right";
    context.textBaseline = "middle";
    if (left.length)
      for (const value of this.leftY.ticks) {
        const y = Math.round(this.leftY(value)) + 0.5;
        line(context, [[box.left, y], [box.right, y]]);
        context.fillText(figure(value), box.left - 6, y);
      }
    context.textBaseline = "top";
    context.textAlign = "center";
    for (const step of ticks(0, this.x.high, Math.max(2, Math.floor((box.right - box.left) / 70)))) {
      if (step % 1) continue;
      line(context, [[this.x(step), box.bottom], [this.x(step), box.bottom + 4]]);
      context.fillText(String(step), this.x(step), box.bottom + 6);
    }
    context.textAlign = "right";
    context.fillText("step", box.left - 6, box.bottom + 6);
    context.textAlign = "left";
    let across = 4;
    for (const { name, colour, legend = true } of left) {
      if (!legend) continue;
      context.fillStyle = this.colour(colour);
      context.fillText(name, across, 1);
      across += context.measureText(name).width + 9;
    }
    if (!right.length) return;
    context.fillStyle = this.colour(right[0].colour);
    context.textBaseline = "middle";
    for (const value of this.rightY.ticks) context.fillText(figure(value), box.right + 5, this.rightY(value));
    context.textBaseline = "top";
    context.textAlign = "right";
    context.fillText(right[0].name, box.right + SIDE - 4, 1);
  }

  drawLine(context, { points, colour, faint, dots, right }, y) {
    const placed = points.filter((p) => Number.isFinite(y(p[1]))).map((p) => [this.x(p[0]), y(p[1])]);
    context.strokeStyle = context.fillStyle = this.colour(colour);
    context.lineWidth = faint ? 1 : right ? 1.5 : 2;
    context.lineJoin = "round";
    line(context, placed);
    if (dots || placed.length === 1)
      for (const [px, py] of placed) {
        context.beginPath();
        context.arc(px, py, 2.5, 0, 7);
        context.fill();
      }
  }

  drawCursor(context) {
    const x = Math.round(this.x(this.hover)) + 0.5;
    context.strokeStyle = this.colour("--retune-quiet");
    context.lineWidth = 1;
    line(context, [[x, this.box.top], [x, this.box.bottom]]);
  }

  /** The pointer is at this place across, or away: shows the values of the nearest step. */
  point(x) {
    const nearest = x === null || !this.x || !this.series.length ? null : this.nearestStep(this.x.back(x));
    if (nearest === this.hover) return;
    this.hover = nearest;
    this.tip.hidden = nearest === null;
    if (nearest !== null) this.fillTip(nearest);
    this.redraw();
  }

  nearestStep(step) {
    let best = null;
    for (const { points } of this.series) {
      const i = after(points, step);
      for (const found of [points[i - 1], points[i]])
        if (found && (best === null || Math.abs(found[0] - step) < Math.abs(best - step))) best = found[0];
    }
    return best;
  }

  fillTip(step) {
    const rows = [el("b", "", { textContent: `step ${step}` })];
    for (const { name, points, colour } of this.series) {
      const found = points[after(points, step) - 1];
      if (!found) continue;
      const row = el("div", "retune-key");
      row.style.setProperty("--key", this.colour(colour));
      say(row, `${name} ${figure(found[1])}${found[0] === step ? "" : ` (step ${found[0]})`}`);
      rows.push(row);
    }
    this.tip.replaceChildren(...rows);
    const across = this.x(step), half = this.element.clientWidth / 2;
    this.tip.style.left = across < half ? `${across + 8}px` : "";
    this.tip.style.right = across < half ? "" : `${2 * half - across + 8}px`;
  }

  colour(name) {
    return (name.startsWith("--") && this.style.getPropertyValue(name)) || name;
  }
}

/** The number of points, sorted by step, up to and with this step. */
function after(points, step) {
  let low = 0, high = points.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle + 1;
    else high = middle;
  }
  return low;
}

function line(context, points) {
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.stroke();
}

function scale(low, high, from, to) {
  const place = (value) => from + ((value - low) / (high - low)) * (to - from);
  place.back = (pixel) => low + ((pixel - from) / (to - from)) * (high - low);
  place.high = high;
  return place;
}

/** Value -> height, with `ticks`; log only where every value is above 0. */
function yScale(series, log, box) {
  let [low, high] = limits(series);
  log = log && low > 0;
  const count = Math.max(2, Math.floor((box.bottom - box.top) / 34));
  if (!log && low > 0 && (low < 0.6 * high || low === high)) low = 0;
  const room = (log ? Math.log10(high / low) : high - low) * 0.06 || (log ? 0.1 : Math.abs(high) || 1);
  if (log) [low, high] = [Math.log10(low) - room, Math.log10(high) + room];
  else [low, high] = [low === 0 ? 0 : low - room, high + room];
  const linear = scale(low, high, box.bottom, box.top), place = (v) => linear(log ? Math.log10(v) : v);
  place.ticks = log ? logTicks(low, high, count) : ticks(low, high, count);
  return place;
}

/** Lowest and highest value; of faint series without the outermost fiftieth at each end. */
function limits(series) {
  const shown = series.flatMap(({ points, faint }) => {
    const values = points.map((p) => p[1]).filter(Number.isFinite).sort((a, b) => a - b);
    const cut = faint ? Math.floor(values.length / 50) : 0;
    return values.length ? [values[cut], values.at(-1 - cut)] : [];
  });
  return shown.length ? [Math.min(...shown), Math.max(...shown)] : [0, 1];
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + 1e-9 * step; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

function logTicks(low, high, count) {
  const found = [];
  for (let e = Math.floor(low); e <= high; e++)
    for (const m of high - low > count / 2 ? [1] : [1, 2, 5])
      if (Math.log10(m) + e >= low && Math.log10(m) + e <= high) found.push(Number(`${m}e${e}`));
  return found.length > 2 ? found : ticks(10 ** low, 10 ** high, count).filter((v) => v > 0);
}
