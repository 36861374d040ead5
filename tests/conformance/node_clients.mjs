// Real Node.js clients against a running server; prints one JSON line for each check.
// node node_clients.mjs URL KEY MODEL      (run by scripts/conformance in a folder of its own)

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";
import OpenAI from "openai";

const [url, key, model] = process.argv.slice(2);
const prompt = "a red apple on a teal background";
const extra = { seed: 7, num_inference_steps: 4 };

async function expected() {
  const response = await fetch(`${url}/dedicated/v1/images/generations`, {
    method: "POST",
    headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
    body: JSON.stringify({ model, prompt, response_format: "png", ...extra }),
  });
  return (await response.json()).data[0].b64_json;
}

const client = () => new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const sdk = () => createOpenAICompatible({ name: "mezzotint", baseURL: `${url}/v1`, apiKey: key });

const checks = [
  ["openai (Node.js)", "openai", "base64, models", async (png) => {
    const made = await client().images.generate({ model, prompt, response_format: "b64_json", ...extra });
    assert.equal(made.data[0].b64_json, png);
    const models = await client().models.list();
    assert.ok(models.data.some((one) => one.id === model));
  }],
  ["openai (Node.js)", "openai", "stream with partial images", async (png) => {
    const events = [];
    const asked = { model, prompt, stream: true, partial_images: 2, ...extra };
    for await (const event of await client().images.generate(asked)) events.push(event);
    assert.deepEqual(events.map((event) => event.type.split(".")[1]), ["partial_image", "partial_image", "completed"]);
    assert.equal(events.at(-1).b64_json, png);
  }],
  ["openai (Node.js)", "openai", "errors in the server's words", async () => {
    const wrong = client().images.generate({ model, prompt, steps: 99 });
    await assert.rejects(wrong, (error) => error.status === 422 && /between 1 and 50/.test(error.message));
  }],
  ["Vercel AI SDK", "ai", "generateImage", async (png) => {
    const asked = { model: sdk().imageModel(model), prompt, providerOptions: { mezzotint: extra } };
    assert.equal((await generateImage(asked)).image.base64, png);
  }],
  ["Vercel AI SDK", "ai", "errors in the server's words", async () => {
    const asked = { model: sdk().imageModel(model), prompt, maxRetries: 0, providerOptions: { mezzotint: { steps: 99 } } };
    await assert.rejects(generateImage(asked), /between 1 and 50/);
  }],
];

const png = await expected();
for (const [name, pkg, check, run] of checks) {
  const { version } = JSON.parse(readFileSync(new URL(`node_modules/${pkg}/package.json`, import.meta.url)));
  let fault = "";
  try {
    await run(png);
  } catch (error) {
    fault = error.stack;
  }
  console.log(JSON.stringify({ client: name, version, check, fault }));
}
