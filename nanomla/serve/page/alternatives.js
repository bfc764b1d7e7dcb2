// The small list beside a token: what else it could have been, with probabilities.

import { $, element, percent, spoken, visible } from "./util.js";

const list = $("alternatives");
let opener = null; // the token's element
let choose = null;

// options: [{ id, text, logprob, current }], best first. chosen(option): what taking one does.
export function openAlternatives(node, options, chosen) {
  opener = node;
  choose = chosen;
  list.replaceChildren(...options.map((option) => item(option)));
  list.hidden = false;
  node.setAttribute("aria-expanded", "true");
  place(node);
  const current = options.findIndex((option) => option.current);
  list.children[Math.max(current, 0)].focus();
}

function item(option) {
  const p = Math.exp(option.logprob);
  const bar = element("span", { className: "bar" });
  bar.style.width = `${100 * p}%`;
  const made = element(
    "li",
    { role: "option", tabIndex: -1, "aria-label": `${spoken(option.text)}, ${percent(p)}` },
    bar,
    element("span", { className: "name" }, visible(option.text)),
    element("span", { className: "share" }, percent(p)),
  );
  made.setAttribute("aria-selected", String(option.current));
  if (option.current) made.title = "the token in the text";
  made.addEventListener("click", () => take(option));
  made.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      event.stopPropagation();
      take(option);
    }
  });
  return made;
}

// Below the token, or above it where there is no room, and inside the window.
function place(node) {
  const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const { width, height } = list.getBoundingClientRect();
  const room = document.documentElement.clientWidth - width - 8;
  const below = at.bottom + 4;
  const top = below + height < innerHeight ? below : Math.max(at.top - height - 4, 4);
  list.style.left = `${Math.max(Math.min(at.left, room), 8) + scrollX}px`;
  list.style.top = `${top + scrollY}px`;
}

function take(option) {
  const done = choose;
  close();
  done(option);
}

// Closes the list of a token in a text that goes.
export function closeAlternatives(view) {
  if (view.contains(opener)) close();
}

function close() {
  if (!opener) return;
  const node = opener;
  opener = null;
  node.setAttribute("aria-expanded", "false");
  if (list.contains(document.activeElement) && node.isConnected) node.focus();
  list.hidden = true;
}

list.addEventListener("keydown", (event) => {
  const items = [...list.children];
  const at = items.indexOf(document.activeElement);
  const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 };
  if (event.key in moves) {
    event.preventDefault();
    items[(moves[event.key] + items.length) % items.length].focus();
  } else if (event.key === "Escape") {
    event.stopPropagation(); // a text that is being generated goes on
    close();
  }
});
list.addEventListener("focusout", (event) => {
  if (!list.contains(event.relatedTarget)) close();
});
