// Small helpers that every module uses: elements, numbers for people to read, storage.

export const $ = (id) => document.getElementById(id);

// An element with properties (or attributes, where it has no property of that name) and children.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// A disabled button would lose the focus; one with aria-disabled keeps it and is asked on a click.
export function enable(button, on, reason = "") {
  button.setAttribute("aria-disabled", String(!on));
  button.title = on ? "" : reason;
}

export const enabled = (button) => button.getAttribute("aria-disabled") !== "true";

// A number with thousands separators; a dash for null, undefined, NaN and infinity.
export function number(value, digits = 1) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  return value.toLocaleString("en-US", { maximumFractionDigits: digits });
}

export function bytes(value) {
  for (const [size, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= size) return `${number(value / size, value < 10 * size ? 2 : 1)} ${unit}`;
  }
  return Number.isFinite(value) ? `${number(value)} bytes` : "–";
}

export function percent(p) {
  if (typeof p !== "number" || !Number.isFinite(p)) return "–";
  if (p < 0.001) return "below 0.1 %";
  const exact = p < 0.1 || p > 0.99;
  return `${(100 * p).toFixed(exact && p < 0.9995 ? 1 : 0)} %`;
}

export const plural = (n, what) => `${number(n, 0)} ${what}${n === 1 ? "" : "s"}`;

// A token's text with its blanks visible.
export function visible(text) {
  if (text === "") return "(no text)";
  if (/^\uFFFD+$/.test(text)) return "(part of a character)";
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

// A token's text as a screen reader can say it.
export function spoken(text) {
  const names = { "\n": "line break", " ": "space", "\t": "tab", "": "no text" };
  return names[text] ?? (/^\uFFFD+$/.test(text) ? "part of a character" : `“${text}”`);
}

// Calls f once in the next frame, however often it is asked to until then.
export function oncePerFrame(f) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      f();
    });
  };
}

// Fills a select, and keeps what was chosen if it is still there. options: [value, label] pairs.
export function fillSelect(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, label]) => element("option", { value }, label)));
  if (options.some(([value]) => String(value) === before)) select.value = before;
}

// Storage may be full, or forbidden by the browser's settings; the page works without it.
export function load(storage, key) {
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

export function save(storage, key, value) {
  try {
    window[storage].setItem(key, value);
  } catch {
    // nothing is kept then
  }
}
