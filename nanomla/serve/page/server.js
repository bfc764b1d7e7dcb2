// Requests to the server, their errors in words, and its event streams.

import { load, save } from "./util.js";

// status 0: no answer at all. wait: the seconds after which the server asks to be tried again.
export class ServerError extends Error {
  constructor(message, status = 0, wait = null) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

const NO_ANSWER = "The server does not answer. Is it still running?";

// A token comes once in the address (#token=...), where it does not stay, or from the form.
// Returns whether there was one.
export function takeTokenFromAddress() {
  const found = /^#token=(.*)$/.exec(location.hash);
  if (!found) return false;
  history.replaceState(null, "", location.pathname + location.search);
  try {
    return setToken(decodeURIComponent(found[1]));
  } catch {
    return false; // not a text; the server will ask for a token
  }
}

let token = load("sessionStorage", "nanomla-token");

// A header takes visible ASCII only. Returns whether the token can be sent.
export function setToken(value) {
  if (!/^[\x21-\x7e]+$/.test(value)) return false;
  token = value;
  save("sessionStorage", "nanomla-token", value);
  return true;
}

export const hasToken = () => Boolean(token);

// The answer to GET, or to POST if there is a body. Raises ServerError, or AbortError on signal.
async function ask(path, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(NO_ANSWER);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const { status } = response;
  let message = `The server answered with status ${status}.`;
  try {
    message = sentence((await response.json()).error.message);
  } catch {
    // no JSON; the status has to do
  }
  const wait = Number(response.headers.get("Retry-After")) || 1;
  if (status === 503) message += ` Try again in ${wait} s.`;
  return new ServerError(message, status, status === 503 ? wait : null);
}

// The server's messages are lines such as "the prompt has 80 tokens; shorten it".
function sentence(text) {
  const line = String(text).trim();
  return line.charAt(0).toUpperCase() + line.slice(1) + (/[.!?]$/.test(line) ? "" : ".");
}

export async function askJson(path, body, signal) {
  const response = await ask(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server's answer was not complete. Is it still running?");
  }
}

// The objects of an event stream up to its [DONE].
export async function* events(path, body, signal) {
  const response = await ask(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      pending += value.replaceAll("\r", "");
      const whole = pending.split("\n\n");
      pending = whole.pop();
      for (const event of whole) {
        if (!event.startsWith("data:")) continue;
        const data = event.slice(5).trim();
        if (data === "[DONE]") return;
        const object = JSON.parse(data);
        if (object.error) throw new ServerError(sentence(object.error.message), 500);
        yield object;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    // what follows the loop says it
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ServerError("The connection ended in mid-text. Is the server still running?");
}
