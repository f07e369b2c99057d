// A chart of curves over the samples seen: a value under the pointer or the arrow keys, a zoom that all charts share,
// a logarithmic axis, and marks where the training was requeued, rewound or stood still.

import { element, plain, short, svg } from "./common.js";

const HEIGHT = 220;
const [LEFT, RIGHT, TOP, BOTTOM] = [46, 8, 8, 26];
const SMOOTH_FROM = 60; // points
const LOG_FROM = 8; // highest / lowest

export class Chart {
  /** `zoom(low, high)` is called with the samples at the edges that were chosen, or with nothing to see all. */
  constructor(title, zoom) {
    this.title = title;
    this.zoom = zoom;
    this.series = [];
    this.hidden = new Set();
    this.log = null; // chosen by the values until someone chooses
    this.cursor = null;
    this.readout = element("span", { "aria-live": "polite" });
    this.scale = element("button", { type: "button", class: "plain", onclick: () => this.toggleScale() }, "log");
    this.legend = element("p", { class: "legend" });
    this.plot = element("div", {
      class: "plot", tabindex: "0", role: "group",
      onkeydown: (event) => this.key(event), onblur: () => this.read(null),
      onpointermove: (event) => this.move(event), onpointerleave: () => this.dragged === undefined && this.read(null),
      onpointerdown: (event) => this.press(event), onpointerup: (event) => this.release(event),
      onpointercancel: () => { this.dragged = undefined; this.draw(); }, ondblclick: () => this.zoom(),
    });
    this.figure = element("figure", {}, element("figcaption", {}, element("b", {}, title), this.readout, this.scale), this.plot, this.legend);
    this.width = 0;
    new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (width === this.width) return;
      this.width = width;
      this.draw();
    }).observe(this.plot);
  }

  /** Show curves: [{label, x, y, dots}], marks and gaps [{samples, text}], within [low, high], or all of them. */
  show(series, marks, range, smooth) {
    Object.assign(this, { series, marks, range, smooth });
    this.draw();
  }

  toggleScale() {
    this.log = !this.isLog();
    this.draw();
  }

  isLog() {
    const { low, high } = this.extent();
    return low > 0 && (this.log ?? high / low >= LOG_FROM);
  }

  shown() {
    return this.series.filter(({ label }) => !this.hidden.has(label));
  }

  bounds() {
    if (this.range) return this.range;
    let [low, high] = [Infinity, -Infinity];
    for (const { x } of this.series) [low, high] = [Math.min(low, x[0]), Math.max(high, x.at(-1))];
    return low < high ? [low, high] : [low - 1, high + 1];
  }

  extent() {
    const [from, to] = this.bounds();
    let [low, high] = [Infinity, -Infinity];
    for (const { x, y } of this.shown()) {
      for (let n = 0; n < y.length; n += 1) {
        if (x[n] < from || x[n] > to) continue;
        if (y[n] < low) low = y[n];
        if (y[n] > high) high = y[n];
      }
    }
    return low <= high ? { low, high } : { low: 0, high: 1 };
  }

  draw() {
    if (!this.width || !this.series.length) return;
    const log = this.isLog();
    const { low, high } = this.extent();
    const margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 0.5;
    const [bottom, top] = log ? [low / 1.08, high * 1.08] : [low - margin, high + margin];
    const [from, to] = this.bounds();
    const of = log ? Math.log : (value) => value;
    this.placeX = (value) => LEFT + ((value - from) / (to - from)) * (this.width - LEFT - RIGHT);
    this.placeY = (value) => HEIGHT - BOTTOM - ((of(value) - of(bottom)) / (of(top) - of(bottom))) * (HEIGHT - TOP - BOTTOM);
    this.valueX = (place) => from + ((place - LEFT) / (this.width - LEFT - RIGHT)) * (to - from);
    const clip = `clip-${Chart.count = (Chart.count ?? 0) + 1}`;
    this.overlay = svg("g", {});
    this.picture = svg("svg", { viewBox: `0 0 ${this.width} ${HEIGHT}`, role: "img", "aria-label": this.summary() },
      svg("clipPath", { id: clip }, svg("rect", { x: LEFT, y: 0, width: Math.max(1, this.width - LEFT - RIGHT), height: HEIGHT - BOTTOM })),
      ...this.grid(bottom, top, log), svg("g", { "clip-path": `url(#${clip})` }, ...this.marked(), ...this.lines()), this.overlay);
    this.plot.replaceChildren(this.picture);
    this.plot.setAttribute("aria-label", `${this.title}: chart. Arrow keys read values.`);
    this.scale.setAttribute("aria-pressed", String(log));
    this.scale.disabled = low <= 0;
    this.drawLegend();
    if (this.cursor !== null) this.read(this.cursor, false);
  }

  summary() {
    return `${this.title}: ${this.shown().map(({ label, y }) => `${label} ${plain(y.at(-1), 4)}`).slice(0, 8).join(", ")}`;
  }

  grid(bottom, top, log) {
    const parts = [];
    for (const tick of ticks(bottom, top, 4, log)) {
      const y = this.placeY(tick).toFixed(1);
      parts.push(svg("line", { x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y, class: "grid" }), svg("text", { x: LEFT - 7, y, class: "y" }, short(tick)));
    }
    const [from, to] = this.bounds();
    for (const tick of ticks(from, to, Math.max(2, this.width / 75), false)) {
      parts.push(svg("text", { x: this.placeX(tick).toFixed(1), y: HEIGHT - 8, class: "x" }, short(tick)));
    }
    return parts;
  }

  marked() {
    return (this.marks ?? []).map(({ samples, text, kind }) => {
      const x = this.placeX(samples).toFixed(1);
      return svg("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM, class: `mark ${kind}` }, svg("title", {}, text));
    });
  }

  lines() {
    const shown = this.shown();
    return shown.flatMap((each) => {
      const place = (values) => values.map((value, n) => `${this.placeX(each.x[n]).toFixed(1)},${this.placeY(value).toFixed(1)}`).join(" ");
      const colour = this.colour(each);
      const isSmoothed = this.smooth && !each.dots && each.y.length >= SMOOTH_FROM && shown.length <= 3;
      const parts = [coloured(svg("polyline", { points: place(each.y), class: isSmoothed ? "curve faint" : "curve" }), colour)];
      if (isSmoothed) parts.push(coloured(svg("polyline", { points: place(smoothed(each.y)), class: "curve strong" }), colour));
      if (each.y.length === 1 || (each.dots && each.y.length < this.width / 8)) {
        parts.push(...each.y.map((value, n) => coloured(svg("circle", { cx: this.placeX(each.x[n]).toFixed(1), cy: this.placeY(value).toFixed(1), r: 2.5 }), colour)));
      }
      return parts;
    });
  }

  /** Curves that are ordered, such as of noise levels, go through the colours in order. */
  colour(each) {
    const at = this.series.indexOf(each);
    if (this.series.length > 3) return `hsl(${265 + (130 * at) / (this.series.length - 1)} 62% var(--light))`;
    return ["var(--accent)", "var(--second)", "var(--third)"][at];
  }

  drawLegend() {
    const labels = this.series.map(({ label }) => label);
    const state = JSON.stringify([labels, [...this.hidden]]);
    if (this.legend.shown === state) return;
    this.legend.shown = state;
    this.legend.hidden = labels.length < 2;
    this.legend.replaceChildren(...this.series.map((each) => coloured(element("button", {
      type: "button", "aria-pressed": String(!this.hidden.has(each.label)),
      onclick: () => { this.hidden.delete(each.label) || this.hidden.add(each.label); this.draw(); this.legend.querySelectorAll("button")[labels.indexOf(each.label)].focus(); },
    }, each.label), this.colour(each))));
  }

  /** Show the values nearest to a number of samples; null: none. */
  read(samples, speak = true) {
    this.cursor = samples;
    if (!this.overlay) return;
    if (samples === null || !this.shown().length) {
      this.overlay.replaceChildren();
      this.readout.textContent = "";
      return;
    }
    const found = this.shown().map((each) => ({ each, n: nearest(each.x, samples) }));
    const best = found.reduce((a, b) => (Math.abs(b.each.x[b.n] - samples) < Math.abs(a.each.x[a.n] - samples) ? b : a));
    const at = best.each.x[best.n];
    const x = this.placeX(at).toFixed(1);
    this.overlay.replaceChildren(svg("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor" }),
      ...found.map(({ each, n }) => coloured(svg("circle", { cx: this.placeX(each.x[n]).toFixed(1), cy: this.placeY(each.y[n]).toFixed(1), r: 3.5 }), this.colour(each))));
    if (this.dragged !== undefined) {
      const [a, b] = [this.placeX(this.dragged), this.placeX(samples)].sort((p, q) => p - q);
      this.overlay.append(svg("rect", { x: a, width: b - a, y: TOP, height: HEIGHT - TOP - BOTTOM, class: "chosen" }));
    }
    const values = found.length > 3 ? found.filter(({ each }) => each === best.each) : found;
    if (speak || this.readout.textContent) {
      this.readout.textContent = `${short(at)}: ${values.map(({ each, n }) => (found.length > 1 ? `${each.label} ` : "") + plain(each.y[n])).join(" · ")}`;
    }
  }

  place(event) {
    return event.clientX - this.plot.getBoundingClientRect().left;
  }

  move(event) {
    this.read(this.valueX(this.place(event)));
  }

  press(event) {
    if (event.button !== 0 || event.pointerType === "touch") return;
    this.dragged = this.valueX(this.place(event));
    this.plot.setPointerCapture(event.pointerId);
  }

  release(event) {
    if (this.dragged === undefined) return;
    const [begin, end] = [this.dragged, this.valueX(this.place(event))];
    this.dragged = undefined;
    if (Math.abs(this.placeX(begin) - this.placeX(end)) > 8) this.zoom(...[begin, end].sort((a, b) => a - b));
    else this.draw();
  }

  key(event) {
    const [low, high] = this.bounds();
    const longest = this.shown().reduce((a, b) => (b.x.length > a.x.length ? b : a), { x: [low, high] }).x;
    const at = this.cursor === null ? longest.length - 1 : nearest(longest, this.cursor);
    const step = event.shiftKey ? 10 : 1;
    const middle = this.cursor ?? (low + high) / 2;
    const near = (share) => this.zoom(middle - share * (middle - low), middle + share * (high - middle));
    const actions = {
      ArrowLeft: () => this.read(longest[Math.max(0, at - step)]),
      ArrowRight: () => this.read(longest[Math.min(longest.length - 1, at + step)]),
      Home: () => this.read(longest[0]),
      End: () => this.read(longest.at(-1)),
      "+": () => near(0.5),
      "=": () => near(0.5),
      "-": () => near(2),
      0: () => this.zoom(),
      Escape: () => this.zoom(),
      l: () => this.toggleScale(),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  }
}

function coloured(part, colour) {
  part.style.setProperty("--line", colour);
  return part;
}

function nearest(x, wanted) {
  let [low, high] = [0, x.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= wanted) low = middle;
    else high = middle;
  }
  return Math.abs(x[low] - wanted) <= Math.abs(x[high] - wanted) ? low : high;
}

/** An exponential moving average over about a fiftieth of the curve, corrected for its start. */
function smoothed(values) {
  const keep = 1 - 1 / Math.max(1, values.length / 50);
  let [total, weight] = [0, 0];
  return values.map((value) => {
    [total, weight] = [keep * total + value, keep * weight + 1];
    return total / weight;
  });
}

/** About `count` round values between two ends. */
function ticks(low, high, count, log) {
  if (log && high / low >= 4) {
    const found = [];
    const steps = high / low < 200 ? [1, 2, 5] : [1];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade += 1) {
      found.push(...steps.map((step) => step * 10 ** decade));
    }
    return found.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / count;
  const decade = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * decade >= rough * 0.999) * decade;
  const found = [];
  for (let n = Math.ceil(low / step); n <= high / step; n += 1) found.push(n * step);
  return found;
}
