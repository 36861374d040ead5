// The form: what is asked for, and what the chosen endpoint can be asked.

const $ = (id) => document.getElementById(id);
const KEPT = "mezzotint-form";
const FIELDS = ["prompt", "steps", "guidance", "seed", "width", "height", "count", "negative"];
let models = [];

const chosen = () => models.find((m) => m.id === $("endpoint").value)?.mezzotint;
const model = () => ($("adapter").value ? `${$("endpoint").value}:${$("adapter").value}` : $("endpoint").value);
const number = (id) => ($(id).value === "" ? null : Number($(id).value));

/** Fills the choices from the answer of /v1/models. */
export function setModels(data) {
  const before = model();
  const untouched = number("steps") === chosen()?.default_steps;
  models = data;
  const endpoints = data.filter((model) => !model.mezzotint.adapter);
  $("endpoint").replaceChildren(...endpoints.map((model) => new Option(model.id, model.id)));
  const kept = restoreKept();
  choose(before || kept?.model || endpoints[0]?.id);
  if (before ? untouched : !kept) useDefaults();
}

/** Whether the chosen endpoint has ever been loaded, so that it is known what it can be asked. */
export const knowsEndpoint = () => chosen()?.width != null;

/** Whether it is about to be known. */
export const isStarting = () => chosen()?.status === "starting" && !knowsEndpoint();

/** Prompts that the chosen endpoint's model draws well. */
export const examples = () => chosen()?.examples ?? [];

function choose(name = "") {
  const [endpoint, route = ""] = name.split(":");
  if ([...$("endpoint").options].some((option) => option.value === endpoint)) $("endpoint").value = endpoint;
  adapt();
  if ([...$("adapter").options].some((option) => option.value === route)) $("adapter").value = route;
}

/** Shows what the chosen endpoint can be asked. */
function adapt() {
  const can = chosen();
  const routes = models.filter((m) => m.mezzotint.adapter && m.mezzotint.endpoint === $("endpoint").value);
  $("adapter").replaceChildren(new Option("none", ""), ...routes.map((m) => new Option(m.mezzotint.adapter)));
  $("adapter-row").hidden = routes.length === 0;
  $("negative-row").hidden = !can?.supports_negative_prompt;
  const ignored = can?.guidance_effective === false;
  $("guidance").disabled = $("guidance-dial").disabled = ignored;
  $("guidance-note").hidden = !ignored;
  $("guidance").placeholder = can?.default_guidance ?? "auto";
  $("guidance-dial").value = number("guidance") ?? can?.default_guidance ?? 4;
  adaptSize(can);
}

function adaptSize(can) {
  const named = can?.sizes?.length ? can.sizes.map((size) => size.join("\u00a0×\u00a0")) : null;
  const several = named ? named.length > 1 : can?.width && can.max_pixels >= (can.width + can.size_multiple) * can.height;
  $("size-row").hidden = !several;
  if (!several) return;
  for (const side of ["width", "height"]) {
    Object.assign($(side), { min: can.size_multiple, step: can.size_multiple, placeholder: can[side] });
  }
  if (named) return ($("size-note").textContent = `One of ${named.join(", ")}.`);
  const most = Math.floor(Math.sqrt(can.max_pixels));
  $("size-note").textContent = `Multiples of ${can.size_multiple}, up to ${most}\u00a0×\u00a0${most} in all.`;
}

function useDefaults() {
  const can = chosen();
  if (!can) return;
  setValue("steps", can.default_steps);
  for (const id of ["guidance", "width", "height"]) setValue(id, "");
}

function setValue(id, value) {
  $(id).value = value ?? "";
  const dial = document.getElementById(`${id}-dial`);
  if (dial) dial.value = value || chosen()?.default_guidance || dial.value;
}

/** The request's fields as the form has them; a new seed unless it is locked. */
export function readForm() {
  if ($("lock").getAttribute("aria-pressed") === "false" || $("seed").value === "") drawSeed();
  const can = chosen() ?? {};
  const fields = { model: model(), prompt: $("prompt").value.trim(), num_inference_steps: number("steps") };
  if (number("guidance") !== null && !$("guidance").disabled) fields.guidance_scale = number("guidance");
  if (!$("negative-row").hidden && $("negative").value.trim()) fields.negative_prompt = $("negative").value.trim();
  if (!$("size-row").hidden) {
    for (const side of ["width", "height"]) {
      if (number(side) !== null && number(side) !== can[side]) fields[side] = number(side);
    }
  }
  if (number("count") > 1) fields.n = number("count");
  return { ...fields, response_format: "url", seed: BigInt($("seed").value).toString() };
}

/** Puts a picture's fields into the form, with its seed locked; answers the model that could be chosen. */
export function writeForm(fields) {
  choose(fields.model);
  const can = chosen() ?? {};
  setValue("prompt", fields.prompt);
  setValue("steps", fields.num_inference_steps);
  setValue("guidance", fields.guidance_scale);
  setValue("seed", fields.seed);
  setValue("count", 1);
  setValue("negative", fields.negative_prompt);
  for (const side of ["width", "height"]) setValue(side, fields[side] === can[side] ? "" : fields[side]);
  lock(fields.seed !== undefined);
  keep();
  return model();
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
  sessionStorage.setItem(KEPT, JSON.stringify({ ...values, model: model(), locked: $("lock").getAttribute("aria-pressed") }));
}

function restoreKept() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  if (!kept || $("endpoint").dataset.restored) return null;
  $("endpoint").dataset.restored = "yes";
  for (const id of FIELDS) setValue(id, kept[id]);
  lock(kept.locked === "true");
  return kept;
}

export function wireForm(onSubmit) {
  const form = $("form");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    onSubmit();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("input", keep);
  for (const id of ["steps", "guidance"]) {
    $(`${id}-dial`).addEventListener("input", () => ($(id).value = $(`${id}-dial`).value));
    $(id).addEventListener("input", () => ($(`${id}-dial`).value = $(id).value || chosen()?.default_guidance || ""));
  }
  $("endpoint").addEventListener("change", () => {
    adapt();
    useDefaults();
    keep();
  });
  $("adapter").addEventListener("change", keep);
  $("dice").addEventListener("click", () => drawSeed());
  $("seed").addEventListener("input", () => lock($("seed").value !== ""));
  $("lock").addEventListener("click", () => {
    lock($("lock").getAttribute("aria-pressed") === "false");
    keep();
  });
}
