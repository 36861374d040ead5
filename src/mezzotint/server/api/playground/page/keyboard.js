// Single keys that work wherever nobody is writing; `?` lists them.

const $ = (id) => document.getElementById(id);
const LISTS = {
  "On the page": [
    ["?", "this list"],
    ["P", "to the prompt"],
    ["Ctrl Enter", "make the picture, or add it to the queue"],
    ["↑ ↓", "earlier and later prompts, from the ends of the prompt"],
    ["F", "full view"],
    ["← →", "the neighbours among the prints"],
    ["S", "star the picture on the sheet"],
    ["B", "begin from the picture on the sheet"],
    ["V", "variations of the picture on the sheet"],
    ["/", "search the prints"],
  ],
  "In the full view": [
    ["← →", "previous and next"],
    ["Home End", "first and last"],
    ["+ −", "zoom; so does the wheel"],
    ["0", "fit the window"],
    ["1", "a pixel for a pixel"],
    ["F Esc", "back to the page"],
  ],
  "On the mask": [
    ["← → ↑ ↓", "move the brush; with Shift, farther"],
    ["Space", "set the brush down, and lift it"],
    ["[ ]", "smaller and larger"],
    ["E", "erase, or paint again"],
    ["I", "invert"],
    ["Z", "undo; with Shift, redo"],
    ["Enter Esc", "done"],
  ],
};

/** `acts` are functions by key; one that returns false leaves the key to the browser. */
export function wireKeyboard(acts) {
  const all = { ...acts, "?": show };
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || isWriting(event.target)) return;
    const act = all[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act && act() !== false) event.preventDefault();
  });
  $("keyboard").addEventListener("click", show);
}

function isWriting(target) {
  return document.querySelector("dialog[open]") || target.closest?.("input, textarea, select, [role=application]");
}

function show() {
  $("keyboard-list").replaceChildren(...Object.entries(LISTS).map(([title, keys]) => {
    const part = document.createElement("div");
    const list = document.createElement("dl");
    for (const [names, text] of keys) {
      const term = document.createElement("dt");
      term.append(...names.split(" ").map((name) => Object.assign(document.createElement("kbd"), { textContent: name })));
      list.append(term, Object.assign(document.createElement("dd"), { textContent: text }));
    }
    part.append(Object.assign(document.createElement("h3"), { textContent: title }), list);
    return part;
  }));
  $("keyboard-dialog").showModal();
}
