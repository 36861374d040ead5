// The sheet in the middle: pictures that come out of the noise, and what is said about them.
// A set is what lies there together: {pictures: [{src, fields, name, from}], at, grain, grid}. `src` null has nothing to show
// yet, `grid` says what its rows and columns are, if it is one, `name` is the server's for a stored picture, `from` is what it began from where this page knows it.

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
  drawStrip(pictures);
  if (set) {
    if (set.grain) roughen();
    grain(set, set.grain);
    draw();
  }
  onLay();
}

/** All pictures of a set; of a grid with what its rows and columns are. */
function drawStrip(pictures) {
  const grid = set?.grid;
  $("strip").hidden = pictures.length < 2;
  $("strip").replaceChildren(...(pictures.length < 2 ? [] : pictures.map(thumbnail)));
  $("strip").classList.toggle("grid", Boolean(grid));
  $("strip").style.setProperty("--columns", grid?.columns.length ?? 1);
  $("axes").hidden = $("grid-sheet").hidden = !grid;
  if (grid) $("axes").textContent = `Columns: ${grid.x} ${grid.columns.join(", ")}${grid.rows.length > 1 ? `; rows: ${grid.y} ${grid.rows.join(", ")}` : ""}`;
}

/** What a cell of a grid differs in. */
function place(at) {
  const { x, y, columns, rows } = set.grid;
  const row = rows[Math.floor(at / columns.length)];
  return `${x} ${columns[at % columns.length]}${rows.length > 1 ? `, ${y} ${row}` : ""}`;
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
  if (of === set && !of.grid) $("plate").style.setProperty("--grain", share);
}

/** The set of a grid's cells, which are requests of their own. */
export function gridOf(grid, from) {
  const pictures = grid.cells.map((fields) => ({ src: null, fields, from }));
  return { pictures, at: 0, grain: 1, grid };
}

export function preview(of, index, data) {
  if (!of.pictures[index]) return;
  of.pictures[index].src = `data:image/png;base64,${data}`;
  refresh(of, index);
}

/** The finished pictures in the places of their previews. */
export function finish(of, answer, first = 0) {
  answer.data.forEach((item, number) => {
    const at = first + number;
    const picture = of.pictures[at];
    if (!picture) return;
    const { width, height } = item;
    picture.src = local(item.url);
    picture.name = pictureName(item.url);
    picture.fields = { ...picture.fields, seed: item.seed, width, height };
    refresh(of, at);
  });
  if (of.pictures.every(({ name }) => name)) grain(of, 0);
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
  if (set.grid) $("plate").style.setProperty("--grain", name ? 0 : src ? 0.4 : 1); // each cell has its own
  const edition = set.pictures.length > 1 ? `, ${set.at + 1}/${set.pictures.length}` : "";
  $("edition").textContent = `${modelText(fields)}${edition}`;
  $("caption").textContent = fields.prompt;
  $("caption").title = fields.prompt;
  $("signature").textContent = `seed ${fields.seed}`;
  if (set.grid) $("edition").textContent = place(set.at);
  $("actions").hidden = !name;
  if (name) Object.assign($("download"), { href: src, download: fileName(picture) });
  for (const [at, item] of [...$("strip").children].entries()) {
    item.firstChild.setAttribute("aria-current", String(at === set.at));
  }
}

function thumbnail(picture, at) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-label", set.grid ? place(at) : `Picture ${at + 1}`);
  button.title = set.grid ? place(at) : "";
  const image = document.createElement("img");
  image.alt = "";
  if (picture.src) image.src = picture.src;
  button.append(image);
  button.addEventListener("click", () => turn(at));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

/** The endpoint and the adapters with their strengths: `emoji:ink 0.5 + glow`. */
export function modelText({ model, adapters }) {
  if (!adapters?.length) return model;
  const uses = adapters.map(({ route, scale }) => (scale == null ? route : `${route} ${scale}`));
  return `${model.split(":")[0]}:${uses.join(" + ")}`;
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
