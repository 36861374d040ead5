// The same request for other clients. The key stays out: each takes it from MEZZOTINT_API_KEY.

import { base, stringify } from "./api.js";

const server = () => base.href.replace(/\/$/, "");
const python = (value) => (typeof value === "string" ? JSON.stringify(value) : String(value));
const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function keywords(fields) {
  return Object.entries(fields).map(([name, value]) => `    ${name}=${name === "seed" ? value : python(value)},`).join("\n");
}

export const recipes = {
  curl: (fields) => `curl -sS ${server()}/dedicated/v1/images/generations \\
  -H "Authorization: Bearer $MEZZOTINT_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d ${shell(stringify({ ...fields, response_format: "url" }, 2))} \\
  | tee /dev/stderr | grep -o 'http[^"]*' | xargs -r -n 1 curl -sS ${fields.n > 1 ? "-O" : "-o picture.png"}`,

  python: (fields) => `from mezzotint import Client

client = Client(base_url="${server()}")
picture = client.images.generate(
${keywords({ ...fields, response_format: "png" })}
)
picture.save("picture.png")`,

  openai: (fields) => {
    const { model, prompt, n, response_format, ...extra } = fields;
    const own = n ? { model, prompt, n } : { model, prompt };
    const flat = Object.entries(extra).map(([name, value]) => `"${name}": ${name === "seed" ? value : python(value)}`);
    return `import base64, os
from openai import OpenAI

client = OpenAI(base_url="${server()}/v1", api_key=os.environ["MEZZOTINT_API_KEY"])
answer = client.images.generate(
${keywords({ ...own, response_format: "b64_json" })}
    extra_body={${flat.join(", ")}},
)
with open("picture.png", "wb") as file:
    file.write(base64.b64decode(answer.data[0].b64_json))`;
  },
};
