// One model's text: the prompt, tokens with their probabilities, and the request that adds more.

import { closeAlternatives, openAlternatives } from "./alternatives.js";
import { events } from "./server.js";
import { element, number, oncePerFrame, percent, plural, spoken } from "./util.js";

const ALTERNATIVES = 8;
const SHADES = [0.05, 0.2, 0.5, 0.8]; // the probabilities at which the next lighter shade begins

// The pieces of a chunk's text: usually one per token. Tokens that make a character only together
// have U+FFFD as their text, and share a piece.
export function piecesOf(text, tokens) {
  const pieces = [];
  let rest = text;
  let broken = null; // the piece whose tokens are no text on their own
  for (const token of tokens) {
    if (token.text.includes("\uFFFD")) {
      broken ??= pieces[pieces.push({ text: "", tokens: [] }) - 1];
      broken.tokens.push(token);
      continue;
    }
    const at = broken ? rest.indexOf(token.text) : 0;
    if (at < 0 || !rest.startsWith(token.text, at)) return [{ text, tokens }];
    if (broken) broken.text = rest.slice(0, at);
    broken = null;
    pieces.push({ text: token.text, tokens: [token] });
    rest = rest.slice(at + token.text.length);
  }
  if (broken) broken.text = rest;
  else if (rest && pieces.length) pieces.at(-1).text += rest;
  else if (rest) pieces.push({ text: rest, tokens: [] });
  return pieces;
}

// The seed of a branch: one of its own for every token that is chosen anywhere in a text of any
// seed, and the same again when it is chosen again.
function seedOfBranch(seed, place, id) {
  let mixed = seed % 2 ** 32;
  for (const number of [place, id]) {
    mixed = Math.imul(mixed ^ number ^ 0x9e3779b9, 0x85ebca6b);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0xc2b2ae35);
    mixed ^= mixed >>> 13;
  }
  return mixed >>> 0;
}

