// The adapters that a picture uses together, each with its strength.

const $ = (id) => document.getElementById(id);
const MOST = 8; // the server's limit
let known = []; // {route, scale}: what the endpoint has, with each one's own strength
let uses = [{ route: "", scale: "" }]; // as in the form; the last one may be empty
let onChange = () => {};

export function wireAdapters(changed) {
  onChange = changed;
  $("adapter-add").addEventListener("click", () => {
    uses.push({ route: "", scale: "" });
    draw();
    $("adapters").lastElementChild.querySelector("select").focus();
  });
}

/** Takes up what the chosen endpoint has; what it does not have is let go. */
export function offer(list) {
  known = list;
  put(taken());
}

export const routes = () => known.map(({ route }) => route);

/** The adapters as a request lists them: [{route, scale}], without `scale` where it is the adapter's own. */
export function taken() {
  return uses.filter(({ route }) => route).map(({ route, scale }) => (scale === "" ? { route } : { route, scale: Number(scale) }));
}

export function put(list) {
  uses = list.filter(({ route }) => routes().includes(route)).map(({ route, scale }) => ({ route, scale: scale ?? "" }));
  if (!uses.length) uses = [{ route: "", scale: "" }];
  draw();
}

/** The fields of a request for these adapters on this endpoint; `adapters` only where `model` does not say it all. */
export function fieldsFor(endpoint, list) {
  if (!list.length) return { model: endpoint };
  const model = `${endpoint}:${list[0].route}`;
  return list.length === 1 && list[0].scale === undefined ? { model } : { model, adapters: list };
}

/** The adapters that a request's fields name. */
export function named({ model = "", adapters }) {
  const [, route] = model.split(":");
  return adapters ?? (route ? [{ route }] : []);
}

function draw() {
  $("adapter-row").hidden = known.length === 0;
  $("adapters").replaceChildren(...uses.map(line));
  const free = known.length > uses.length && uses.length < MOST;
  $("adapter-add").hidden = !free || !uses.at(-1).route;
}

function line(use, at) {
  const select = document.createElement("select");
  const taken = uses.filter((other) => other !== use).map(({ route }) => route);
  select.append(new Option("none", ""), ...routes().filter((route) => !taken.includes(route)).map((route) => new Option(route)));
  select.value = use.route;
  select.setAttribute("aria-label", at ? `Adapter ${at + 1}` : "Adapter");
  const scale = Object.assign(document.createElement("input"), { type: "number", min: -10, max: 10, step: "any", value: use.scale });
  scale.placeholder = known.find(({ route }) => route === use.route)?.scale ?? 1;
  scale.title = "Strength; as trained is 1";
  scale.setAttribute("aria-label", `Strength of adapter ${at + 1}`);
  scale.hidden = !use.route;
  if (at === 0) [select.id, scale.id] = ["adapter", "adapter-scale"];
  select.addEventListener("change", () => {
    use.route = select.value;
    use.scale = "";
    if (!use.route && uses.length > 1) uses.splice(at, 1);
    draw();
    $("adapters").children[Math.min(at, uses.length - 1)].querySelector("select").focus();
    onChange();
  });
  scale.addEventListener("input", () => {
    use.scale = scale.value;
    onChange();
  });
  const item = document.createElement("span");
  item.className = "use";
  item.append(select, scale);
  return item;
}
