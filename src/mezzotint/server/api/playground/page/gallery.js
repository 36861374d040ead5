// The drawer: the pictures that the server keeps for this key, and two of them side by side.

import { call, local, read } from "./api.js";
import { known } from "./beginning.js";

const $ = (id) => document.getElementById(id);
const LABELS = {
  prompt: "Prompt", model: "Endpoint", num_inference_steps: "Steps", guidance_scale: "Guidance", seed: "Seed",
  size: "Size", negative_prompt: "Not in it",
};
let prints = [];
let marked = [];
let onShow = () => {};

export function wireGallery(show) {
  onShow = show;
  $("older").addEventListener("click", () => load(prints.at(-1)?.name));
  $("compare").addEventListener("click", compare);
}

/** Loads the newest prints, or those before the one named. */
export async function load(before) {
  const query = before ? `?before=${encodeURIComponent(before)}` : "";
  const page = await read(`dedicated/v1/images${query}`);
  const found = page.data.map(({ name, url, parameters }) => ({ name, src: local(url), fields: parameters, from: known.get(name) }));
  prints = before ? [...prints, ...found] : found;
  marked = marked.filter((name) => prints.some((print) => print.name === name));
  $("older").hidden = !page.has_more;
  draw();
}

export async function remove(name) {
  await call(`dedicated/v1/images/${name}`, { method: "DELETE" });
  prints = prints.filter((print) => print.name !== name);
  marked = marked.filter((other) => other !== name);
  draw();
}

/** Marks which print lies on the sheet. */
export function pointAt(name) {
  for (const button of $("prints").querySelectorAll(".show")) {
    button.setAttribute("aria-current", String(button.dataset.name === name));
  }
}

function draw() {
  $("empty").hidden = prints.length > 0;
  $("compare-hint").hidden = prints.length < 2;
  $("compare").hidden = prints.length < 2;
  $("compare").disabled = marked.length !== 2;
  $("prints").replaceChildren(...prints.map(card));
}

function card(print) {
  const item = document.createElement("li");
  const show = document.createElement("button");
  Object.assign(show, { type: "button", className: "show" });
  show.dataset.name = print.name;
  const image = Object.assign(document.createElement("img"), { src: print.src, alt: "", loading: "lazy" });
  const title = Object.assign(document.createElement("em"), { textContent: print.fields.prompt, title: print.fields.prompt });
  const { seed, num_inference_steps: steps } = print.fields;
  const note = Object.assign(document.createElement("small"), { textContent: `${steps} steps, seed ${seed}` });
  show.append(image, title, note);
  show.addEventListener("click", () => onShow(print));
  item.append(show, mark(print));
  return item;
}

function mark(print) {
  const place = marked.indexOf(print.name);
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: "mark", textContent: place < 0 ? "+" : "AB"[place] });
  button.setAttribute("aria-pressed", String(place >= 0));
  button.setAttribute("aria-label", `Mark to compare: ${print.fields.prompt}, seed ${print.fields.seed}`);
  button.addEventListener("click", () => {
    marked = place >= 0 ? marked.filter((name) => name !== print.name) : [...marked, print.name].slice(-2);
    draw();
    const again = [...$("prints").querySelectorAll(".show")].find((other) => other.dataset.name === print.name);
    again?.parentElement.querySelector(".mark").focus();
  });
  return button;
}

function compare() {
  const pair = marked.map((name) => prints.find((print) => print.name === name));
  $("pair").replaceChildren(
    ...pair.map((print) => Object.assign(document.createElement("img"), { src: print.src, alt: print.fields.prompt })),
  );
  const values = pair.map(({ fields }) => ({ ...fields, size: `${fields.width} × ${fields.height}` }));
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
