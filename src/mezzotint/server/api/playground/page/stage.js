// The sheet in the middle: pictures that come out of the noise, and what is said about them.

import { local } from "./api.js";

const $ = (id) => document.getElementById(id);
let pictures = [];
let current = 0;

export const shown = () => pictures[current];

/** Pictures are {src, fields, name}: `src` null has nothing to show yet, `name` is the server's for a stored one. */
export function show(list, at = 0) {
  pictures = list;
  current = at;
  $("welcome").hidden = true;
  $("print").hidden = false;
  $("strip").hidden = list.length < 2;
  $("strip").replaceChildren(...(list.length < 2 ? [] : list.map(thumbnail)));
  draw();
}

export function welcome() {
  pictures = [];
  $("welcome").hidden = false;
  $("print").hidden = $("strip").hidden = $("actions").hidden = true;
}

/** The plate as it is before the first step: as many as are asked for, all noise. */
export function begin(fields) {
  const seeds = Array.from({ length: fields.n ?? 1 }, (_, at) => (BigInt(fields.seed) + BigInt(at)).toString());
  roughen();
  grain(1);
  show(seeds.map((seed) => ({ src: null, fields: single(fields, seed) })));
}

/** What lies on the sheet, to be put back when nothing comes of the next request. */
export const lying = () => ({ pictures, current });
export function putBack(before) {
  grain(0);
  if (before.pictures.length) show(before.pictures, before.current);
  else welcome();
}

/** How much of the noise is left, from 1 to 0. */
export function grain(share) {
  $("plate").style.setProperty("--grain", share);
}

export function preview(index, data) {
  if (!pictures[index]) return;
  pictures[index].src = `data:image/png;base64,${data}`;
  refresh(index);
}

/** The finished pictures in the places of their previews. */
export function finish(answer) {
  answer.data.forEach((item, at) => {
    if (!pictures[at]) return;
    const { width, height } = item;
    const name = new URL(item.url).pathname.split("/").pop();
    const fields = { ...pictures[at].fields, seed: item.seed, width, height };
    pictures[at] = { src: local(item.url), fields, name };
    refresh(at);
  });
  grain(0);
}

/** The fields of one picture of a request. */
function single({ n, ...fields }, seed) {
  return { ...fields, seed };
}

function refresh(at) {
  const image = $("strip").children[at]?.querySelector("img");
  if (image) image.src = pictures[at].src;
  if (at === current) draw();
}

function draw() {
  const { src, fields, name } = shown();
  const image = $("picture");
  if (src) image.src = src;
  else image.removeAttribute("src");
  image.alt = src ? fields.prompt : "";
  $("plate").style.setProperty("--shape", (fields.width ?? 1) / (fields.height ?? fields.width ?? 1));
  const edition = pictures.length > 1 ? `, ${current + 1}/${pictures.length}` : "";
  $("edition").textContent = `${fields.model}${edition}`;
  $("caption").textContent = fields.prompt;
  $("caption").title = fields.prompt;
  $("signature").textContent = `seed ${fields.seed}`;
  $("actions").hidden = !name;
  if (name) Object.assign($("download"), { href: src, download: `${slug(fields.prompt)}-${fields.seed}.png` });
  for (const [at, item] of [...$("strip").children].entries()) {
    item.firstChild.setAttribute("aria-current", String(at === current));
  }
}

function thumbnail(picture, at) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-label", `Picture ${at + 1}`);
  const image = document.createElement("img");
  image.alt = "";
  if (picture.src) image.src = picture.src;
  button.append(image);
  button.addEventListener("click", () => {
    current = at;
    draw();
  });
  const item = document.createElement("li");
  item.append(button);
  return item;
}

const slug = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "") || "picture";

/** Rocks the plate: dark ground with a burr of light specks, as a mezzotint begins. */
function roughen() {
  const canvas = $("ground");
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const light = 28 + 150 * Math.random() ** 2.4;
    pixels.data.set([light * 1.04, light, light * 0.92, 255], at);
  }
  context.putImageData(pixels, 0, 0);
}
