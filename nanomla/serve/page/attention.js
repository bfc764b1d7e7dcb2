// The Attention tab: a heat map of who looks at whom, from one layer of one model.

import { askJson } from "./server.js";
import { $, element, enable, enabled, fillSelect, percent, spoken, visible } from "./util.js";

const canvas = $("attention-canvas");
const slider = $("attention-token");
let columns = [];
let failed = null;
let wanted = false; // whether a picture of this text was asked for
let visit = 0; // goes up when it would be another picture: older answers are void
let shown = null; // { tokens, heads, weights: T x T of the chosen head }
let row = 0; // the token that looks
let col = 0; // the token looked at

export function setUpAttention(of, onFailure) {
  columns = of;
  failed = onFailure;
  fillSelect($("attention-model"), columns.map(({ name }) => [name, name]));
  fillChoices();
  attentionChanged();
}

const chosen = () => columns.find(({ name }) => name === $("attention-model").value);

function fillChoices() {
  const about = chosen()?.about;
  if (!about) return;
  const upTo = (n) => Array.from({ length: n }, (_, i) => [i, String(i + 1)]);
  fillSelect($("attention-layer"), upTo(about.layers));
  fillSelect($("attention-head"), [["mean", "mean of all"], ...upTo(about.heads)]);
}

// Called whenever a text begins, grows or ends.
export function attentionChanged() {
  const busy = columns.some((column) => column.busy);
  const reason = "Off while a text is generated.";
  const button = $("attention-show");
  if (enabled(button) === !busy && columns.length) return;
  enable(button, !busy && columns.length > 0, busy ? reason : "There is no model.");
  textChanged();
  say(busy ? reason : "");
}

function textChanged() {
  wanted = false;
  clear();
}

// Takes away a picture that is no longer of what the fields say, and the one that is on its way.
function clear() {
  visit += 1;
  shown = null;
  $("attention-picture").hidden = true;
  say("");
}

const say = (text) => ($("attention-status").textContent = text);

async function show() {
  const column = chosen();
  if (!column || !enabled($("attention-show"))) return;
  const layer = Number($("attention-layer").value);
  clear();
  wanted = true;
  const mine = visit;
  say("Computing …");
  try {
    let tokens = column.ids;
    if (!tokens.length) {
      const body = { model: column.name, text: $("prompt").value };
      tokens = (await askJson("api/tokenize", body)).ids;
    }
    if (mine !== visit) return;
    if (!tokens.length) {
      say("There is no text yet. Write one on the first tab.");
      return;
    }
    const answer = await askJson("api/attention", { model: column.name, tokens, layer });
    if (mine !== visit) return;
    const length = answer.tokens.length;
    const last = length < tokens.length ? ` (the last of ${tokens.length})` : "";
    shown = answer;
    say(`${column.name}, layer ${layer + 1}: ${length} tokens${last}.`);
    row = col = length - 1;
    slider.max = length - 1;
    $("attention-picture").hidden = false;
    pickHead();
  } catch (error) {
    if (mine !== visit) return;
    say("");
    failed(error, show);
  }
}

function pickHead() {
  if (!shown) return;
  const { heads } = shown;
  const head = $("attention-head").value;
  const total = (i, j) => heads.reduce((sum, weights) => sum + (weights[i][j] ?? NaN), 0);
  shown.weights =
    head === "mean"
      ? shown.tokens.map((_, i) => shown.tokens.map((_, j) => total(i, j) / heads.length))
      : heads[head];
  drawMap();
  select(row, col);
}

// What is written beside the map, where its cells begin, and how large they are, in CSS pixels.
// Cells below 9 pixels have no labels.
function geometry() {
  const count = shown.tokens.length;
  const width = Math.min(canvas.parentElement.clientWidth, 720);
  const names = shown.tokens.map((text) =>
    text.includes("\uFFFD") ? "\uFFFD" : visible(text).slice(0, 8),
  );
  const beside = 12 + 7.5 * Math.max(...names.map((name) => name.length));
  const labels = (width - beside) / count >= 9 ? names : null;
  const left = labels ? beside : 2;
  const cell = Math.min((width - left - 2) / count, 40);
  return { count, labels, left, cell, size: left + cell * count + 2 };
}

