// The page: wires the parts to each other.

import { Refused, Unreachable, key, pictureName, read } from "./api.js";
import { examples, isStarting, knowsEndpoint, readForm, setModels, wireForm, writeForm } from "./form.js";
import * as gallery from "./gallery.js";
import { readSettings } from "./png.js";
import { recipes } from "./recipes.js";
import { cancel, follow, keptRun, newRun } from "./run.js";
import * as stage from "./stage.js";

const $ = (id) => document.getElementById(id);
const LEARN_MS = 1000;
let running = null;

// ---------------------------------------------------------------- what is said

function say(text) {
  $("status").textContent = text;
}

function note(text) {
  $("warnings").hidden = !text;
  $("warnings").textContent = text;
}

function showError(error) {
  const box = $("error");
  box.hidden = !error;
  if (!error) return box.replaceChildren();
  const line = Object.assign(document.createElement("span"), { textContent: error.message });
  const facts = [error.code, error.requestId].filter(Boolean).join("  ");
  const note = Object.assign(document.createElement("small"), { textContent: facts });
  box.replaceChildren(line, ...(facts ? [note] : []));
}

/** Runs `work`; asks for the key where it is missing or wrong, shows every other error. */
async function guarded(work) {
  try {
    showError(null);
    return await work();
  } catch (error) {
    if (error.status === 401) askKey(key.get() ? error : null);
    else if (error instanceof Refused || error instanceof Unreachable) showError(error);
    else throw error;
  }
}

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
  const kept = keptRun();
  if (kept && !running) await watch(kept);
}

/** Takes up what the endpoints say of themselves; one that is still loading is asked again. */
function learn(data) {
  setModels(data);
  showExamples();
  if (isStarting()) setTimeout(() => guarded(async () => learn((await read("v1/models")).data)), LEARN_MS);
}

function showExamples() {
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

// ---------------------------------------------------------------- making pictures

async function make() {
  if (running) return;
  await watch(newRun(readForm()));
}

async function watch(run) {
  running = run;
  const before = stage.lying();
  stage.begin(run.fields);
  gallery.pointAt(null);
  note("");
  setRunning(true);
  say("Sent");
  let made = null;
  await guarded(async () => {
    for await (const { event, data } of follow(run)) {
      if (event === "progress") showProgress(data);
      else if (event === "preview") stage.preview(data.index, data.b64_json);
      else if (event === "away") showAway(data.text);
      else if (event === "failed") throw new Refused(0, data, data.request_id);
      else if (event === "cancelled") say("Cancelled");
      else if (event === "done") made = data;
    }
  });
  running = null;
  setRunning(false);
  if (made) await showMade(made);
  else stage.putBack(before);
}

function showProgress({ status, step = 0, num_steps: steps = 1, position, seconds_left: left }) {
  const waiting = position ? `queued, ${position} ${position === 1 ? "goes" : "go"} first` : "queued, next in line";
  const text = status === "queued" ? waiting : `step ${step} of ${steps}`;
  $("progress-text").textContent = left ? `${text}, about ${duration(left)} left` : text;
  $("progress").value = step / steps;
  stage.grain(stage.shown()?.src ? 0.7 * (1 - step / steps) ** 2 : 1);
  document.title = `${status === "queued" ? "queued" : `${step}/${steps}`} · Mezzotint`;
  if ($("status").dataset.state !== status) say(status === "queued" ? waiting : "Running");
  $("status").dataset.state = status;
}

const duration = (seconds) => (seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} min`);

function showAway(text) {
  $("progress-text").textContent = text;
  say(text);
}

async function showMade(answer) {
  stage.finish(answer);
  say("Done");
  note(answer.warnings.join(" "));
  await guarded(async () => {
    if (!knowsEndpoint()) learn((await read("v1/models")).data); // it had not been loaded before
    await gallery.load();
  });
  gallery.pointAt(pictureName(answer.data[0].url));
}


function setRunning(on) {
  $("make").setAttribute("aria-disabled", String(on)); // not `disabled`, which would drop the keyboard's focus
  $("running").hidden = !on;
  $("progress").value = 0;
  $("progress-text").textContent = on ? "sending" : "";
  $("status").dataset.state = "";
  if (!on) document.title = "Mezzotint";
}

// ---------------------------------------------------------------- pictures and their settings

function restore(fields) {
  showError(null);
  const model = writeForm(fields);
  note(model === fields.model ? "" : `${fields.model} is not to be had with this key, so this is for ${model}.`);
  say("Settings restored; the seed is kept");
  $("prompt").focus();
}

async function restoreFrom(file) {
  try {
    restore(await readSettings(file));
  } catch (error) {
    showError(error);
  }
}

async function remove() {
  if (!confirm("Delete this picture from the server? The same settings make it again.")) return;
  await gallery.remove(stage.shown().name);
  stage.welcome();
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

function wireDropping() {
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("drop").hidden = true;
  });
  addEventListener("drop", (event) => {
    $("drop").hidden = true;
    if (!isFile(event)) return;
    event.preventDefault();
    restoreFrom(event.dataTransfer.files[0]);
  });
}

function wire() {
  wireForm(make);
  gallery.wireGallery((print) => {
    if (running) return;
    showError(null);
    note("");
    stage.show([print]);
    gallery.pointAt(print.name);
    document.querySelector(".sheet").scrollIntoView({ block: "nearest" });
  });
  $("endpoint").addEventListener("change", showExamples);
  $("cancel").addEventListener("click", () => guarded(() => cancel(running)));
  $("use").addEventListener("click", () => restore(stage.shown().fields));
  $("delete").addEventListener("click", () => guarded(remove));
  for (const button of document.querySelectorAll("[data-recipe]")) {
    button.addEventListener("click", () => showRecipe(button.dataset.recipe));
  }
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  $("copy").addEventListener("click", copy);
  $("restore").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    if ($("file").files[0]) restoreFrom($("file").files[0]);
    $("file").value = "";
  });
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
  wireDropping();
  if (navigator.platform.startsWith("Mac")) document.querySelector("kbd").textContent = "⌘ ↵";
}

wire();
enter();
