// The page: wires the parts to each other.

import { key, read } from "./api.js";
import * as beginning from "./beginning.js";
import * as desk from "./desk.js";
import { wireDrop } from "./drop.js";
import { chosen, examples, isStarting, knowsEndpoint, readForm, setModels, wireForm, writeForm } from "./form.js";
import * as gallery from "./gallery.js";
import { guarded, note, say, showError, wireNotice } from "./notice.js";
import { readSettings } from "./png.js";
import * as queue from "./queue.js";
import { recipes } from "./recipes.js";
import * as slider from "./slider.js";
import * as stage from "./stage.js";

const $ = (id) => document.getElementById(id);
const LEARN_MS = 1000;

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
  queue.resume();
}

/** Takes up what the endpoints say of themselves; one that is still loading is asked again. */
function learn(data) {
  setModels(data);
  adapt();
  if (isStarting()) setTimeout(() => guarded(async () => learn((await read("v1/models")).data)), LEARN_MS);
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
  queue.ask(readForm(from), from);
}

async function made() {
  await guarded(async () => {
    if (!knowsEndpoint()) learn((await read("v1/models")).data); // it had not been loaded before
    await gallery.load();
  });
  pointAtShown();
}

function pointAtShown() {
  gallery.pointAt(stage.shown()?.name);
}

function restore(fields, from = null) {
  showError(null);
  const model = writeForm(fields);
  beginning.putBack(from);
  const lost = fields.strength !== undefined && !from ? " The picture that it began from is not kept; choose it again." : "";
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

async function remove() {
  if (!confirm("Delete this picture from the server? The same settings make it again.")) return;
  await gallery.remove(stage.shown().name);
  stage.lay(null);
  say("Deleted");
}

function showRecipe(name) {
  $("recipe").textContent = recipes[name]({ response_format: "url", ...stage.shown().fields });
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
  $("delete").addEventListener("click", () => guarded(remove));
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
  gallery.wireGallery(showPrint);
  slider.wireSlider();
  stage.wireStage(() => {
    slider.refresh();
    pointAtShown();
    desk.refresh();
  });
  $("endpoint").addEventListener("change", adapt);
  wireActions();
  wireFile("restore", "file", restoreFrom);
  wireFile("from-choose", "from-file", beginFrom);
  wireDrop({ begin: beginFrom, restore: restoreFrom, mayBegin: beginning.isAllowed });
  if (navigator.platform.startsWith("Mac")) document.querySelector("kbd").textContent = "⌘ ↵";
}

wire();
enter();
