// The page for admins: endpoints with their queues and rates, adapters, and keys.

import { call, read } from "./api.js";

const $ = (id) => document.getElementById(id);
const ENDPOINTS = "dedicated/beta/endpoint";
const KEYS = "dedicated/beta/keys";
const LOOK_MS = 2000;
const COMMANDS = { RUNNING: ["restart", "sleep", "terminate"], SLEEPING: ["wake", "terminate"], FAILED: ["restart"], TERMINATED: ["restart"] };
let own = null; // the key that asks
let before = null; // {at, samples} of the last look at the metrics
let timer = 0;

export function wireAdmin() {
  $("admin-open").addEventListener("click", () => show($("admin").hidden));
  $("adapter-form").addEventListener("submit", (event) => act(event, addAdapter));
  $("new-key-form").addEventListener("submit", (event) => act(event, makeKey));
}

/** Offers the page where the key is an admin's. */
export async function offerAdmin() {
  own = await read("dedicated/v1/key");
  $("admin-open").hidden = !own.admin;
}

function show(on) {
  $("admin").hidden = !on;
  document.querySelector("main").hidden = on;
  $("admin-open").setAttribute("aria-expanded", String(on));
  $("admin-open").textContent = on ? "Back to the pictures" : "Server";
  clearTimeout(timer);
  before = null;
  if (on) guarded(listKeys).then(look);
}

/** Runs `work`, and shows what the server says against it. */
async function guarded(work) {
  try {
    await work();
    $("admin-error").hidden = true;
  } catch (error) {
    $("admin-error").textContent = error.message;
    $("admin-error").hidden = false;
  }
}

function act(event, work) {
  event.preventDefault();
  return guarded(async () => {
    await work();
    event.target.reset();
    await refresh();
  });
}

async function look() {
  try {
    await refresh();
  } catch (error) {
    $("admin-error").textContent = error.message;
    $("admin-error").hidden = false;
  }
  if (!$("admin").hidden) timer = setTimeout(look, LOOK_MS);
}

async function refresh() {
  const { data } = await read(ENDPOINTS);
  const ids = Object.keys(data);
  const [rates, ...parts] = await Promise.all([
    readRates(),
    ...ids.map((id) => Promise.all([read(`${ENDPOINTS}/${id}`), read(`${ENDPOINTS}/${id}/adapters`)])),
  ]);
  fill("admin-endpoints", ids.map((id, at) => endpointRow(data[id], parts[at][0], rates(id))));
  fill("admin-adapters", ids.flatMap((id, at) => parts[at][1].data.map((adapter) => adapterRow(id, adapter))));
  const chosen = $("new-endpoint").value;
  if ($("new-endpoint").options.length !== ids.length) $("new-endpoint").replaceChildren(...ids.map((id) => new Option(id)));
  if (ids.includes(chosen)) $("new-endpoint").value = chosen;
}

/** What has risen since the last look, by endpoint: pictures a minute and steps a second. */
async function readRates() {
  const text = await (await call("metrics")).text();
  const samples = new Map();
  for (const [, name, id, value] of text.matchAll(/^mezzotint_(steps_total|generate_seconds_count)\{[^}]*?endpoint="([^"]*)"[^}]*\} (\S+)$/gm)) {
    samples.set(`${name} ${id}`, (samples.get(`${name} ${id}`) ?? 0) + Number(value));
  }
  const now = { at: performance.now(), samples };
  const then = before;
  before = now;
  const risen = (key) => (samples.get(key) ?? 0) - (then?.samples.get(key) ?? 0);
  return (id) => then && {
    pictures: (60_000 * risen(`generate_seconds_count ${id}`)) / (now.at - then.at),
    steps: (1000 * risen(`steps_total ${id}`)) / (now.at - then.at),
  };
}

// ---------------------------------------------------------------- rows

/** Rows keep their elements, and so the keyboard's focus, as long as what they say is the same. */
function fill(table, rows) {
  const body = $(table).tBodies[0];
  rows.forEach((row, at) => {
    const old = body.rows[at];
    if (!old) body.append(row);
    else if (old.innerHTML !== row.innerHTML) {
      [...row.cells].forEach((cell, n) => old.cells[n]?.innerHTML === cell.innerHTML || old.cells[n]?.replaceWith(cell));
    }
  });
  while (body.rows.length > rows.length) body.lastElementChild.remove();
}

