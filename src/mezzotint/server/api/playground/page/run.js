// One request from its submission to its end, through lost connections and restarts of the server.

import { Unreachable, call, events, read, stringify } from "./api.js";
import { wire } from "./beginning.js";

const PREVIEWS = 4;
const PASSING = ["queue_full", "endpoint_starting", "server_stopping", "database_unavailable"];
const PATIENCE_MS = 180_000;
const LONGEST_PAUSE_MS = 4_000;

/**
 * A request that has not been sent; `fields` are the body's, with the seed set, so sending it again is harmless.
 * `from` is what it begins from, null for words alone.
 */
export function newRun(fields, from = null) {
  const chance = crypto.getRandomValues(new Uint8Array(12));
  return { id: null, fields, from, edit: Boolean(from), sender: `playground-${Array.from(chance, (b) => b.toString(16).padStart(2, "0")).join("")}` };
}

export async function cancel(run) {
  run.cancelled = true;
  run.wake?.();
  if (run.id) await call(`dedicated/v1/requests/${run.id}`, { method: "DELETE" });
}

/**
 * Yields {event, data}: progress, preview, away (why it must be tried again), and as the last one done, failed or
 * cancelled. Throws Refused where the server will not take the request, Unreachable where it stays away.
 */
export async function* follow(run) {
  let lost = null;
  for (;;) {
    let text = "the server is away; trying again";
    try {
      for await (const item of attempt(run)) {
        lost = null;
        if (item.data.error?.code === "server_stopping") break; // another start of the server can make it
        yield item;
        if (["done", "failed", "cancelled"].includes(item.event)) return;
      }
      run.id = null;
    } catch (error) {
      if (error.code === "request_not_found") run.id = null;
      else if (PASSING.includes(error.code)) text = error.message;
      else if (!(error instanceof Unreachable)) throw error;
      lost ??= { since: Date.now(), tries: 0 };
      if (Date.now() - lost.since > PATIENCE_MS) throw error;
    }
    if (run.cancelled) return yield { event: "cancelled", data: {} };
    yield { event: "away", data: { text } };
    const tries = lost ? lost.tries++ : 0;
    await pause(run, Math.min(300 * 2 ** tries, LONGEST_PAUSE_MS));
    if (run.cancelled) return yield { event: "cancelled", data: {} };
  }
}

async function* attempt(run) {
  if (!run.id) {
    const headers = { prefer: `respond-async, previews=${PREVIEWS}`, "idempotency-key": run.sender };
    if (run.edit && !run.from) throw new Error("The server has lost this request, and a reload of the page its picture; make it again.");
    const body = stringify(run.edit ? { ...run.fields, ...(await wire(run.from)) } : run.fields);
    const state = await read(`dedicated/v1/images/${run.edit ? "edits" : "generations"}`, { method: "POST", body, headers });
    run.id = state.id;
    yield { event: "progress", data: state };
    if (run.cancelled) await cancel(run);
  }
  yield* events(`dedicated/v1/requests/${run.id}/events`);
  throw new Unreachable(); // a stream that ends without an end
}

function pause(run, milliseconds) {
  return new Promise((resolve) => {
    run.wake = resolve;
    setTimeout(resolve, milliseconds);
  });
}
