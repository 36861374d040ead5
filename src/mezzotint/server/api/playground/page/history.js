// Earlier prompts: by the arrow keys at the ends of the prompt, as in a shell, and as a list.

import * as gallery from "./gallery.js";

const $ = (id) => document.getElementById(id);
const KEPT = "mezzotint-prompts"; // for this browser session only; the prints know the prompts of earlier ones
const MAX_KEPT = 100;
let back = 0; // how many prompts ago; 0 is what is being written
let draft = "";

const asked = () => JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");

/** Takes note of a prompt that was asked for. */
export function remember(prompt) {
  const rest = asked().filter((each) => each !== prompt);
  sessionStorage.setItem(KEPT, JSON.stringify([prompt, ...rest].slice(0, MAX_KEPT)));
  back = 0;
}

/** Newest first, each once. */
const prompts = () => [...new Set([...asked(), ...gallery.all().map(({ fields }) => fields.prompt)])];

function go(by) {
  const list = prompts();
  const next = Math.min(list.length, Math.max(0, back + by));
  if (next === back) return false;
  if (back === 0) draft = $("prompt").value;
  back = next;
  write(back ? list[back - 1] : draft);
  return true;
}

function write(text) {
  $("prompt").value = text;
  $("prompt").dispatchEvent(new InputEvent("input", { bubbles: true, data: null }));
}

function list() {
  $("history-list").replaceChildren(...prompts().map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => {
      $("history-dialog").close();
      write(text);
      $("prompt").focus();
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  $("history-empty").hidden = prompts().length > 0;
  $("history-dialog").showModal();
}

export function wireHistory() {
  const prompt = $("prompt");
  prompt.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || prompt.selectionStart !== prompt.selectionEnd) return;
    const up = event.key === "ArrowUp" && prompt.selectionStart === 0;
    const down = event.key === "ArrowDown" && prompt.selectionEnd === prompt.value.length && back > 0;
    if (!up && !down) return;
    if (!go(up ? 1 : -1)) return;
    event.preventDefault();
    const place = up ? 0 : prompt.value.length;
    prompt.setSelectionRange(place, place);
  });
  prompt.addEventListener("input", (event) => {
    if (event.data !== null || event.inputType) back = 0;
  });
  $("history").addEventListener("click", list);
}
