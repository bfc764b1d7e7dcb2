// A line chart in SVG, drawn anew at the size that its element has.

import { element } from "./util.js";

const MARGIN = { left: 62, right: 14, top: 10, bottom: 38 };
const HEIGHT = 260;

// About `count` round numbers from low to high: steps of 1, 2 or 5 times a power of ten.
export function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((n) => n * power >= rough) * power;
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

function draw(svg, tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  svg.append(made);
}

// series: { points: [[x, y], ...], style: a class, dots: whether points are marked }.
// axes: xLabel, x and y (numbers to text), and perhaps what must be seen: xMin, xMax, yMin, yMax.
export function lineChart(svg, series, axes) {
  const width = Math.max(svg.clientWidth, 240);
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren();
  const all = series.flatMap((s) => s.points);
  const extent = (i, least, most) => [
    all.reduce((low, point) => Math.min(low, point[i]), least),
    all.reduce((high, point) => Math.max(high, point[i]), most),
  ];
  const [x0, x1] = extent(0, axes.xMin ?? 0, axes.xMax ?? 1);
  let [y0, y1] = extent(1, axes.yMin ?? Infinity, axes.yMax ?? -Infinity);
  if (!(y1 > y0)) [y0, y1] = Number.isFinite(y0) ? [y0 - 0.5, y0 + 0.5] : [0, 1];
  const beyond = (y1 - y0) * 0.05;
  y1 += beyond;
  if (axes.yMin === undefined) y0 -= beyond;
  const right = width - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  const x = (v) => MARGIN.left + ((v - x0) / (x1 - x0)) * (right - MARGIN.left);
  const y = (v) => bottom - ((v - y0) / (y1 - y0)) * (bottom - MARGIN.top);

  for (const v of ticks(y0, y1, 5)) {
    const at = y(v).toFixed(1);
    draw(svg, "line", { class: "grid", x1: MARGIN.left, x2: right, y1: at, y2: at });
    const where = { x: MARGIN.left - 6, y: at, dy: "0.35em", "text-anchor": "end" };
    draw(svg, "text", where, axes.y(v));
  }
  for (const v of ticks(x0, x1, Math.min(8, width / 70))) {
    draw(svg, "text", { x: x(v).toFixed(1), y: bottom + 16, "text-anchor": "middle" }, axes.x(v));
  }
  draw(svg, "line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom });
  const middle = (MARGIN.left + right) / 2;
  draw(svg, "text", { x: middle, y: HEIGHT - 5, "text-anchor": "middle" }, axes.xLabel);

  for (const { points, style, dots } of series) {
    const path = points.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`);
    if (path.length) draw(svg, "path", { class: `line ${style}`, d: `M${path.join("L")}` });
    for (const [a, b] of dots || points.length === 1 ? points : []) {
      draw(svg, "circle", { class: style, cx: x(a).toFixed(1), cy: y(b).toFixed(1), r: 2.5 });
    }
  }
}

// The legend of a chart: [[class, name], ...].
export function legend(target, names) {
  const items = names.map(([style, name]) =>
    element("span", {}, element("span", { className: `swatch ${style}` }), name),
  );
  target.replaceChildren(...items);
}
