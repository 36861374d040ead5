// The drawer: the pictures that the server keeps for this key. They are searched, starred, picked, and put side by side.

import { call, local, read } from "./api.js";
import { known } from "./beginning.js";
import { guarded, say } from "./notice.js";
import { fileName, modelText } from "./stage.js";
import { zipOf } from "./zip.js";

const $ = (id) => document.getElementById(id);
const SEARCH_MS = 250;
const LABELS = {
  prompt: "Prompt", model: "Endpoint", num_inference_steps: "Steps", guidance_scale: "Guidance", seed: "Seed",
  size: "Size", negative_prompt: "Not in it", strength: "Strength",
};
let prints = []; // {name, src, fields, starred, from}
let hasMore = false;
let onShow = () => {};
let onGone = () => {};
let pointed = null;
const picked = new Set(); // names, in the order in which they were picked
const cards = new Map(); // by name

/** `show` takes a print that is to lie on the sheet, `gone` the names of deleted ones. */
export function wireGallery(show, gone) {
  onShow = show;
  onGone = gone;
  $("older").addEventListener("click", () => guarded(() => load(prints.at(-1)?.name)));
  $("compare").addEventListener("click", compare);
  $("pick-zip").addEventListener("click", () => guarded(download));
  $("pick-star").addEventListener("click", () => guarded(() => star(chosen(), !chosen().every((print) => print.starred))));
  $("pick-delete").addEventListener("click", () => guarded(() => remove([...picked])));
  $("pick-none").addEventListener("click", () => pick(null));
  $("starred").addEventListener("click", () => {
    $("starred").setAttribute("aria-pressed", String($("starred").getAttribute("aria-pressed") === "false"));
    guarded(() => load());
  });
  let soon;
  $("search").addEventListener("input", () => {
    clearTimeout(soon);
    soon = setTimeout(() => guarded(() => load()), SEARCH_MS);
  });
}

/** All prints that are loaded, newest first. */
export const all = () => prints;
export const find = (name) => prints.find((print) => print.name === name);

/** Loads the newest prints that match the search, or those before the one named. */
export async function load(before) {
  const { found, more } = await ask(before);
  prints = before ? [...prints, ...found] : found;
  hasMore = more;
  draw();
}

/** Puts what is new before what is loaded. */
export async function renew() {
  const { found, more } = await ask();
  const older = prints.filter((print) => !found.some(({ name }) => name === print.name));
  const meets = older.length < prints.length; // else there may be prints between them
  prints = more && meets ? [...found, ...older] : found;
  hasMore = meets && older.length ? hasMore : more;
  draw();
}

async function ask(before) {
  const query = new URLSearchParams();
  if (before) query.set("before", before);
  if ($("search").value.trim()) query.set("search", $("search").value.trim());
  if ($("starred").getAttribute("aria-pressed") === "true") query.set("starred", "true");
  const { data, has_more: more } = await read(`dedicated/v1/images?${query}`);
  const found = data.map(({ name, url, parameters, starred }) => {
    return { name, src: local(url), fields: parameters, starred, from: known.get(name) };
  });
  return { found, more };
}

export async function remove(names) {
  const text = names.length === 1 ? "this picture" : `these ${names.length} pictures`;
  if (!confirm(`Delete ${text} from the server? The same settings make ${names.length === 1 ? "it" : "them"} again.`)) return;
  for (const name of names) {
    await call(`dedicated/v1/images/${name}`, { method: "DELETE" });
    prints = prints.filter((print) => print.name !== name);
    picked.delete(name);
  }
  draw();
  onGone(names);
  say("Deleted");
}

/** Starred prints stay for good. */
export async function star(list, on) {
  for (const print of list) {
    await call(`dedicated/v1/images/${print.name}`, { method: "PATCH", body: JSON.stringify({ starred: on }) });
    print.starred = on;
  }
  draw();
  say(on ? "Starred, so it is kept" : "No longer starred");
}

/** Marks which print lies on the sheet. */
export function pointAt(name) {
  pointed = name;
  for (const [each, card] of cards) card.querySelector(".show").setAttribute("aria-current", String(each === name));
}

const chosen = () => [...picked].map(find).filter(Boolean);

async function download() {
  const files = [];
  for (const print of chosen()) {
    say(`Fetching ${files.length + 1} of ${picked.size}`);
    files.push([fileName(print), new Uint8Array(await (await call(print.src)).arrayBuffer())]);
  }
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(zipOf(files)), download: "prints.zip" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  say("Downloaded");
}

