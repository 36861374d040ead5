// The form: what is asked for, and what the chosen endpoint can be asked.

import * as adapters from "./adapters.js";
import * as beginning from "./beginning.js";
import { drawCard } from "./card.js";
import { drawShapes, markShape } from "./shapes.js";

const $ = (id) => document.getElementById(id);
const KEPT = "mezzotint-form";
const FIELDS = ["prompt", "steps", "guidance", "seed", "width", "height", "count", "negative", "strength"];
const DIALS = { steps: "default_steps", guidance: "default_guidance", strength: "" };
let models = [];

/** What the chosen endpoint can be asked; undefined before it is known. */
export const chosen = () => models.find((m) => m.id === $("endpoint").value)?.mezzotint;
const named = () => adapters.fieldsFor($("endpoint").value, adapters.taken());
const number = (id) => ($(id).value === "" ? null : Number($(id).value));

/** Fills the choices from the answer of /v1/models. */
export function setModels(data) {
  const before = $("endpoint").value && named();
  const untouched = number("steps") === chosen()?.default_steps;
  models = data;
  const endpoints = data.filter((model) => !model.mezzotint.adapter);
  $("endpoint").replaceChildren(...endpoints.map((model) => new Option(model.id, model.id)));
  const kept = restoreKept();
  choose(before || kept || { model: endpoints[0]?.id });
  if (before ? untouched : !kept) useDefaults();
}

/** Whether the chosen endpoint is loaded, so that it is known what it can be asked. */
export const isReady = () => chosen()?.status === "ready" && chosen().width != null;

/** Whether its model is loading. */
export const isStarting = () => chosen()?.status === "starting";

/** Prompts that the chosen endpoint's model draws well. */
export const examples = () => chosen()?.examples ?? [];

/** Chooses the endpoint and the adapters that these fields name, as far as there are such. */
function choose(fields) {
  const [endpoint] = (fields.model ?? "").split(":");
  if ([...$("endpoint").options].some((option) => option.value === endpoint)) $("endpoint").value = endpoint;
  adapt();
  adapters.put(adapters.named(fields));
}

/** Shows what the chosen endpoint can be asked. */
function adapt() {
  const can = chosen();
  const own = models.filter((m) => m.mezzotint.adapter && m.mezzotint.endpoint === $("endpoint").value);
  adapters.offer(own.map((m) => ({ route: m.mezzotint.adapter, scale: m.mezzotint.adapter_scale })));
  $("negative-row").hidden = !can?.supports_negative_prompt;
  const ignored = can?.guidance_effective === false;
  $("guidance").disabled = $("guidance-dial").disabled = ignored;
  $("guidance-note").hidden = !ignored;
  $("guidance").placeholder = can?.default_guidance ?? "auto";
  turnDial("guidance");
  drawCard(can);
  beginning.allow({ max_pictures: can?.max_pictures ?? 0, masks: can?.masks ?? false, strength: can?.strength ?? false });
  adaptSize(can);
}

function adaptSize(can) {
  const named = can?.sizes?.length ? can.sizes.map((size) => size.join("\u00a0×\u00a0")) : null;
  const several = named ? named.length > 1 : can?.width && can.max_pixels >= (can.width + can.size_multiple) * can.height;
  $("size-row").hidden = !several;
  if (!several) return;
  drawShapes(can, (width, height) => {
    const own = width === can.width && height === can.height && !beginning.taken();
    setValue("width", own ? "" : width);
    setValue("height", own ? "" : height);
    changed();
  });
  markSize();
  for (const side of ["width", "height"]) {
    Object.assign($(side), { min: can.size_multiple, step: can.size_multiple });
  }
  if (named) return ($("size-note").textContent = `One of ${named.join(", ")}.`);
  const most = Math.floor(Math.sqrt(can.max_pixels));
  $("size-note").textContent = `Multiples of ${can.size_multiple}, up to ${most}\u00a0×\u00a0${most} in all.`;
}

