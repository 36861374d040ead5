// The full view: one picture over the whole window, with zoom, and the way to its neighbours.

const $ = (id) => document.getElementById(id);
const MAX_ZOOM = 16;
const STEP = 1.25;
let list = [];
let at = 0;
let zoom = 1; // 1 fits the window
let place = { x: 0, y: 0 }; // of the picture's centre from the window's, in pixels
let onTurn = () => {};

/** `turn` hears which picture of the list is looked at. */
export function wireFull(turn) {
  onTurn = turn;
  $("full-previous").addEventListener("click", () => go(-1));
  $("full-next").addEventListener("click", () => go(1));
  $("full-in").addEventListener("click", () => scale(zoom * STEP));
  $("full-out").addEventListener("click", () => scale(zoom / STEP));
  $("full-fit").addEventListener("click", () => scale(1));
  $("full-true").addEventListener("click", () => scale(truly()));
  $("full").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  wirePointer($("full-window"));
}

/** Opens it on a picture of `pictures`, which have {src, fields}. */
export function open(pictures, start) {
  list = pictures;
  at = start;
  if (!$("full").open) $("full").showModal();
  show();
}

const KEYS = {
  ArrowLeft: () => go(-1),
  ArrowRight: () => go(1),
  Home: () => go(-at),
  End: () => go(list.length - 1 - at),
  "+": () => scale(zoom * STEP),
  "=": () => scale(zoom * STEP),
  "-": () => scale(zoom / STEP),
  0: () => scale(1),
  1: () => scale(truly()),
  f: () => $("full").close(),
};

function go(by) {
  const next = Math.min(list.length - 1, Math.max(0, at + by));
  if (next === at) return;
  at = next;
  show();
  onTurn(list[at]);
}

function show() {
  const { src, fields } = list[at];
  Object.assign($("full-picture"), { src, alt: fields.prompt });
  $("full-caption").textContent = fields.prompt;
  $("full-facts").textContent = `${fields.model}, seed ${fields.seed}`;
  $("full-count").textContent = list.length > 1 ? `${at + 1} of ${list.length}` : "";
  $("full-previous").setAttribute("aria-disabled", String(at === 0)); // not `disabled`, which would drop the focus
  $("full-next").setAttribute("aria-disabled", String(at === list.length - 1));
  scale(1);
}

/** The zoom at which a pixel of the picture is a pixel of the screen. */
function truly() {
  const picture = $("full-picture");
  const box = $("full-window").getBoundingClientRect();
  const fits = Math.min(box.width / picture.naturalWidth, box.height / picture.naturalHeight);
  return 1 / fits / devicePixelRatio;
}

/** Zooms, so that what is `around` this place, from the window's centre, stays there. */
function scale(to, around = { x: 0, y: 0 }) {
  const next = Math.min(MAX_ZOOM, Math.max(Math.min(1, truly() || 1), to));
  const grown = next / zoom;
  place = next === 1 ? { x: 0, y: 0 } : { x: around.x - (around.x - place.x) * grown, y: around.y - (around.y - place.y) * grown };
  zoom = next;
  draw();
}

function draw() {
  $("full-picture").style.setProperty("transform", `translate(${place.x}px, ${place.y}px) scale(${zoom})`);
  $("full-window").classList.toggle("zoomed", zoom > 1);
  $("full-zoom").textContent = `${Math.round(100 * zoom)} %`;
}

function wirePointer(view) {
  const from = ({ clientX, clientY }) => {
    const box = view.getBoundingClientRect();
    return { x: clientX - box.left - box.width / 2, y: clientY - box.top - box.height / 2 };
  };
  view.addEventListener("wheel", (event) => {
    event.preventDefault();
    scale(zoom * 1.0015 ** -event.deltaY, from(event));
  }, { passive: false });
  view.addEventListener("dblclick", (event) => scale(zoom === 1 ? Math.max(2, truly()) : 1, from(event)));
  view.addEventListener("pointerdown", (event) => view.setPointerCapture(event.pointerId));
  view.addEventListener("pointermove", (event) => {
    if (!event.buttons || zoom === 1) return;
    place = { x: place.x + event.movementX, y: place.y + event.movementY };
    draw();
  });
}