// ---------------------------------------------------------------- the cards

function draw() {
  const filtered = $("search").value.trim() || $("starred").getAttribute("aria-pressed") === "true";
  for (const name of picked) if (!find(name)) picked.delete(name);
  $("empty").hidden = prints.length > 0;
  $("empty").textContent = filtered ? "Nothing like that among your prints." : "Nothing here yet. The server keeps what you make, with its settings.";
  $("filters").hidden = !prints.length && !filtered;
  $("older").hidden = !hasMore;
  for (const [name, item] of cards) {
    if (find(name)) continue;
    item.remove();
    cards.delete(name);
  }
  for (const [at, print] of prints.entries()) {
    const item = card(print);
    if ($("prints").children[at] !== item) $("prints").insertBefore(item, $("prints").children[at] ?? null);
  }
  drawPicked();
}

function drawPicked() {
  const some = chosen();
  $("picks").hidden = !some.length;
  $("picked").textContent = `${some.length} picked`;
  $("compare").disabled = some.length !== 2;
  $("pick-star").textContent = some.every((print) => print.starred) ? "Unstar" : "Star";
  for (const [name, item] of cards) drawMarks(item, find(name));
}

/** A card is made once and lies where it is, so that the keyboard's focus stays there too. */
function card(print) {
  const item = cards.get(print.name) ?? newCard(print);
  cards.set(print.name, item);
  item.querySelector("img").src = print.src;
  return item;
}

function newCard({ name, fields }) {
  const item = document.createElement("li");
  const show = Object.assign(document.createElement("button"), { type: "button", className: "show" });
  show.dataset.name = name;
  show.setAttribute("aria-current", String(name === pointed));
  const image = Object.assign(document.createElement("img"), { alt: "", loading: "lazy" });
  const title = Object.assign(document.createElement("em"), { textContent: fields.prompt, title: fields.prompt });
  const facts = [`${modelText(fields)}, ${fields.width} × ${fields.height}`, `${fields.num_inference_steps} steps, seed ${fields.seed}`];
  const small = facts.map((text) => Object.assign(document.createElement("small"), { textContent: text, title: text }));
  show.append(image, title, ...small);
  show.addEventListener("click", () => onShow(find(name)));
  const mark = button("mark", () => pick(name));
  const stars = button("star", () => guarded(() => star([find(name)], !find(name).starred)));
  item.append(show, mark, stars);
  return item;
}

function button(className, act) {
  const made = Object.assign(document.createElement("button"), { type: "button", className });
  made.addEventListener("click", act);
  return made;
}

function drawMarks(item, print) {
  const title = `${print.fields.prompt}, seed ${print.fields.seed}`;
  for (const [kind, on, signs, verb] of [
    ["mark", picked.has(print.name), "+✓", "Pick"],
    ["star", print.starred, "☆★", "Star"],
  ]) {
    const made = item.querySelector(`.${kind}`);
    made.textContent = signs[Number(on)];
    made.setAttribute("aria-pressed", String(on));
    made.setAttribute("aria-label", `${verb}: ${title}`);
  }
}

/** Picks a print, or lets it go; null lets all go. */
function pick(name) {
  if (name === null) picked.clear();
  else if (!picked.delete(name)) picked.add(name);
  drawPicked();
}

// ---------------------------------------------------------------- side by side

function compare() {
  const pair = chosen();
  $("pair").replaceChildren(
    ...pair.map((print) => Object.assign(document.createElement("img"), { src: print.src, alt: print.fields.prompt })),
  );
  const values = pair.map(({ fields }) => ({ ...fields, model: modelText(fields), size: `${fields.width} × ${fields.height}` }));
  const rows = Object.entries(LABELS).filter(([name]) => values.some((value) => value[name] != null));
  $("differences").tBodies[0].replaceChildren(
    ...rows.map(([name, label]) => {
      const row = document.createElement("tr");
      row.className = values[0][name] === values[1][name] ? "" : "differs";
      const head = Object.assign(document.createElement("th"), { scope: "row", textContent: label });
      row.append(head, ...values.map((value) => Object.assign(document.createElement("td"), { textContent: value[name] ?? "" })));
      return row;
    }),
  );
  $("compare-dialog").showModal();
}
