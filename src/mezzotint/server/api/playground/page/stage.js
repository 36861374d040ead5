// The sheet in the middle: pictures that come out of the noise, and what is said about them.
// A set is what lies there together: {pictures: [{src, fields, name, from}], at, grain}. `src` null has nothing to show
// yet, `name` is the server's for a stored picture, `from` is what it began from where this page knows it.

import { local, pictureName } from "./api.js";

const $ = (id) => document.getElementById(id);
let set = null;
let onLay = () => {};

export const wireStage = (listener) => (onLay = listener);

/** The set that lies on the sheet, null for the welcome; and its picture in front. */
export const lying = () => set;
export const shown = () => set?.pictures[set.at];

export const setOf = (pictures, at = 0) => ({ pictures, at, grain: 0 });

/** The plate as it is before the first step: as many as are asked for, all noise. */
export function noise(fields, from) {
  const seeds = Array.from({ length: fields.n ?? 1 }, (_, at) => (BigInt(fields.seed) + BigInt(at)).toString());
  return { pictures: seeds.map((seed) => ({ src: null, fields: single(fields, seed), from })), at: 0, grain: 1 };
}

/** Lays a set on the sheet; null clears it for the welcome. */
export function lay(next) {
  set = next;
  const pictures = set?.pictures ?? [];
  $("welcome").hidden = Boolean(set);
  $("print").hidden = !set;
  $("actions").hidden = true;
  $("strip").hidden = pictures.length < 2;
  $("strip").replaceChildren(...(pictures.length < 2 ? [] : pictures.map(thumbnail)));
  if (set) {
    if (set.grain) roughen();
    grain(set, set.grain);
    draw();
  }
  onLay();
}

/** Puts another picture of the set in front. */
export function turn(at) {
  set.at = at;
  draw();
  onLay();
}

/** How much of the noise is left in a set, from 1 to 0. */
export function grain(of, share) {
  of.grain = share;
  if (of === set) $("plate").style.setProperty("--grain", share);
}

export function preview(of, index, data) {
  if (!of.pictures[index]) return;
  of.pictures[index].src = `data:image/png;base64,${data}`;
  refresh(of, index);
}

/** The finished pictures in the places of their previews. */
export function finish(of, answer) {
  answer.data.forEach((item, at) => {
    const picture = of.pictures[at];
    if (!picture) return;
    const { width, height } = item;
    picture.src = local(item.url);
    picture.name = pictureName(item.url);
    picture.fields = { ...picture.fields, seed: item.seed, width, height };
    refresh(of, at);
  });
  grain(of, 0);
}

/** The fields of one picture of a request. */
function single({ n, ...fields }, seed) {
  return { ...fields, seed };
}

function refresh(of, at) {
  if (of !== set) return;
  const image = $("strip").children[at]?.querySelector("img");
  if (image) image.src = set.pictures[at].src;
  if (at === set.at) {
    draw();
    onLay();
  }
}

/** The shape of a picture: its own, else that of what it begins from. */
function shape({ fields, from }) {
  if (fields.width && fields.height) return fields.width / fields.height;
  const [first] = from?.pictures ?? [];
  return first ? first.width / first.height : 1;
}

function draw() {
  const picture = shown();
  const { src, fields, name } = picture;
  const image = $("picture");
  if (src) image.src = src;
  else image.removeAttribute("src");
  image.alt = src ? fields.prompt : "";
  $("plate").style.setProperty("--shape", shape(picture));
  const edition = set.pictures.length > 1 ? `, ${set.at + 1}/${set.pictures.length}` : "";
  $("edition").textContent = `${fields.model}${edition}`;
  $("caption").textContent = fields.prompt;
  $("caption").title = fields.prompt;
  $("signature").textContent = `seed ${fields.seed}`;
  $("actions").hidden = !name;
  if (name) Object.assign($("download"), { href: src, download: fileName(picture) });
  for (const [at, item] of [...$("strip").children].entries()) {
    item.firstChild.setAttribute("aria-current", String(at === set.at));
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
  button.addEventListener("click", () => turn(at));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

const slug = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "") || "picture";

/** What a stored picture is called in a folder of downloads. */
export function fileName({ name, fields }) {
  return `${slug(fields.prompt)}-${fields.seed}${name.slice(name.lastIndexOf("."))}`;
}

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
