// What a picture begins from: pictures that were dropped, pasted, chosen or printed before, and a mask of the first.

import * as mask from "./mask.js";

/** By the names of stored pictures, what they began from, as far as this page was there when they were made. */
export const known = new Map();

const $ = (id) => document.getElementById(id);
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];
const MAX_BYTES = 10e6;
const MAX_SIDE = 2048;
let pictures = []; // {blob, url, width, height, title}
let onChange = () => {};
let can = { max_pictures: 0, masks: false, strength: false };

/** `changed` hears that there are other pictures to begin from now. */
export function wireBeginning(changed) {
  onChange = changed;
  mask.wireMask(draw);
  $("mask-paint").addEventListener("click", () => mask.paint(pictures[0]));
}

/** What the chosen endpoint takes: `max_pictures`, `masks` and `strength` of its abilities. */
export function allow(abilities) {
  can = abilities;
  draw();
}

export const isAllowed = () => can.max_pictures > 0;

/** Adds a picture; the only one of a model that works from one picture gives way. An Error has words for the user. */
export async function add(blob, title) {
  const picture = await read(blob, title);
  if (can.max_pictures === 1) pictures = [picture];
  else if (pictures.length >= can.max_pictures) throw new Error(`This endpoint begins from ${can.max_pictures} pictures at most; remove one first.`);
  else pictures = [...pictures, picture];
  if (pictures[0] === picture) mask.clear();
  draw();
}

/** What the next request begins from, with the mask's strokes and the first picture's size; null: words alone. */
export function taken() {
  const usable = pictures.slice(0, can.max_pictures);
  if (!usable.length) return null;
  return { pictures: usable, strokes: can.masks ? mask.strokes() : [], width: usable[0].width, height: usable[0].height };
}

/** Puts back what a picture began from; null for words alone. */
export function putBack(from) {
  pictures = from?.pictures ?? [];
  mask.clear(from?.strokes ?? []);
  draw();
}

/** The fields of a request that bring these pictures along. */
export async function wire(from) {
  const image = await Promise.all(from.pictures.map(async ({ blob }) => ({ image: await dataUrl(blob) })));
  if (!from.strokes.length) return { image };
  return { image, mask: { image: await dataUrl(await maskOf(from)) } };
}

/** The mask as a file. */
export const maskOf = (from) => mask.file(from);

async function read(blob, title) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Error(`${title} is not a picture that this browser can read.`);
  }
  const { width, height } = bitmap;
  if (!SENT_AS_THEY_ARE.includes(blob.type) || blob.size > MAX_BYTES) blob = await redrawn(bitmap);
  bitmap.close();
  return { blob, url: URL.createObjectURL(blob), width, height, title };
}

/** The same picture as a file that the server reads, and not too large a one. */
function redrawn(bitmap) {
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function draw() {
  const some = pictures.length > 0;
  $("from").hidden = !isAllowed();
  $("from-pictures").hidden = !some;
  $("from-pictures").replaceChildren(...pictures.map(item));
  const more = some && can.max_pictures > 1;
  $("from-choose").textContent = !some ? "Begin from a picture" : more ? "Add a picture" : "Another picture";
  $("mask-paint").hidden = !some || !can.masks;
  $("mask-paint").textContent = mask.strokes().length ? "Change the mask" : "Paint a mask";
  $("strength-row").hidden = !some || !can.strength;
  $("strength").placeholder = mask.strokes().length ? "1" : "0.8"; // the server's own defaults
  onChange();
}

function item(picture, at) {
  const image = Object.assign(document.createElement("img"), { src: picture.url, alt: `Begins from ${picture.title}` });
  const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×", className: "tool" });
  remove.setAttribute("aria-label", `Remove ${picture.title}`);
  remove.addEventListener("click", () => {
    pictures = pictures.filter((other) => other !== picture);
    if (at === 0) mask.clear();
    draw();
    $("from-choose").focus();
  });
  const line = document.createElement("li");
  line.append(image, remove);
  if (at === 0 && mask.strokes().length && can.masks) line.append(mask.thumbnail(picture));
  return line;
}
