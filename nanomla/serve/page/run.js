// The Run tab: loss curves and settings of a model's training run, read again while it writes.

import { askJson } from "./server.js";
import { legend, lineChart } from "./chart.js";
import { $, element, fillSelect, number, plural } from "./util.js";

const EVERY = 2; // seconds between two readings
const LONGEST = 60; // seconds between two tries while the server does not answer
const MOST_POINTS = 2000; // more than pixels only cost time
const NO_LOG = "This model has no log of a run.";
const CURVES = [
  ["loss", "batch", "batch loss"],
  ["train_loss", "model-0", "train loss"],
  ["val_loss", "model-1", "val loss"],
];

let models = [];
let log = null; // { name, entries, settings, next } of the model that is shown
let timer = 0;
let visit = 0; // goes up when another model is chosen or the tab is left: older answers are void

export function setUpRun(of) {
  models = of;
  fillSelect($("run-model"), models.map(({ id }) => [id, id]));
  follow();
}

// Starts reading, or stops it where nobody sees the tab.
export function follow() {
  clearTimeout(timer);
  visit += 1;
  if (log) log.next = 0; // unseen, the run may have begun anew, and have as many lines again
  if (!$("run").hidden && document.visibilityState === "visible" && models.length) {
    read(visit, EVERY);
  }
}

async function read(mine, pause) {
  const name = $("run-model").value;
  if (log?.name !== name) {
    log = { name, entries: [], settings: {}, next: 0 };
    $("run-status").textContent = "";
    draw();
    fillSettings();
  }
  if (!models.find(({ id }) => id === name).nanomla.has_log) {
    $("run-status").textContent = NO_LOG;
    return;
  }
  let wait = EVERY;
  try {
    const query = new URLSearchParams({ model: name, after: log.next });
    const answer = await askJson(`api/log?${query}`);
    if (mine !== visit) return;
    take(answer);
  } catch (error) {
    if (mine !== visit) return;
    wait = Math.min(pause * 2, LONGEST);
    log.next = 0;
    $("run-status").textContent = `${error.message} Next try in ${wait} s.`;
  }
  timer = setTimeout(() => read(mine, wait), wait * 1000);
}

function take(answer) {
  const anew = answer.restarted || log.next === 0;
  log.entries = anew ? answer.entries : log.entries.concat(answer.entries);
  log.next = answer.next;
  if (JSON.stringify(answer.settings) !== JSON.stringify(log.settings)) {
    log.settings = answer.settings ?? {};
    fillSettings();
  }
  if (anew || answer.entries.length) draw();
  $("run-status").textContent = log.entries.length ? latest() : NO_LOG;
}

function latest() {
  const last = (key) => log.entries.findLast((entry) => isNumber(entry[key]))?.[key];
  const words = [`${log.name}: iteration ${number(log.entries.at(-1).iter)}`];
  for (const [key, , name] of CURVES) {
    if (last(key) !== undefined) words.push(`${name} ${last(key).toFixed(4)}`);
  }
  return words.join(", ");
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function draw() {
  const series = CURVES.map(([key, style]) => {
    const found = log.entries.filter((e) => isNumber(e.iter) && isNumber(e[key]));
    const stride = Math.ceil(found.length / MOST_POINTS);
    const some = found.filter((_, i) => i % stride === 0 || i === found.length - 1);
    const points = some.map((entry) => [entry.iter, entry[key]]);
    return { points, style, dots: style !== "batch" && points.length < 60 };
  });
  $("run-losses").hidden = series.every(({ points }) => points.length === 0);
  const round = (v) => number(v, 3);
  const x = (v) => number(v, 0);
  lineChart($("run-chart"), series, { xLabel: "iteration", x, y: round });
  legend($("run-legend"), CURVES.map(([, style, name]) => [style, name]));
  const lines = plural(log.entries.length, "line");
  $("run-caption").textContent = `Loss in nats per token; ${lines} of log.jsonl.`;
}

function words(value) {
  if (value === null || value === undefined) return "none";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function fillSettings() {
  const names = Object.keys(log.settings).sort();
  $("run-settings").hidden = names.length === 0;
  const rows = names.map((name) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      element("td", {}, words(log.settings[name])),
    ),
  );
  $("settings-table").tBodies[0].replaceChildren(...rows);
  filter();
}

// Shows the settings whose name or value has any of the filter's words.
function filter() {
  const wanted = $("filter").value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const rows = [...$("settings-table").tBodies[0].rows];
  for (const row of rows) {
    const text = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
    row.hidden = wanted.length > 0 && !wanted.some((word) => text.includes(word));
  }
  const left = rows.filter((row) => !row.hidden).length;
  $("filter-status").textContent = `${left} of ${plural(rows.length, "setting")}`;
}

$("filter").addEventListener("input", filter);
$("run-model").addEventListener("change", follow);
document.addEventListener("visibilitychange", follow);
new ResizeObserver(() => log && draw()).observe($("run-chart"));
