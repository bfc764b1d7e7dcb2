// The chart and the table of what the caches take, beside MHA of the same width.

import { legend, lineChart } from "./chart.js";
import { $, bytes, element, number, oncePerFrame } from "./util.js";

const CONTEXTS = 8; // how many contexts of tokens the chart shows; of a longer text the last ones
const FEWEST = 8; // tokens that it shows at least

let columns = [];

export function showCache(of) {
  columns = of;
  redrawCache();
}

export const redrawCache = oncePerFrame(() => {
  drawChart();
  fillTable();
});

// MHA of every different width among the models; of equal ones that whose text is longer.
function baselines() {
  const widths = new Map();
  for (const column of columns) {
    const { mha_bytes_per_token: size, context } = column.about;
    const key = `${size} ${context}`;
    const other = widths.get(key);
    if (!other || other.count < column.count) widths.set(key, column);
  }
  return [...widths.values()];
}

const titleOf = (column, all) =>
  all.length > 1 ? `MHA as wide as ${column.name}` : "MHA, same width";

function firstShown() {
  const longest = Math.max(0, ...columns.map((column) => column.count));
  const shown = CONTEXTS * Math.max(FEWEST, ...columns.map((column) => column.about.context));
  return Math.max(0, longest - shown);
}

function drawChart() {
  const of = baselines();
  const from = firstShown();
  const line = (column, style, y) => {
    const seen = column.points.filter((point) => point.x >= from);
    return { style, points: seen.map((point) => [point.x, y(point)]) };
  };
  const series = columns.map((column) => line(column, column.style, (point) => point.bytes));
  for (const column of of) {
    series.push(line(column, "mha", (point) => point.held * column.about.mha_bytes_per_token));
  }
  const y = (v) => (v === 0 ? "0" : bytes(v));
  const x = (v) => number(v, 0);
  const dense = Math.max(0, ...columns.map(({ about }) => about.mha_bytes_per_token));
  const least = { xMin: from, xMax: from + FEWEST, yMin: 0, yMax: FEWEST * dense };
  lineChart($("cache-chart"), series, { xLabel: "tokens of the text", x, y, ...least });
  legend($("cache-legend"), [
    ...columns.map((column) => [column.style, column.name]),
    ...of.map((column) => ["mha", titleOf(column, of)]),
  ]);
  $("cache-caption").textContent = caption();
}

function caption() {
  const from = firstShown();
  const since = from ? `, from token ${number(from)} on` : "";
  const lines = [`Bytes of cache against the tokens of the text${since}.`];
  const forgetting = new Map(); // where -> the models that forgot there
  for (const { name, forgot, about } of columns) {
    if (!forgot) continue;
    const size = `(${number(about.context)} tokens)`;
    const what = `${size}, last at about token ${number(forgot)}`;
    forgetting.set(what, [...(forgetting.get(what) ?? []), name]);
  }
  for (const [what, names] of forgetting) {
    const whose = names.join(" and ");
    lines.push(`The text outgrew the context of ${whose} ${what}: the older half was forgotten.`);
  }
  return lines.join(" ");
}

function fillTable() {
  const of = baselines();
  const head = ["", ...columns.map((c) => c.name), ...of.map((c) => titleOf(c, of))];
  const held = (column) => column.points.at(-1);
  const rows = [
    [
      "Numbers per token and layer",
      ...columns.map(({ about }) =>
        about.state_bytes ? "a state" : number(about.numbers_per_token_and_layer),
      ),
      ...of.map(({ about }) => number(about.mha_numbers_per_token_and_layer)),
    ],
    [
      "Bytes per token",
      ...columns.map(({ about }) =>
        about.state_bytes ? `${bytes(about.state_bytes)} in all` : number(about.bytes_per_token),
      ),
      ...of.map(({ about }) => number(about.mha_bytes_per_token)),
    ],
    ["Beside MHA", ...columns.map(({ about }) => ratio(about)), ...of.map(() => "1x")],
    [
      "Held now",
      ...columns.map((c) => bytes(held(c).bytes)),
      ...of.map((c) => bytes(held(c).held * c.about.mha_bytes_per_token)),
    ],
  ];
  const cells = (row) =>
    row.map((text, i) => element(i ? "td" : "th", i ? {} : { scope: "row" }, text));
  const heads = head.map((text) => element(text ? "th" : "td", text ? { scope: "col" } : {}, text));
  $("cache-table").replaceChildren(
    element("thead", {}, element("tr", {}, ...heads)),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row)))),
  );
}

function ratio({ state_bytes, bytes_per_token, mha_bytes_per_token, context }) {
  const size = state_bytes ? state_bytes / context : bytes_per_token;
  if (!(size > 0)) return "–";
  const times = mha_bytes_per_token / size;
  const words = times >= 1 ? `${number(times)}x smaller` : `${number(1 / times)}x larger`;
  if (number(times) === "1" && number(1 / times) === "1") return "as large";
  return state_bytes ? `${words} at ${number(context)} tokens` : words;
}

new ResizeObserver(redrawCache).observe($("cache-chart"));
