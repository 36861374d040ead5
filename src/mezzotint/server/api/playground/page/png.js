// Reads the settings that Mezzotint writes into its PNGs (iTXt `mezzotint`, uncompressed JSON).

import { parse } from "./api.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

/** The request's fields; throws an Error with a sentence for the user if the file has none. */
export async function readSettings(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (!SIGNATURE.every((byte, at) => bytes[at] === byte)) throw new Error(`${file.name} is not a PNG.`);
  for (const [kind, data] of chunks(bytes)) {
    const fields = kind === "iTXt" ? fieldsOf(data) : null;
    if (fields) return fields;
  }
  throw new Error(`${file.name} has no settings in it that Mezzotint wrote.`);
}

function* chunks(bytes) {
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    yield [kind, bytes.subarray(at + 8, at + 8 + length)];
    at += 12 + length;
  }
}

/** keyword NUL, compression flag and method, language NUL, translated keyword NUL, text */
function fieldsOf(data) {
  const text = new TextDecoder().decode(data);
  if (!text.startsWith("mezzotint\0\0\0")) return null;
  try {
    const fields = parse(text.slice(12).split("\0").slice(2).join("\0"));
    return typeof fields.prompt === "string" ? fields : null;
  } catch {
    return null;
  }
}
