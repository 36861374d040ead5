// The page: wires the parts to each other.

import { offerAdmin, wireAdmin } from "./admin.js";
import { Unreachable, key, read } from "./api.js";
import * as beginning from "./beginning.js";
import * as desk from "./desk.js";
import { wireDrop } from "./drop.js";
import { examples, isReady, isStarting, readForm, setModels, wireForm, writeForm } from "./form.js";
import * as gallery from "./gallery.js";
import * as full from "./full.js";
import * as history from "./history.js";
import { openGrid, sheetOf, wireGrid } from "./grid.js";
import { wireKeyboard } from "./keyboard.js";
import { complain, guarded, note, say, showError, wireNotice } from "./notice.js";
import { readSettings } from "./metadata.js";
import * as queue from "./queue.js";
import { filesOf, recipes } from "./recipes.js";
import * as slider from "./slider.js";
import * as stage from "./stage.js";

const $ = (id) => document.getElementById(id);
const LEARN_MS = 1000;
const NEIGHBOURS = 4;

// ---------------------------------------------------------------- the key

function askKey(error) {
  $("key-error").hidden = !error;
  $("key-error").textContent = error?.message ?? "";
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

async function enter() {
  const models = await guarded(() => read("v1/models"));
  if (!models) return;
  if ($("key-dialog").open) $("key-dialog").close();
  $("forget-key").hidden = !key.get();
  learn(models.data);
  if (!models.data.length) note("This key may use no endpoint of this server.");
  await guarded(() => gallery.load());
  await guarded(offerAdmin);
  queue.resume();
}

/** Takes up what the endpoints say of themselves; one that is still loading is asked again. */
function learn(data) {
  setModels(data);
  adapt();
  if (isStarting()) setTimeout(learnAgain, LEARN_MS);
}

/** Nobody asked for this, so a server that is away meanwhile is no error to show, and what is shown stays. */
async function learnAgain() {
  try {
    learn((await read("v1/models")).data);
  } catch (error) {
    if (error instanceof Unreachable) setTimeout(learnAgain, LEARN_MS);
    else complain(error);
  }
}

/** Shows what the chosen endpoint can do. */
function adapt() {
  $("begin-from").hidden = !beginning.isAllowed();
  const texts = examples();
  $("begin").hidden = !texts.length;
  $("examples").replaceChildren(...texts.map(exampleItem));
}

function exampleItem(text) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.addEventListener("click", () => {
    $("prompt").value = text;
    $("form").requestSubmit();
  });
  const item = document.createElement("li");
  item.append(button);
  return item;
}

// ---------------------------------------------------------------- pictures and their settings

function make() {
  const from = beginning.taken();
  const fields = readForm(from);
  history.remember(fields.prompt);
  queue.ask(fields, from);
}

function askGrid({ cells, ...grid }, from) {
  history.remember(cells[0].prompt);
  queue.askCells(stage.gridOf({ cells, ...grid }, from), from);
}

async function saveSheet() {
  const [blob, download] = await sheetOf(stage.lying());
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download });
  link.click();
}

/** Whether a picture began from one that this page no longer has. */
const isLost = ({ fields, from }) => fields.strength !== undefined && !from;

/** The same settings with the next seeds. */
function vary() {
  const { fields, from, name } = stage.shown() ?? {};
  if (!name) return false;
  if (isLost(stage.shown())) return showError(new Error("The picture that it began from is not kept, so there are no variations of it."));
  const { width, height, seed, ...rest } = fields;
  const size = from ? {} : { width, height };
  queue.ask({ ...rest, ...size, n: NEIGHBOURS, response_format: "url", seed: (BigInt(seed) + 1n).toString() }, from);
}

/** Takes up what has been made; errors of other requests stay in sight. */
async function made() {
  try {
    if (!isReady()) learn((await read("v1/models")).data); // it had not been loaded before
    await gallery.renew();
  } catch (error) {
    complain(error);
  }
  pointAtShown();
}

function pointAtShown() {
  gallery.pointAt(stage.shown()?.name);
}

function restore(fields, from = null) {
  showError(null);
  const model = writeForm(fields);
  beginning.putBack(from);
  const lost = isLost({ fields, from }) ? " The picture that it began from is not kept; choose it again." : "";
  note((model === fields.model ? "" : `${fields.model} is not to be had with this key, so this is for ${model}.`) + lost);
  say("Settings restored; the seed is kept");
  $("prompt").focus();
}

async function beginFrom(blob, title) {
  await guarded(async () => {
    if (!beginning.isAllowed()) throw new Error(`${$("endpoint").value} makes pictures from words only; choose another endpoint.`);
    await beginning.add(blob, title);
    say(`Begins from ${title}`);
    $("prompt").focus();
  });
}

async function beginFromShown() {
  const { src, fields } = stage.shown();
  await guarded(async () => beginFrom(await (await fetch(src)).blob(), fields.prompt));
}

