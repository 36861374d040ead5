// Pictures that come from outside: dropped on the page, or pasted.

import { base } from "./api.js";

const $ = (id) => document.getElementById(id);

/** `begin` and `restore` take (blob, title); `mayBegin` says whether the endpoint can begin from a picture. */
export function wireDrop({ begin, restore, mayBegin }) {
  addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    $("drop").hidden = false;
    $("drop-begin").hidden = !mayBegin();
    for (const id of ["drop-begin", "drop-restore"]) $(id).classList.toggle("over", zone(event, mayBegin()) === id);
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("drop").hidden = true;
  });
  addEventListener("drop", async (event) => {
    $("drop").hidden = true;
    if (!carries(event)) return;
    event.preventDefault();
    const act = zone(event, mayBegin()) === "drop-begin" ? begin : restore;
    const files = await carried(event.dataTransfer);
    for (const { blob, title } of files) await act(blob, title);
  });
  addEventListener("paste", async (event) => {
    const [file] = [...(event.clipboardData?.files ?? [])].filter((each) => each.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    await begin(file, "the pasted picture");
  });
}

const carries = ({ dataTransfer }) => ["Files", "text/uri-list"].some((type) => dataTransfer?.types.includes(type));

/** The left half of the page begins from a picture, the right half takes its settings. */
function zone(event, mayBegin) {
  return mayBegin && event.clientX < innerWidth / 2 ? "drop-begin" : "drop-restore";
}

/** Files from the desktop, or a print that was dragged from this page. */
async function carried(transfer) {
  if (transfer.files.length) return [...transfer.files].map((file) => ({ blob: file, title: file.name }));
  const address = transfer.getData("text/uri-list").split("\n")[0];
  if (!address.startsWith(base.href)) return [];
  return [{ blob: await (await fetch(address)).blob(), title: "this print" }];
}
