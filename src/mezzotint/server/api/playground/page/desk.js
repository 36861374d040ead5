// The desk: lays what the queue makes on the sheet, and says how far it is.

import { known } from "./beginning.js";
import { complain, guarded, note, say, showError } from "./notice.js";
import * as queue from "./queue.js";
import * as stage from "./stage.js";

const $ = (id) => document.getElementById(id);
let said = "";
let onMade = () => {};

/** The run whose pictures lie on the sheet, else the one that will be done first. */
const front = () => queue.all().find((run) => run.set === stage.lying()) ?? queue.all()[0];

export function wireDesk(made) {
  onMade = made;
  queue.wireQueue((run, event, data) => HEARD[event](run, data));
  $("watch").addEventListener("click", () => {
    lay(front());
    $("cancel").focus();
  });
  $("cancel").addEventListener("click", () => stopAll(queue.all().filter((run) => run.set === front().set)));
  $("cancel-all").addEventListener("click", () => stopAll(queue.all()));
}

/** Ends runs, the last first, so that none of them begins meanwhile. */
const stopAll = (runs) => [...runs].reverse().forEach((run) => guarded(() => queue.stop(run)));

const HEARD = {
  asked(run) {
    showError(null);
    note("");
    const before = queue.all().findIndex((other) => other.set === run.set);
    if (before === 0 && run.set !== stage.lying()) lay(run);
    said = "";
    say(before ? `In the queue, ${before} before it` : "Sent");
    draw();
  },
  begun: draw,
  progress(run) {
    if (run.progress.step > 0) turnTo(run);
    draw();
  },
  preview(run) {
    turnTo(run);
    draw();
  },
  away(run) {
    draw();
    if (run === front()) say(run.away);
  },
  refused(run, error) {
    draw();
    complain(error);
  },
  cancelled(run) {
    say("Cancelled");
    putBack(run);
    draw();
  },
  failed(run, error) {
    putBack(run);
    draw();
    complain(error, queue.all().length ? run.fields.prompt : "");
  },
  async done(run, answer) {
    for (const { name, from } of run.set.pictures) if (from) known.set(name, from);
    turnTo(run);
    draw();
    note(answer.warnings.join(" "));
    await onMade();
    const left = queue.all().length;
    say(left ? `Done, ${left} to go` : "Done");
  },
};

function lay({ set }) {
  if (stage.lying() !== set) set.before = stage.lying();
  stage.lay(set);
}

/** Lays a run's pictures where those of a run lie that has ended; whoever looks at a print is not disturbed. */
function turnTo(run) {
  const lies = stage.lying();
  if (!lies?.ended || lies === run.set) return;
  lay(run);
}

/** Takes away what came to nothing: the next run's pictures lie there instead, else what lay there before. */
function putBack(run) {
  if (run.set !== stage.lying() || queue.all().some((other) => other.set === run.set)) return;
  if (run.set.pictures.some(({ name }) => name)) return;
  const [next] = queue.all();
  if (next) lay(next);
  else stage.lay(run.set.before?.pictures.some(({ name }) => name) ? run.set.before : null);
}

/** What a run waits for or does, in words. */
function words(run) {
  if (run.away) return run.away;
  if (run.set.grid) return gridWords(run.set);
  if (!run.sent) return "waits here";
  if (!run.progress) return "sending";
  const { status, position, loading, seconds_left: left } = run.progress;
  const place = position ? `queued, ${position} ${position === 1 ? "goes" : "go"} first` : "queued, next in line";
  const text = status !== "queued" ? count(run.progress) : loading ? load(loading) : place;
  return left ? `${text}, about ${duration(left)} left` : text;
}

function gridWords({ pictures }) {
  return `${pictures.filter(({ name }) => name).length} of ${pictures.length} pictures of the grid`;
}

/** How much of what lies on the sheet for this run is done. */
function share({ set, progress }) {
  if (set.grid) return set.pictures.filter(({ name }) => name).length / set.pictures.length;
  return progress ? (progress.step ?? 0) / (progress.num_steps ?? 1) : 0;
}

/** Steps as people count them: of this picture, and of how many pictures. */
function count({ step = 0, num_steps: steps = 1, picture, num_pictures: pictures = 1, picture_step: own, num_picture_steps: all }) {
  if (pictures === 1) return `step ${step} of ${steps}`;
  return `picture ${picture} of ${pictures}, step ${own} of ${all}`;
}

const load = ({ stage: text, fraction }) => (fraction == null ? text : `${text} (${Math.round(100 * fraction)} %)`);

const duration = (seconds) => (seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} min`);

function draw() {
  const run = front();
  $("running").hidden = !run;
  $("make-text").textContent = run ? "Add to the queue" : "Make picture";
  document.title = "Mezzotint";
  const sets = new Map(queue.all().map((each) => [each.set, each])); // one line for each
  drawWaiting([...sets.values()].filter((each) => each.set !== run?.set));
  if (!run) return;
  const { status, step = 0, num_steps: steps = 1 } = run.progress ?? {};
  $("watch").hidden = run.set === stage.lying();
  $("progress").value = share(run);
  $("progress-text").textContent = words(run);
  if (run.progress) document.title = `${status === "queued" ? "queued" : `${step}/${steps}`} · Mezzotint`;
  if (status && said !== `${run.sender} ${status}`) {
    said = `${run.sender} ${status}`;
    say(status === "queued" ? words(run) : "Running");
  }
}

function drawWaiting(others) {
  $("waiting").hidden = !others.length;
  $("cancel-all").hidden = !others.length;
  const lines = [...$("waiting-list").children];
  for (const line of lines) if (!others.some(({ set }) => set.line === line)) line.remove();
  for (const run of others) {
    const line = (run.set.line ??= newLine(run));
    if (line.parentElement !== $("waiting-list")) $("waiting-list").append(line);
    line.querySelector("small").textContent = words(run);
  }
}

function newLine(run) {
  const line = document.createElement("li");
  const show = Object.assign(document.createElement("button"), { type: "button", className: "show" });
  const title = Object.assign(document.createElement("em"), { textContent: run.fields.prompt });
  show.append(title, document.createElement("small"));
  show.addEventListener("click", () => lay(run));
  const drop = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "Take back" });
  drop.setAttribute("aria-label", `Take back: ${run.fields.prompt}`);
  drop.addEventListener("click", () => stopAll(queue.all().filter((other) => other.set === run.set)));
  line.append(show, drop);
  return line;
}

/** Draws again what depends on what lies on the sheet. */
export const refresh = draw;