function row(cells, buttons) {
  const made = document.createElement("tr");
  cells.forEach((text, at) => {
    const cell = document.createElement(at ? "td" : "th");
    if (!at) cell.scope = "row";
    cell.textContent = text ?? "";
    made.append(cell);
  });
  const last = document.createElement("td");
  last.append(...buttons);
  made.append(last);
  return made;
}

function button(label, about, work, question) {
  const made = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: label });
  made.setAttribute("aria-label", `${label} ${about}`);
  made.addEventListener("click", () => {
    if (question && !confirm(question)) return;
    guarded(async () => {
      await work();
      await refresh();
    });
  });
  return made;
}

/** How many workers run on which other machines: "2 on 10.0.0.1, 1 on 10.0.0.2". */
function places(replicas) {
  const nodes = new Map();
  for (const { node } of replicas) if (node) nodes.set(node, (nodes.get(node) ?? 0) + 1);
  return [...nodes].sort().map(([node, num]) => `${num} on ${node}`).join(", ");
}

function endpointRow({ id, status, message }, spec, rate) {
  const { queue, replicas, scaling } = spec.mezzotint;
  const more = [places(replicas), scaling.at(-1)?.reason].filter(Boolean).join("; ");
  const workers = `${spec.currReplicaCnt}/${spec.desiredReplicaCnt}`;
  const cells = [
    id, message ? `${status}: ${message}` : status, more ? `${workers} (${more})` : workers, queue.running, queue.jobs,
    `${queue.backlog_s.toFixed(1)} s`, rate ? rate.pictures.toFixed(1) : "", rate ? rate.steps.toFixed(1) : "",
  ];
  return row(cells, (COMMANDS[status] ?? []).map((command) => {
    const question = command === "terminate" && `Terminate ${id}? It takes no more requests until it is restarted.`;
    return button(command[0].toUpperCase() + command.slice(1), id, () => call(`${ENDPOINTS}/${id}/${command}`, { method: "PUT" }), question);
  }));
}

function adapterRow(id, { route, name, source, scale, rank, state, failure, origin }) {
  const remove = () => call(`${ENDPOINTS}/${id}/adapters/${route}`, { method: "DELETE" });
  const buttons = origin === "api" ? [button("Remove", name, remove, `Remove ${name}?`)] : [];
  return row([name, source, scale, rank, failure ? `${state}: ${failure}` : state], buttons);
}

async function listKeys() {
  const { data } = await read(KEYS);
  const living = data.filter(({ revoked }) => !revoked);
  fill("admin-keys", living.map(({ id, name, admin, created, endpoints }) => {
    const revoke = async () => {
      await call(`${KEYS}/${id}`, { method: "DELETE" });
      await listKeys();
    };
    const uses = admin ? "everything, and this page" : endpoints.join(", ") || "every endpoint";
    const buttons = id === own.id ? [] : [button("Revoke", name, revoke, `Revoke ${name}? What uses it stops at once.`)];
    return row([name, new Date(1000 * created).toLocaleDateString(), uses], buttons);
  }));
}

// ---------------------------------------------------------------- forms

async function addAdapter() {
  const path = `${ENDPOINTS}/${$("new-endpoint").value}/adapters`;
  const [route, scale, source] = ["new-route", "new-scale", "new-source"].map((id) => $(id).value.trim());
  const [file] = $("new-file").files;
  if (!file && !source) throw new Error("Name a source, or choose a file.");
  if (!file) return call(path, { method: "POST", body: JSON.stringify({ route, source, scale: Number(scale) }) });
  const query = new URLSearchParams({ name: file.name, scale });
  await call(`${path}/${route}?${query}`, { method: "PUT", body: file, headers: { "content-type": "application/octet-stream" } });
}

async function makeKey() {
  const body = JSON.stringify({ name: $("new-key-name").value.trim(), admin: $("new-key-admin").checked });
  const { secret } = await read(KEYS, { method: "POST", body });
  $("new-key").textContent = `${secret} is shown this once.`;
  await listKeys();
}
