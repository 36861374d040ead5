// What the page says: to everybody under the sheet, and to screen readers as it happens.

import { Refused, Unreachable, key } from "./api.js";

const $ = (id) => document.getElementById(id);
let askKey = () => {};

/** `ask(error)` is called where the key is missing (error null) or wrong. */
export const wireNotice = (ask) => (askKey = ask);

export function say(text) {
  $("status").textContent = text;
}

export function note(text) {
  $("warnings").hidden = !text;
  $("warnings").textContent = text;
}

/** Shows an error, with the prompt that it was about where there are several; null takes it away. */
export function showError(error, about = "") {
  const box = $("error");
  box.hidden = !error;
  if (!error) return box.replaceChildren();
  const text = about ? `“${about}”: ${error.message}` : error.message;
  const line = Object.assign(document.createElement("span"), { textContent: text });
  const facts = [error.code, error.requestId].filter(Boolean).join("  ");
  const small = Object.assign(document.createElement("small"), { textContent: facts });
  box.replaceChildren(line, ...(facts ? [small] : []));
}

/** Runs `work`; asks for the key where it is missing or wrong, shows every other error. */
export async function guarded(work) {
  try {
    showError(null);
    return await work();
  } catch (error) {
    complain(error);
  }
}

export function complain(error, about) {
  if (error.status === 401) askKey(key.get() ? error : null);
  else if (error instanceof Refused || error instanceof Unreachable || error.constructor === Error) showError(error, about);
  else throw error;
}