export class Column {
  // hooks: changed() whenever something is new, settings(), failed(name, error, again).
  constructor(model, index, hooks) {
    this.name = model.id;
    this.about = model.nanomla;
    this.style = `model-${index}`;
    this.hooks = hooks;
    this.running = Promise.resolve();
    this.controller = null; // of the request that runs
    this.build();
    this.reset("");
    this.scroll = oncePerFrame(() => {
      if (this.follow) this.view.scrollTop = this.view.scrollHeight;
    });
    this.view.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.view;
      this.follow = scrollHeight - scrollTop - clientHeight < 40;
    });
  }

  build() {
    const { about, name } = this;
    const title = `Text of ${name}. Left and right arrow go from token to token.`;
    const role = { role: "group", tabIndex: 0, "aria-label": title };
    this.view = element("div", { className: "text", ...role });
    this.rateView = element("p", { className: "rate" });
    this.note = element("p", { className: "hint note" });
    const size = `${number(about.parameters / 1e6, 2)} M parameters, ${about.layers} layers, `;
    const words = `${about.attention_name}; ${size}context ${number(about.context)}`;
    const heading = element("div", {}, element("h2", {}, name), this.rateView);
    this.node = element(
      "article",
      { className: `panel column ${this.style}`, "aria-label": name },
      heading,
      element("p", { className: "hint" }, words),
      this.view,
      this.note,
    );
    this.view.addEventListener("click", (event) => {
      if (getSelection().isCollapsed) this.open(event.target); // else text was selected, to copy it
    });
    this.view.addEventListener("keydown", (event) => this.key(event));
  }

  get busy() {
    return this.controller !== null;
  }

  get tokens() {
    return this.pieces.flatMap((piece) => piece.tokens);
  }

  get ids() {
    return [...(this.promptIds ?? []), ...this.tokens.map((token) => token.id)];
  }

  // Forgets the text; what follows begins with this prompt.
  reset(prompt) {
    this.promptIds = null; // the first answer tells them
    this.promptLength = 0; // of what they spell
    this.pieces = [];
    this.ends = 0; // ends of the text that were drawn and gone on from, since the last branch
    this.count = 0; // tokens of the text, with the prompt
    this.points = [{ x: 0, held: 0, bytes: this.about.state_bytes || 0 }];
    this.forgot = null; // the token at which the text last outgrew the context
    this.made = 0;
    this.rate = null; // tokens per second
    this.finish = null; // why the last request ended, as the server says
    this.ended = ""; // and as the page does: Done, Stopped or Broke off
    this.note.textContent = "";
    closeAlternatives(this.view);
    this.view.replaceChildren(element("span", { className: "prompt" }, prompt));
    this.showRate();
  }

  // Stops what runs and asks for more text. how: "new" begins anew with `prompt` once the server
  // has taken it; "rewound" and "kept" go on from the end of the text.
  start(how, prompt = "") {
    this.stop();
    const controller = (this.controller = new AbortController());
    this.running = this.running.then(() => this.generate(how, prompt, controller));
    this.hooks.changed();
  }

  stop() {
    this.controller?.abort();
  }

  request(prompt) {
    const body = {
      model: this.name,
      prompt,
      ...this.hooks.settings(),
      stream: true,
      logprobs: ALTERNATIVES,
      cache_prompt: true,
      return_token_ids: true,
    };
    if (prompt === null) this.goOn(body);
    return body;
  }

  // Lets a request go on with the text as if it had not been cut: from the number that its seed
  // gives next and, past the context, with the tokens that the model would still look at.
  goOn(body) {
    body.prompt = this.ids;
    body.tokens_drawn = this.tokens.length + this.ends;
    for (const [place, token] of this.tokens.entries()) {
      if (!token.chosen) continue;
      body.seed = seedOfBranch(body.seed, place, token.id);
      body.tokens_drawn = this.tokens.length - (place + 1) + this.ends;
    }
    const { context } = this.about;
    if (body.prompt.length <= context) return;
    const { x, held } = this.points.at(-1);
    const window = held + 1 + body.prompt.length - x;
    const half = Math.max(Math.floor(context / 2), 1);
    body.truncate_prompt_tokens = window <= context ? window : half;
  }

  async generate(how, prompt, { signal }) {
    let begun = false; // whether the server has taken the request
    this.made = 0;
    this.waiting = []; // tokens that have no text yet
    this.follow = true;
    this.view.classList.add("busy");
    this.view.setAttribute("aria-busy", "true");
    let failure = null;
    let done = false;
    try {
      const body = this.request(how === "new" ? prompt : null);
      for await (const chunk of events("v1/completions", body, signal)) {
        if (signal.aborted) break;
        if (!begun && how === "new") this.reset(prompt);
        begun = true;
        if (chunk.choices?.length) this.take(chunk.choices[0], how);
        this.hooks.changed();
      }
      done = !signal.aborted;
    } catch (error) {
      if (error.name !== "AbortError") failure = error;
    }
    if (this.controller?.signal !== signal) return; // another request follows this one
    this.controller = null;
    if (this.waiting.length) this.show("\uFFFD"); // half a character
    this.view.classList.remove("busy");
    this.view.removeAttribute("aria-busy");
    this.ended = done ? "Done" : "Stopped";
    if (failure) {
      this.ended = begun ? "Broke off" : "Failed";
      const again = () => this.start(begun ? "kept" : how, prompt);
      this.hooks.failed(this.name, failure, again);
    }
    this.hooks.changed();
  }

  take(choice, how) {
    const extra = choice.nanomla ?? {};
    if (extra.prompt) this.takePrompt(extra.prompt, how);
    const tokens = extra.tokens ?? [];
    this.count += tokens.length;
    this.made += tokens.length;
    this.waiting.push(...tokens);
    if (choice.text !== "") this.show(choice.text);
    if (extra.tokens_per_s) this.rate = extra.tokens_per_s;
    if (extra.cache) this.takeCache(extra.cache);
    this.finish = choice.finish_reason;
    if (this.finish === "stop") this.ends += 1;
    this.showRate();
    this.scroll();
  }

  // Shows text, and what waits for it: the tokens of a character come before the character.
  show(text) {
    for (const piece of piecesOf(text, this.waiting)) this.append(piece);
    this.waiting = [];
  }

  // Shows the end of the text as the server reads it: a half character is finished by what follows,
  // or has been by a token that was chosen.
  correct(text) {
    const shown = () => this.pieces.map((piece) => piece.text).join("");
    while (!text.startsWith(shown())) {
      const piece = this.pieces.pop();
      piece.node.remove();
      this.waiting.unshift(...piece.tokens);
    }
    const rest = text.slice(shown().length);
    if (rest) this.show(rest);
  }

  takePrompt({ ids, text, cached, computed }, how) {
    if (this.promptIds === null) {
      this.promptIds = ids;
      this.promptLength = text.length;
      this.count = ids.length;
    } else this.correct(text.slice(this.promptLength));
    const total = cached + computed;
    const recomputed = `${number(computed)} of ${plural(total, "token")} recomputed`;
    this.note.textContent = {
      new: `prompt: ${plural(total, "token")}` + (cached ? `, ${number(cached)} in the cache` : ""),
      rewound: cached ? `cache rewound: ${recomputed}` : `not in the cache: ${recomputed}`,
      kept: `cache kept: ${recomputed}`,
    }[how];
    if (total < this.count) {
      this.note.textContent += `; the ${number(this.count - total)} before are forgotten`;
    }
  }

  takeCache({ tokens: held, bytes }) {
    const last = this.points.at(-1);
    // A chunk may have many tokens, so that the cache has emptied and grown again meanwhile.
    const fewer = this.count - held - (last.x - last.held);
    if (fewer > 1) this.forgot = this.count;
    if (last.x === this.count) this.points.pop();
    this.points.push({ x: this.count, held, bytes });
  }

  append(piece) {
    const node = element("span", {}, piece.text);
    if (piece.tokens.length) {
      const p = Math.exp(piece.tokens.reduce((sum, token) => sum + token.logprob, 0));
      const several = piece.tokens.length > 1 ? `, ${piece.tokens.length} tokens` : "";
      node.className = `token shade-${SHADES.filter((limit) => p >= limit).length}`;
      const { chosen } = piece.tokens[0];
      if (chosen) node.classList.add("chosen");
      if (piece.text.includes("\n")) node.classList.add("newline");
      node.tabIndex = -1;
      node.title = `${spoken(piece.text)}: ${percent(p)}${several}`;
      node.setAttribute("role", "button");
      node.setAttribute("aria-label", node.title + (chosen ? ", chosen" : ""));
      node.setAttribute("aria-haspopup", "listbox");
    }
    piece.node = node;
    this.pieces.push(piece);
    this.view.append(node);
  }

  // Arrow keys go from token to token; Enter opens the list.
  key(event) {
    const nodes = this.pieces.filter((piece) => piece.tokens.length).map((piece) => piece.node);
    const at = nodes.indexOf(event.target);
    const last = nodes.length - 1;
    const moves = { ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, Home: 0, End: last };
    if (event.key in moves && nodes.length) {
      event.preventDefault();
      nodes[Math.min(Math.max(moves[event.key], 0), last)].focus();
    } else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
      if (event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.open(event.target);
    }
  }

  open(node) {
    const index = this.pieces.findIndex((piece) => piece.node === node);
    const token = this.pieces[index]?.tokens[0];
    if (!token) return;
    const top = token.top ?? [];
    const options = top.map(([id, text, logprob]) => ({ id, text, logprob: logprob ?? -Infinity }));
    if (!options.some((option) => option.id === token.id)) options.push({ ...token });
    for (const option of options) option.current = option.id === token.id;
    options.sort((a, b) => b.logprob - a.logprob);
    this.follow = false;
    openAlternatives(node, options, (option) => this.branch(index, token, option));
  }

  // Replaces the text from a token on by another token, and goes on from there.
  branch(index, token, { id, text, logprob }) {
    for (const piece of this.pieces.splice(index)) piece.node.remove();
    this.append({ text, tokens: [{ id, text, logprob, top: token.top, chosen: true }] });
    this.ends = 0;
    this.count = this.ids.length;
    this.points = this.points.filter((point) => point.x < this.count);
    if (this.forgot >= this.count) this.forgot = null;
    this.pieces.at(-1).node.focus({ preventScroll: true });
    this.start("rewound");
  }

  showRate() {
    const rate = this.rate === null ? "" : `, ${number(this.rate, 0)} tokens/s`;
    this.rateView.textContent = this.made ? plural(this.made, "token") + rate : "";
  }

  // One line about how the last request ended, for the status.
  get outcome() {
    if (!this.made) return "no new tokens";
    const how = this.finish === "stop" ? "; the model ended the text" : "";
    const rate = this.rate === null ? "" : ` at ${number(this.rate, 0)} tokens/s`;
    return `${plural(this.made, "token")}${rate}${how}`;
  }
}