const colour = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function drawMap() {
  if (!shown || !canvas.parentElement.clientWidth) return;
  const { count, labels, left, cell, size } = geometry();
  const scale = devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(size * scale);
  canvas.style.width = canvas.style.height = `${size}px`;
  const paint = canvas.getContext("2d");
  paint.scale(scale, scale);
  paint.imageSmoothingEnabled = false;
  paint.drawImage(image(count), left, left, cell * count, cell * count);
  if (labels) drawLabels(paint, labels, left, cell);
  for (const [name, thickness] of [["--panel", 4], ["--mark", 1.5]]) { // seen on any colour
    paint.strokeStyle = colour(name);
    paint.lineWidth = thickness;
    paint.strokeRect(left, left + row * cell, (row + 1) * cell, cell);
    paint.strokeRect(left + col * cell, left + row * cell, cell, cell);
  }
}

// The map with one pixel a cell; a token does not look at later ones, so their cells stay empty.
function image(count) {
  const low = channels(colour("--heat-low"));
  const high = channels(colour("--heat-high"));
  const small = element("canvas", { width: count, height: count });
  const paint = small.getContext("2d");
  const pixels = paint.createImageData(count, count);
  for (let i = 0; i < count; i++) {
    for (let j = 0; j <= i; j++) {
      const share = Math.sqrt(Math.min(shown.weights[i][j], 1));
      const mixed = low.map((from, k) => Math.round(from + (high[k] - from) * share));
      pixels.data.set([...mixed, 255], 4 * (i * count + j));
    }
  }
  paint.putImageData(pixels, 0, 0);
  return small;
}

function drawLabels(paint, labels, left, cell) {
  paint.fillStyle = colour("--text");
  paint.font = `${Math.min(cell - 1, 12)}px ui-monospace, monospace`;
  paint.textBaseline = "middle";
  for (const [i, text] of labels.entries()) {
    const middle = left + (i + 0.5) * cell;
    paint.textAlign = "right";
    paint.fillText(text, left - 5, middle);
    paint.save();
    paint.translate(middle, left - 5);
    paint.rotate(-Math.PI / 2);
    paint.textAlign = "left";
    paint.fillText(text, 0, 0);
    paint.restore();
  }
}

// Selects a cell, and says in words what the map shows there.
function select(i, j) {
  const { tokens, weights } = shown;
  row = Math.min(Math.max(i, 0), tokens.length - 1);
  col = Math.min(Math.max(j, 0), row);
  slider.value = row;
  const at = (k) => `${spoken(tokens[k])} (${k + 1})`;
  slider.setAttribute("aria-valuetext", at(row));
  const weight = percent(weights[row][col]);
  $("attention-readout").textContent = `${at(row)} looks at ${at(col)}: ${weight}`;
  const order = weights[row].map((w, k) => [w, k]).slice(0, row + 1);
  order.sort((a, b) => b[0] - a[0]);
  $("attention-top-title").textContent = `${at(row)} looks most at`;
  const items = order.slice(0, 5).map(([w, k]) => element("li", {}, `${at(k)}: ${percent(w)}`));
  $("attention-top").replaceChildren(...items);
  drawMap();
}

function cellAt(event) {
  const { left, cell } = geometry();
  const box = canvas.getBoundingClientRect();
  const place = (pixels) => Math.floor((pixels - left) / cell);
  return [place(event.clientY - box.top), place(event.clientX - box.left)];
}

function hover(event) {
  if (!shown) return;
  const [i, j] = cellAt(event);
  const { tokens, weights } = shown;
  const inside = i >= 0 && j >= 0 && i < tokens.length && j <= i;
  const looks = inside && `${spoken(tokens[i])} looks at ${spoken(tokens[j])}`;
  canvas.title = inside ? `${looks}: ${percent(weights[i][j])}` : "";
}

canvas.addEventListener("pointermove", hover);
canvas.addEventListener("click", (event) => shown && select(...cellAt(event)));
canvas.addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (!(event.key in moves) || !shown) return;
  event.preventDefault();
  select(row + moves[event.key][0], col + moves[event.key][1]);
});
slider.addEventListener("input", () => shown && select(Number(slider.value), col));
$("attention-model").addEventListener("change", () => {
  fillChoices();
  if (wanted) show();
});
$("attention-layer").addEventListener("change", () => wanted && show());
$("prompt").addEventListener("input", () => {
  if (!chosen()?.ids.length) textChanged(); // else the picture is of the text that was written
});
$("attention-head").addEventListener("change", pickHead);
$("attention-form").addEventListener("submit", (event) => {
  event.preventDefault();
  show();
});
new ResizeObserver(drawMap).observe(canvas.parentElement);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
