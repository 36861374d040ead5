// The same request for other clients. The key stays out: each takes it from MEZZOTINT_API_KEY.
// What a picture began from stays out too: each reads it from the files `begin.png` and `mask.png`.

import { base, stringify } from "./api.js";

const server = () => base.href.replace(/\/$/, "");
const python = (value) => (["string", "object"].includes(typeof value) ? JSON.stringify(value) : String(value));
const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const here = (text) => text.replace(/[\\$`]/g, "\\$&"); // within <<END, where the shell fills in what $(...) says
const file = (name) => `"$(base64 < ${name} | tr -d '\\n')"`;

/** The files that an edit reads: one picture is begin.png, several are begin-1.png and so on. */
export function filesOf({ pictures, strokes }) {
  const images = pictures.map((_, at) => (pictures.length > 1 ? `begin-${at + 1}.png` : "begin.png"));
  return { images, mask: strokes.length ? "mask.png" : null };
}

const save = (fields) => `| tee /dev/stderr | grep -o 'http[^"]*' | xargs -r -n 1 curl -sS ${fields.n > 1 ? "-O" : "-o picture.png"}`;
const head = (path) => `curl -sS ${server()}/dedicated/v1/images/${path} \\
  -H "Authorization: Bearer $MEZZOTINT_API_KEY" \\
  -H "Content-Type: application/json" \\`;

function keywords(fields) {
  return Object.entries(fields).map(([name, value]) => `    ${name}=${name === "seed" ? value : python(value)},`).join("\n");
}

function curl(fields, from) {
  const body = { ...fields, response_format: "url" };
  if (!from) return `${head("generations")}\n  -d ${shell(stringify(body, 2))} \\\n  ${save(fields)}`;
  const { images, mask } = filesOf(from);
  const pictures = images.map((name) => `{"image": ${file(name)}}`).join(", ");
  const more = mask ? `\n  "mask": {"image": ${file(mask)}},` : "";
  return `${head("edits")}
  -d @- <<END ${save(fields)}
{
  "image": [${pictures}],${more}${here(stringify(body, 2)).slice(1)}
END`;
}

function sdk(fields, from) {
  const { images, mask } = from ? filesOf(from) : {};
  const pictures = from ? { image: images.length > 1 ? images : images[0], ...(mask && { mask }) } : {};
  return `from mezzotint import Client

client = Client(base_url="${server()}")
picture = client.images.${from ? "edit" : "generate"}(
${keywords({ ...fields, ...pictures, response_format: "png" })}
)
picture.save("picture.png")`;
}

function openai(fields, from) {
  const { model, prompt, n, response_format, ...extra } = fields;
  const own = n ? { model, prompt, n } : { model, prompt };
  const value = (name) => (name === "seed" ? extra[name] : from && name === "adapters" ? python(JSON.stringify(extra[name])) : python(extra[name]));
  const flat = Object.keys(extra).map((name) => `"${name}": ${value(name)}`);
  const { images, mask } = from ? filesOf(from) : {};
  const opened = from ? `    image=[${images.map((name) => `open("${name}", "rb")`).join(", ")}],\n${mask ? `    mask=open("${mask}", "rb"),\n` : ""}` : "";
  return `import base64, os
from openai import OpenAI

client = OpenAI(base_url="${server()}/v1", api_key=os.environ["MEZZOTINT_API_KEY"])
answer = client.images.${from ? "edit" : "generate"}(
${opened}${keywords({ ...own, response_format: "b64_json" })}
    extra_body={${flat.join(", ")}},
)
with open("picture.png", "wb") as file:
    file.write(base64.b64decode(answer.data[0].b64_json))`;
}

/** By name: functions of a picture's fields and of what it began from, null for words alone. */
export const recipes = { curl, python: sdk, openai };
