// The mask: what is to be made anew, painted on the plate with a brush, by hand or by keyboard.
// A stroke is {erase, radius, points: [[x, y], ...]} or {invert: true}, in pixels of the canvas.

const $ = (id) => document.getElementById(id);
const MAX_SIDE = 1024;
const STEP = 1 / 40; // of the picture's longer side: how far an arrow key moves the brush
let list = [];
let undone = [];
let canvas, context;
let brush = { x: 0, y: 0 };
let erase = false;
let stroke = null; // the one being painted
let onDone = () => {};

export const strokes = () => list;

export function clear(next = []) {
  list = next;
  undone = [];
}

const isPainting = () => !$("brush").hidden;

/** Lays the picture on the plate to be painted on. */
export function paint(picture) {
  const [width, height] = size(picture);
  Object.assign(canvas, { width, height });
  brush = { x: width / 2, y: height / 2 };
  erase = false;
  undone = [];
  $("mask-picture").src = picture.url;
  $("mask-plate").style.setProperty("--shape", width / height);
  for (const id of ["welcome", "print", "strip"]) $(id).classList.add("under");
  $("actions").classList.add("under");
  $("masking").hidden = $("brush").hidden = false;
  redraw();
  canvas.focus();
}

export function finish() {
  if (!isPainting()) return;
  if (stroke) end();
  for (const id of ["welcome", "print", "strip", "actions"]) $(id).classList.remove("under");
  $("masking").hidden = $("brush").hidden = true;
  onDone();
  $("mask-paint").focus();
}

/** The size of a picture's mask: its shape, but not more pixels than a brush needs. */
function size({ width, height }) {
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/** The mask as the server takes it, a PNG: white is made anew, black stays. */
export function file({ strokes: painted, ...picture }) {
  const made = document.createElement("canvas");
  [made.width, made.height] = size(picture);
  const on = made.getContext("2d");
  trace(on, painted, "#fff");
  on.globalCompositeOperation = "destination-over";
  on.fillStyle = "#000";
  on.fillRect(0, 0, made.width, made.height);
  return new Promise((resolve) => made.toBlob(resolve, "image/png"));
}

/** What is painted, to lie over a small picture. */
export function thumbnail(picture) {
  const small = document.createElement("canvas");
  [small.width, small.height] = size(picture);
  trace(small.getContext("2d"), list, colour());
  small.setAttribute("aria-hidden", "true");
  return small;
}

const colour = () => getComputedStyle(document.documentElement).getPropertyValue("--mask");

function trace(on, painted, ink) {
  on.clearRect(0, 0, on.canvas.width, on.canvas.height);
  for (const each of painted) draw(on, each, ink);
}

function draw(on, { erase: off, invert, radius, points }, ink) {
  on.fillStyle = on.strokeStyle = ink;
  on.globalCompositeOperation = invert ? "source-out" : off ? "destination-out" : "source-over";
  if (invert) return on.fillRect(0, 0, on.canvas.width, on.canvas.height);
  Object.assign(on, { lineWidth: 2 * radius, lineCap: "round", lineJoin: "round" });
  on.beginPath();
  on.moveTo(...points[0]);
  for (const point of points) on.lineTo(...point);
  on.stroke();
}

function redraw() {
  trace(context, stroke ? [...list, stroke] : list, colour());
  $("brush-undo").disabled = !list.length;
  $("brush-redo").disabled = !undone.length;
  $("brush-clear").disabled = !list.length;
  $("brush-erase").setAttribute("aria-pressed", String(erase));
  place();
}

const radius = () => (Number($("brush-size").value) / 200) * Math.max(canvas.width, canvas.height) * 0.6;

/** Shows where the brush is, and how large. */
function place() {
  const ring = $("brush-ring").style;
  ring.left = `${(100 * brush.x) / canvas.width}%`;
  ring.top = `${(100 * brush.y) / canvas.height}%`;
  ring.width = `${(200 * radius()) / canvas.width}%`;
}

function begin() {
  stroke = { erase, radius: radius(), points: [[brush.x, brush.y]] };
  redraw();
}

function extend() {
  stroke.points.push([brush.x, brush.y]);
  redraw();
}

function end() {
  push(stroke);
  stroke = null;
}

function push(next) {
  list = [...list, next];
  undone = [];
  redraw();
}

function undo() {
  if (!list.length) return;
  undone.push(list.at(-1));
  list = list.slice(0, -1);
  redraw();
}

function redo() {
  if (!undone.length) return;
  list = [...list, undone.pop()];
  redraw();
}

function move(event) {
  const box = canvas.getBoundingClientRect();
  brush = {
    x: ((event.clientX - box.left) / box.width) * canvas.width,
    y: ((event.clientY - box.top) / box.height) * canvas.height,
  };
}

function resize(by) {
  $("brush-size").value = Number($("brush-size").value) + by;
  place();
}

function toggleErase() {
  erase = !erase;
  redraw();
}

function shift(x, y, event) {
  const step = Math.max(canvas.width, canvas.height) * STEP * (event.shiftKey ? 4 : 1);
  brush.x = Math.min(canvas.width, Math.max(0, brush.x + x * step));
  brush.y = Math.min(canvas.height, Math.max(0, brush.y + y * step));
  if (stroke) extend();
  else place();
}

const KEYS = {
  ArrowLeft: (event) => shift(-1, 0, event),
  ArrowRight: (event) => shift(1, 0, event),
  ArrowUp: (event) => shift(0, -1, event),
  ArrowDown: (event) => shift(0, 1, event),
  " ": (event) => event.repeat || (stroke ? end() : begin()),
  "[": () => resize(-4),
  "]": () => resize(4),
  e: toggleErase,
  i: () => push({ invert: true }),
  z: (event) => (event.shiftKey ? redo : undo)(),
  Enter: () => finish(),
  Escape: () => finish(),
};

function wirePointer() {
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    move(event);
    begin();
  });
  canvas.addEventListener("pointermove", (event) => {
    const parts = event.getCoalescedEvents?.() ?? [];
    for (const part of parts.length ? parts : [event]) {
      move(part);
      if (stroke && event.buttons) stroke.points.push([brush.x, brush.y]);
    }
    if (stroke) redraw();
    else place();
  });
  for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, () => stroke && end());
}

export function wireMask(done) {
  onDone = done;
  canvas = $("mask");
  context = canvas.getContext("2d");
  wirePointer();
  canvas.addEventListener("keydown", (event) => {
    const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || event.altKey || ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() !== "z")) return;
    event.preventDefault();
    act(event);
  });
  $("brush-size").addEventListener("input", place);
  $("brush-erase").addEventListener("click", toggleErase);
  $("brush-undo").addEventListener("click", undo);
  $("brush-redo").addEventListener("click", redo);
  $("brush-invert").addEventListener("click", () => push({ invert: true }));
  $("brush-clear").addEventListener("click", () => {
    clear();
    redraw();
  });
  $("brush-done").addEventListener("click", finish);
}
