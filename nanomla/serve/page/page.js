// The page: its tabs, the settings of a text, errors, and the columns of the models.

import { askJson, hasToken, setToken, takeTokenFromAddress } from "./server.js";
import { attentionChanged, setUpAttention } from "./attention.js";
import { redrawCache, showCache } from "./cache.js";
import { Column } from "./column.js";
import { follow, setUpRun } from "./run.js";
import { $, element, enable, enabled, load, save } from "./util.js";

const DEFAULTS = {
  prompt: "ROMEO:\n",
  length: "200",
  temperature: "0.8",
  top_k: "200",
  top_p: "1",
  seed: "1337",
};
const KEPT = "nanomla-settings"; // the key of the settings in localStorage
const TABS = ["write", "attention", "run"];

let columns = [];
const retries = new Map(); // what has failed -> how to try it again

// ---- settings

function kept() {
  try {
    return JSON.parse(load("localStorage", KEPT)) ?? {};
  } catch {
    return {};
  }
}

function loadSettings() {
  const before = kept();
  for (const [name, value] of Object.entries(DEFAULTS)) {
    $(name).value = typeof before[name] === "string" ? before[name] : value;
    if ($(name).value === "" && name !== "prompt") $(name).value = value;
  }
  if (TABS.includes(before.tab)) showTab(before.tab);
}

function saveSettings() {
  const now = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, $(name).value]));
  now.tab = TABS.find((name) => !$(name).hidden);
  save("localStorage", KEPT, JSON.stringify(now));
}

// The part of a request that the form decides.
function sampling() {
  return {
    max_tokens: $("length").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    top_k: $("top_k").valueAsNumber,
    top_p: $("top_p").valueAsNumber,
    seed: $("seed").valueAsNumber,
  };
}

// ---- tabs

function showTab(name) {
  for (const other of TABS) {
    const tab = $(`tab-${other}`);
    tab.setAttribute("aria-selected", String(other === name));
    tab.tabIndex = other === name ? 0 : -1;
    $(other).hidden = other !== name;
  }
  follow();
}

$("tabs").addEventListener("click", (event) => {
  const name = event.target.id.replace("tab-", "");
  if (!TABS.includes(name)) return;
  showTab(name);
  saveSettings();
});
$("tabs").addEventListener("keydown", (event) => {
  const at = TABS.findIndex((name) => !$(name).hidden);
  const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: TABS.length - 1 };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const name = TABS[(moves[event.key] + TABS.length) % TABS.length];
  $(`tab-${name}`).focus();
  $(`tab-${name}`).click();
});

// ---- errors

// what: the name of what failed, such as a model's; again(): what Retry does about it.
function showProblem(what, error, again) {
  const final = error.status === 400 || error.status === 413; // the same request fails again
  if (!final) retries.set(what, again);
  $("retry").hidden = retries.size === 0;
  if (error.status === 401) {
    $("token-form").hidden = false;
    $("token-wrong").hidden = !hasToken();
    $("token").focus();
    return;
  }
  const several = columns.length > 1 && columns.some((column) => column.name === what);
  const text = several && error.status ? `${what}: ${error.message}` : error.message;
  const before = $("problem").hidden ? "" : $("problem-text").textContent;
  $("problem").hidden = false;
  if (!before.includes(text)) $("problem-text").textContent = `${before}\n${text}`.trim();
}

function clearProblem() {
  $("problem").hidden = true;
  $("problem-text").textContent = "";
  retries.clear();
}

function retry() {
  const again = [...retries.values()];
  clearProblem();
  for (const action of again) action();
}

$("retry").addEventListener("click", retry);
$("dismiss").addEventListener("click", clearProblem);
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!setToken($("token").value)) {
    $("token").setCustomValidity("A token has letters, digits and signs, and no blanks.");
    $("token").reportValidity();
    return;
  }
  $("token").value = "";
  $("token-form").hidden = true;
  retry();
});
addEventListener("hashchange", () => {
  if (!takeTokenFromAddress()) return;
  $("token-form").hidden = true;
  retry();
});
$("token").addEventListener("input", () => $("token").setCustomValidity(""));

// ---- writing

const busy = () => columns.some((column) => column.busy);

function generate() {
  if (!enabled($("generate")) || !$("settings").reportValidity()) return;
  clearProblem();
  saveSettings();
  for (const column of columns) column.start("new", $("prompt").value);
}

function goOn() {
  if (!enabled($("continue")) || !$("settings").reportValidity()) return;
  clearProblem();
  for (const column of columns) if (column.ids.length) column.start("kept");
}

function stop() {
  for (const column of columns) column.stop();
}

// Brings the buttons, the status and the chart up to date.
let was = false; // whether a text was being generated
function changed() {
  redrawCache();
  if (busy() === was && was) return;
  was = busy();
  const some = columns.some((column) => column.promptIds !== null);
  enable($("generate"), !was && columns.length > 0, was ? "A text is generated." : "");
  enable($("stop"), was, "No text is generated.");
  const why = was ? "A text is generated." : "There is no text yet.";
  enable($("continue"), !was && some, why);
  attentionChanged();
  $("status").textContent = was ? "Generating …" : outcome();
}

// How the last texts ended, in a line.
function outcome() {
  const of = columns.filter((column) => column.ended);
  if (!of.length) return "";
  const worst = ["Failed", "Broke off", "Stopped", "Done"];
  const how = worst.find((word) => of.some((column) => column.ended === word));
  const name = (column) => (columns.length > 1 ? `${column.name} ` : "");
  return `${how}: ${of.map((column) => name(column) + column.outcome).join("; ")}.`;
}

$("generate").addEventListener("click", generate);
$("continue").addEventListener("click", goOn);
$("stop").addEventListener("click", () => enabled($("stop")) && stop());
$("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("settings").addEventListener("input", saveSettings);
$("new-seed").addEventListener("click", () => {
  $("seed").value = Math.floor(Math.random() * 1e6);
  saveSettings();
});
document.addEventListener("keydown", (event) => {
  if ($("write").hidden) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") stop();
});

// ---- start

async function start() {
  let models;
  try {
    models = (await askJson("v1/models")).data.filter((model) => model.nanomla);
  } catch (error) {
    showProblem("models", error, start);
    return;
  }
  const hooks = {
    changed,
    settings: sampling,
    failed: showProblem,
  };
  columns = models.map((model, i) => new Column(model, i, hooks));
  $("results").hidden = false;
  $("columns").replaceChildren(...columns.map((column) => column.node));
  $("columns").classList.toggle("several", columns.length > 1);
  $("length").max = Math.min(...models.map((model) => model.nanomla.max_tokens));
  if ($("length").valueAsNumber > Number($("length").max)) $("length").value = $("length").max;
  document.title = `${models.map(({ id }) => id).join(", ")} – nanoMLA`;
  showCache(columns);
  setUpAttention(columns, (error, again) => showProblem("attention", error, again));
  setUpRun(models);
  changed();
}

takeTokenFromAddress();
loadSettings();
start();
