// The slider over the plate: what a picture began from on its left, what became of it on its right.

import { shown } from "./stage.js";

const $ = (id) => document.getElementById(id);
let on = false;

const before = () => shown()?.from?.pictures[0];

/** Takes up what lies on the sheet now. */
export function refresh() {
  const possible = Boolean(before() && shown().name);
  $("before-after").hidden = !possible;
  const split = on && possible;
  $("before-after").setAttribute("aria-pressed", String(split));
  $("before").hidden = $("cut").hidden = !split;
  if (split) $("before").src = before().url;
}

export function wireSlider() {
  $("before-after").addEventListener("click", () => {
    on = !on;
    refresh();
    if (on) $("cut").focus();
  });
  $("cut").addEventListener("input", () => $("plate").style.setProperty("--part", $("cut").value / 100));
}
