// Talks to the server: the key, errors in the contract's words, server-sent events.
// A seed may exceed what a JavaScript number holds, so seeds are strings of digits everywhere in the page.

export const base = new URL(".", location.href);
const KEY = "mezzotint-key";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
};

/** The server's answer was an error. */
export class Refused extends Error {
  constructor(status, body, requestId) {
    super(body?.error?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = body?.error?.code ?? null;
    this.requestId = body?.request_id ?? requestId;
  }
}

/** There was no answer. */
export class Unreachable extends Error {
  constructor() {
    super(`The server at ${base.host} does not answer. Is it running?`);
  }
}

/** JSON with `seed` as a string of digits, in both directions. */
export const parse = (text) => JSON.parse(text.replace(/"seed":\s*(\d+)/g, '"seed":"$1"'));
export function stringify(fields, indent) {
  const { seed, ...rest } = fields;
  const text = JSON.stringify(rest, null, indent);
  if (seed === undefined) return text;
  return text.replace(/\s*\}$/, (end) => (indent ? `,\n${" ".repeat(indent)}"seed": ${seed}\n}` : `,"seed":${seed}}`));
}

/** A fetch with the key; throws Refused or Unreachable. */
export async function call(path, { method = "GET", body, headers = {}, signal } = {}) {
  const all = new Headers(headers);
  if (key.get()) all.set("authorization", `Bearer ${key.get()}`);
  if (body && !all.has("content-type")) all.set("content-type", "application/json");
  let response;
  try {
    response = await fetch(new URL(path, base), { method, body, headers: all, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable();
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    if (!answer?.error && [502, 503, 504].includes(response.status)) throw new Unreachable();
    throw new Refused(response.status, answer, response.headers.get("x-request-id"));
  }
  return response;
}

export async function read(path, options) {
  const response = await call(path, options);
  try {
    return parse(await response.text());
  } catch {
    throw new Unreachable();
  }
}

/** Yields {event, data} until the stream ends; a broken connection is Unreachable. */
export async function* events(path, signal) {
  const response = await call(path, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      waiting += value;
      const parts = waiting.split("\n\n");
      waiting = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n");
        const field = (name) => lines.filter((l) => l.startsWith(`${name}: `)).map((l) => l.slice(name.length + 2));
        const [event] = field("event");
        if (event) yield { event, data: parse(field("data").join("\n")) };
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable();
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A picture's address on this page's own origin, whatever name the server gave itself. */
export function local(url) {
  const { pathname, search } = new URL(url, base);
  return `${pathname}${search}`;
}

export const pictureName = (url) => new URL(url, base).pathname.split("/").pop();