/** Marks the preset whose size the form has. */
function markSize() {
  const can = chosen() ?? {};
  const from = beginning.taken();
  markShape(number("width") ?? (from ? null : can.width), number("height") ?? (from ? null : can.height));
}

/** Shows what holds where a field is left empty, which depends on the picture that there is to begin from. */
function showPlaceholders() {
  for (const side of ["width", "height"]) $(side).placeholder = beginning.taken() ? "auto" : (chosen()?.[side] ?? "");
  turnDial("strength");
  markSize();
}

function useDefaults() {
  const can = chosen();
  if (!can) return;
  setValue("steps", can.default_steps);
  for (const id of ["guidance", "width", "height"]) setValue(id, "");
}

function setValue(id, value) {
  $(id).value = value ?? "";
  if (DIALS[id]) turnDial(id);
}

/** Turns a dial to what stands beside it, else to what the endpoint takes where nothing does. */
function turnDial(id) {
  $(`${id}-dial`).value = $(id).value || $(id).placeholder || chosen()?.[DIALS[id]] || $(`${id}-dial`).value;
}

/** The request's fields as the form has them, without pictures; a new seed unless it is locked. */
export function readForm(from) {
  if ($("lock").getAttribute("aria-pressed") === "false" || $("seed").value === "") drawSeed();
  const can = chosen() ?? {};
  const fields = { ...named(), prompt: $("prompt").value.trim(), num_inference_steps: number("steps") };
  if (number("guidance") !== null && !$("guidance").disabled) fields.guidance_scale = number("guidance");
  if (!$("negative-row").hidden && $("negative").value.trim()) fields.negative_prompt = $("negative").value.trim();
  if (!$("size-row").hidden) {
    for (const side of ["width", "height"]) {
      if (number(side) !== null && (from || number(side) !== can[side])) fields[side] = number(side);
    }
  }
  if (from && can.strength && number("strength") !== null) fields.strength = number("strength");
  if (number("count") > 1) fields.n = number("count");
  return { ...fields, response_format: "url", seed: BigInt($("seed").value).toString() };
}

/** Puts a picture's fields into the form, with its seed locked; answers the model that could be chosen. */
export function writeForm(fields) {
  choose(fields);
  const can = chosen() ?? {};
  setValue("prompt", fields.prompt);
  setValue("steps", fields.num_inference_steps);
  setValue("guidance", fields.guidance_scale);
  setValue("seed", fields.seed);
  setValue("count", 1);
  setValue("negative", fields.negative_prompt);
  setValue("strength", fields.strength);
  for (const side of ["width", "height"]) setValue(side, fields[side] === can[side] ? "" : fields[side]);
  lock(fields.seed !== undefined);
  markSize();
  keep();
  return named().model;
}

function drawSeed() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  keep();
}

function lock(on) {
  $("lock").setAttribute("aria-pressed", String(on));
}

function keep() {
  const values = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
  sessionStorage.setItem(KEPT, JSON.stringify({ ...values, ...named(), locked: $("lock").getAttribute("aria-pressed") }));
}

function restoreKept() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  if (!kept || $("endpoint").dataset.restored) return null;
  $("endpoint").dataset.restored = "yes";
  for (const id of FIELDS) setValue(id, kept[id]);
  lock(kept.locked === "true");
  return kept;
}

function changed() {
  markSize();
  keep();
}

export function wireForm(onSubmit) {
  adapters.wireAdapters(keep);
  beginning.wireBeginning(showPlaceholders);
  const form = $("form");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    onSubmit();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("input", changed);
  for (const id of Object.keys(DIALS)) {
    $(`${id}-dial`).addEventListener("input", () => ($(id).value = $(`${id}-dial`).value));
    $(id).addEventListener("input", () => turnDial(id));
  }
  $("endpoint").addEventListener("change", () => {
    adapt();
    useDefaults();
    keep();
  });
  $("dice").addEventListener("click", () => drawSeed());
  $("seed").addEventListener("input", () => lock($("seed").value !== ""));
  $("lock").addEventListener("click", () => {
    lock($("lock").getAttribute("aria-pressed") === "false");
    keep();
  });
}
