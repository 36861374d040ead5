// A grid: the same request with other steps, guidance, seeds, strengths or adapters, as rows and columns.

import * as adapters from "./adapters.js";
import { chosen } from "./form.js";
import { fileName } from "./stage.js";

const $ = (id) => document.getElementById(id);
const MOST = 100;
const LABEL_PX = 34;
let onAsk = () => {};
let base = {}; // the fields that the grid varies
let from = null;

/** By name: how the axis is called, the values that it begins with, how one is read, and what it makes of the fields. */
const AXES = {
  none: { label: "nothing", start: () => "", read: () => "" },
  steps: { label: "steps", start: () => "4, 8, 16", read: whole(1, 50), set: (value) => ({ num_inference_steps: value }) },
  guidance: { label: "guidance", start: () => "1, 4, 8", read: within(0, 100), set: (value) => ({ guidance_scale: value }) },
  seed: { label: "seed", start: ({ seed }) => [0n, 1n, 2n].map((by) => String(BigInt(seed) + by)).join(", "), read: seed, set: (value) => ({ seed: value }) },
  strength: { label: "strength", start: () => "0.4, 0.6, 0.8", read: within(0, 1), set: (value) => ({ strength: value }) },
  adapter: { label: "adapter", start: () => ["none", ...adapters.routes()].join(", "), read: route, set: (value) => ({ adapter: value }) },
  scale: { label: "adapter strength", start: () => "0.25, 0.5, 1", read: within(-10, 10), set: (value) => ({ scale: value }) },
};

/** `ask` takes the cells: {columns, rows, x, y, cells: [fields]}, row after row, and what they begin from. */
export function wireGrid(ask) {
  onAsk = ask;
  for (const side of ["x", "y"]) {
    $(`grid-${side}`).addEventListener("change", () => {
      $(`grid-${side}-values`).value = AXES[$(`grid-${side}`).value].start(base);
      count();
    });
    $(`grid-${side}-values`).addEventListener("input", count);
  }
  $("grid-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const grid = plan();
    if (!grid) return;
    $("grid-dialog").close();
    onAsk(grid, from);
  });
}

export function openGrid(fields, beginning) {
  const { n, ...single } = fields;
  [base, from] = [single, beginning];
  const can = chosen() ?? {};
  const offered = {
    none: true, steps: true, seed: true, guidance: can.guidance_effective !== false, strength: Boolean(from && can.strength),
    adapter: adapters.routes().length > 0, scale: adapters.named(base).length === 1,
  };
  for (const [side, first] of [["x", "steps"], ["y", "seed"]]) {
    const select = $(`grid-${side}`);
    const before = select.value;
    const names = Object.keys(AXES).filter((name) => offered[name] && (side === "y" || name !== "none"));
    select.replaceChildren(...names.map((name) => new Option(AXES[name].label, name)));
    select.value = names.includes(before) ? before : first;
    $(`grid-${side}-values`).value = AXES[select.value].start(base);
  }
  count();
  $("grid-dialog").showModal();
}

// ---------------------------------------------------------------- what is typed

function within(low, high) {
  return (text) => {
    const value = Number(text);
    if (text === "" || !(value >= low && value <= high)) throw new Error(`${text || "nothing"} is not a number from ${low} to ${high}`);
    return value;
  };
}

function whole(low, high) {
  return (text) => {
    if (!/^\d+$/.test(text)) throw new Error(`${text || "nothing"} is not a whole number`);
    return within(low, high)(text);
  };
}

function seed(text) {
  if (!/^\d{1,19}$/.test(text)) throw new Error(`${text || "nothing"} is not a seed`);
  return BigInt(text).toString();
}

function route(text) {
  if (text !== "none" && !adapters.routes().includes(text)) throw new Error(`there is no adapter ${text}`);
  return text;
}

/** `4, 8, 16`, ranges such as `1-4` and ranges with a step, `10-50 +10`. */
function values(side) {
  const { read } = AXES[$(`grid-${side}`).value];
  const texts = $(`grid-${side}-values`).value.split(",").map((text) => text.trim());
  return texts.flatMap(expand).map(read);
}

function expand(text) {
  const range = /^(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)(?:\s*\+\s*(\d+(?:\.\d+)?))?$/.exec(text);
  if (!range) return [text];
  const [low, high, step] = [range[1], range[2], range[3] ?? "1"].map(Number);
  if (!step || (high - low) / step > MOST) throw new Error(`${text} is too long a range`);
  return Array.from({ length: Math.floor((high - low) / step + 1e-9) + 1 }, (_, at) => String(Number((low + at * step).toFixed(6))));
}

function cell(x, y) {
  const { adapter, scale, ...fields } = { ...base, ...AXES[$("grid-x").value].set(x), ...AXES[$("grid-y").value].set?.(y) };
  let uses = adapters.named(fields);
  if (adapter !== undefined) uses = adapter === "none" ? [] : [{ route: adapter }];
  if (scale !== undefined) uses = uses.map(({ route: name }) => ({ route: name, scale }));
  const { adapters: _, ...rest } = fields;
  return { ...rest, ...adapters.fieldsFor(base.model.split(":")[0], uses) };
}

/** The whole grid; null, with the reason said, where it cannot be. */
function plan() {
  try {
    const columns = values("x");
    const rows = values("y");
    if ($("grid-x").value === $("grid-y").value) throw new Error("rows and columns vary the same thing");
    if (columns.length * rows.length > MOST) throw new Error(`${columns.length * rows.length} pictures are more than ${MOST}`);
    $("grid-note").textContent = `${columns.length} × ${rows.length} = ${columns.length * rows.length} pictures`;
    return { x: AXES[$("grid-x").value].label, y: AXES[$("grid-y").value].label, columns, rows, cells: rows.flatMap((y) => columns.map((x) => cell(x, y))) };
  } catch (error) {
    $("grid-note").textContent = error.message;
    return null;
  }
}

function count() {
  $("grid-make").disabled = !plan();
}

// ---------------------------------------------------------------- as one picture

/** The finished grid as one PNG with its labels. */
export async function sheetOf({ pictures, grid: { x, y, columns, rows } }) {
  const images = await Promise.all(pictures.map(({ src }) => loaded(src)));
  const width = Math.max(...images.map((image) => image.naturalWidth));
  const height = Math.max(...images.map((image) => image.naturalHeight));
  const left = rows.length > 1 ? 150 : 0;
  const canvas = document.createElement("canvas");
  canvas.width = left + columns.length * (width + 8);
  canvas.height = LABEL_PX + rows.length * (height + 8);
  const on = canvas.getContext("2d");
  on.fillStyle = "#fbf8f1";
  on.fillRect(0, 0, canvas.width, canvas.height);
  on.fillStyle = "#221d17";
  on.font = "18px Garamond, serif";
  on.textAlign = "center";
  columns.forEach((value, at) => on.fillText(`${x} ${value}`, left + at * (width + 8) + width / 2, 23, width));
  on.textAlign = "left";
  if (left) rows.forEach((value, at) => on.fillText(`${y} ${value}`, 8, LABEL_PX + at * (height + 8) + height / 2, left - 16));
  images.forEach((image, at) => on.drawImage(image, left + (at % columns.length) * (width + 8), LABEL_PX + Math.floor(at / columns.length) * (height + 8)));
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return [blob, `grid-${fileName(pictures[0])}`];
}

function loaded(src) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("A picture of the grid is no longer there."));
    image.src = src;
  });
}
