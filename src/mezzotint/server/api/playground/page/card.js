// The card of the chosen endpoint: what its model is, what it draws, and how it is just now.

const $ = (id) => document.getElementById(id);
const STATES = { ready: "", starting: "Loading", sleeping: "Asleep; the next picture wakes it", failed: "Failed" };

/** `can` is what the endpoint says of itself, undefined where there is none. */
export function drawCard(can) {
  const { status = "", not_ready_because: reason, card } = can ?? {};
  const state = STATES[status] ?? status;
  $("card-state").textContent = reason && state ? `${state}: ${reason}` : state;
  $("card-state").classList.toggle("bad", status === "failed");
  $("card").hidden = !card;
  if (!card) return;
  $("card-about").textContent = card.about ?? "";
  $("card-about").hidden = !card.about;
  const facts = {
    Model: card.model,
    Licence: card.license ?? "not stated",
    Speed: card.step_s ? `about ${time(card.step_s)} a step, ${time(card.step_s * can.default_steps)} a picture` : "not measured yet",
    Size: `${many(card.num_parameters)} parameters, ${card.dtype}, on ${card.device}`,
    Pipeline: card.pipeline,
  };
  $("card-facts").replaceChildren(...Object.entries(facts).flatMap(([name, text]) => [
    Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: text }),
  ]));
}

const many = (count) => new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(count);
const time = (seconds) => (seconds < 1 ? `${Math.max(1, Math.round(1000 * seconds))} ms` : `${Number(seconds.toPrecision(2))} s`);