function forget(names) {
  if (names.includes(stage.shown()?.name)) stage.lay(null);
}

/** What the sheet's picture has around it: the pictures of its set, else the prints. */
function neighbours() {
  const set = stage.lying();
  const print = gallery.find(stage.shown()?.name);
  if (print && set.pictures.length === 1) return [gallery.all(), gallery.all().indexOf(print)];
  const ready = set.pictures.filter(({ src }) => src);
  return [ready, Math.max(0, ready.indexOf(stage.shown()))];
}

function openFull() {
  if (!stage.shown()?.src) return false;
  full.open(...neighbours());
}

/** Lays a neighbour of the sheet's picture there. */
function turn(by) {
  if (!stage.shown()?.src) return false;
  const [list, at] = neighbours();
  if (list[at + by]) look(list[at + by]);
}

function look(picture) {
  const set = stage.lying();
  if (set.pictures.includes(picture)) stage.turn(set.pictures.indexOf(picture));
  else stage.lay(stage.setOf([picture]));
}

function starShown() {
  const print = gallery.find(stage.shown()?.name);
  if (!print) return false;
  guarded(() => gallery.star([print], !print.starred));
}

/** The files that a recipe reads, to be saved beside it. */
async function recipeFiles(from) {
  if (!from) return [];
  const { images, mask } = filesOf(from);
  const files = from.pictures.map(({ url }, at) => [images[at], url]);
  if (mask) files.push([mask, URL.createObjectURL(await beginning.maskOf(from))]);
  return files.map(([download, href]) => Object.assign(document.createElement("a"), { className: "quiet", download, href, textContent: download }));
}

async function showRecipe(name) {
  $("recipe-files").replaceChildren(...(await recipeFiles(stage.shown().from)));
  $("recipe").textContent = recipes[name]({ response_format: "url", ...stage.shown().fields }, stage.shown().from);
  $("recipe-title").textContent = `The same picture with ${name === "python" ? "Python" : name}`;
  $("copy").firstElementChild.textContent = "Copy";
  $("recipe-dialog").showModal();
}

async function copy() {
  const text = $("recipe").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren($("recipe"));
    document.execCommand("copy"); // the only way without https
  }
  $("copy").firstElementChild.textContent = "Copied";
}

function showPrint(print) {
  showError(null);
  note("");
  stage.lay(stage.setOf([print]));
  document.querySelector(".sheet").scrollIntoView({ block: "nearest" });
}

// ---------------------------------------------------------------- wiring

function wireFile(button, input, take) {
  $(button).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", async () => {
    const files = [...$(input).files];
    $(input).value = "";
    for (const file of files) await take(file, file.name);
  });
}

function wireKey() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    enter();
  });
  $("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
  $("forget-key").addEventListener("click", () => {
    key.forget();
    location.reload();
  });
}

function wireActions() {
  $("use").addEventListener("click", () => restore(stage.shown().fields, stage.shown().from));
  $("begin-from").addEventListener("click", beginFromShown);
  $("delete").addEventListener("click", () => guarded(() => gallery.remove([stage.shown().name])));
  $("grid-sheet").addEventListener("click", () => guarded(saveSheet));
  $("grid").addEventListener("click", () => {
    if (!$("form").reportValidity()) return;
    const from = beginning.taken();
    openGrid(readForm(from), from);
  });
  $("vary").addEventListener("click", vary);
  $("full-view").addEventListener("click", openFull);
  $("picture").addEventListener("click", openFull);
  for (const button of document.querySelectorAll("[data-recipe]")) {
    button.addEventListener("click", () => showRecipe(button.dataset.recipe));
  }
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  $("copy").addEventListener("click", copy);
}

function wire() {
  const restoreFrom = (file) => guarded(async () => restore(await readSettings(file)));
  wireNotice(askKey);
  wireKey();
  wireForm(make);
  desk.wireDesk(made);
  gallery.wireGallery(showPrint, forget);
  full.wireFull(look);
  history.wireHistory();
  slider.wireSlider();
  stage.wireStage(() => {
    slider.refresh();
    pointAtShown();
    desk.refresh();
  });
  $("endpoint").addEventListener("change", adapt);
  wireActions();
  wireAdmin();
  wireGrid(askGrid);
  wireFile("restore", "file", restoreFrom);
  wireFile("from-choose", "from-file", beginFrom);
  wireDrop({ begin: beginFrom, restore: restoreFrom, mayBegin: beginning.isAllowed });
  wireKeyboard({
    p: () => $("prompt").focus(),
    "/": () => $("search").focus(),
    f: openFull,
    s: starShown,
    v: vary,
    b: () => (stage.shown()?.name && beginning.isAllowed() ? void beginFromShown() : false),
    ArrowLeft: () => turn(-1),
    ArrowRight: () => turn(1),
  });
  if (navigator.platform.startsWith("Mac")) document.querySelector("#make kbd").textContent = "⌘ ↵";
}

wire();
enter();
