// The queue: what has been asked for and has not ended, in its order. A few requests are on their way to the server at
// a time, so that it can merge them; the others wait in this page, and can still be taken back.

import { Refused } from "./api.js";
import { cancel, follow, newRun } from "./run.js";
import { finish, grain, noise, preview } from "./stage.js";

const KEPT = "mezzotint-runs";
const MAX_SENT = 3; // each holds a connection, and browsers open six to a server
let runs = [];
let paused = false;
let listener = () => {};

/** `tell(run, event, data)` hears every change: asked, begun, progress, preview, away, done, failed, cancelled. */
export const wireQueue = (tell) => (listener = tell);

export const all = () => runs;

/** Asks for pictures; `from` is what they begin from. The run's `set` is what lies on the sheet for it. */
export function ask(fields, from) {
  add(newRun(fields, from));
}

/** Asks for each picture of a set with a request of its own. */
export function askCells(set, from) {
  set.pictures.forEach(({ fields }, first) => add({ ...newRun(fields, from), set, first }));
}

/** Takes up the runs that a reload of the page interrupted. */
export function resume() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
  if (!runs.length) kept.forEach(add);
  paused = false;
  pump();
}

/** Takes a run back: one that waits here is gone, one that was sent is cancelled. */
export async function stop(run) {
  if (run.sent) return cancel(run);
  end(run, "cancelled", {});
}

function add(run) {
  Object.assign(run, { set: run.set ?? noise(run.fields, run.from), first: run.first ?? 0, sent: false, progress: null, away: "" });
  runs.push(run);
  keep();
  listener(run, "asked");
  pump();
}

function pump() {
  for (const run of runs.filter((each) => !each.sent)) {
    if (paused || runs.filter((each) => each.sent).length >= MAX_SENT) return;
    send(run);
  }
}

async function send(run) {
  run.sent = true;
  listener(run, "begun");
  try {
    for await (const { event, data } of follow(run)) {
      take(run, event, data);
      if (["done", "failed", "cancelled"].includes(event)) return end(run, event, data);
    }
  } catch (error) {
    if (error.status !== 401) return end(run, "failed", error);
    paused = true; // until there is a key
    run.sent = false;
    listener(run, "refused", error);
  }
}

function take(run, event, data) {
  run.away = event === "away" ? data.text : "";
  if (event === "progress") {
    if (run.progress?.id !== data.id) keep();
    run.progress = data;
    const { step = 0, num_steps: steps = 1 } = data;
    if (!run.set.grid) grain(run.set, run.set.pictures.some(({ src }) => src) ? 0.7 * (1 - step / steps) ** 2 : 1);
  }
  if (event === "preview") preview(run.set, run.first + data.index, data.b64_json);
  if (event === "done") finish(run.set, data, run.first);
  if (["progress", "preview", "away"].includes(event)) listener(run, event, data);
}

function end(run, event, data) {
  runs = runs.filter((other) => other !== run);
  run.set.ended = !runs.some((other) => other.set === run.set) && run.set.pictures.some(({ name }) => name);
  keep();
  listener(run, event, event === "failed" && !(data instanceof Error) ? new Refused(0, data, data.request_id) : data);
  pump();
}

function keep() {
  const kept = runs.map(({ id, fields, edit, sender }) => ({ id, fields, edit, sender }));
  sessionStorage.setItem(KEPT, JSON.stringify(kept));
}
