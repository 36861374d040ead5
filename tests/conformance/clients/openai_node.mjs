// OpenAI's client for Node.js.

import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";
import * as target from "./target.mjs";

const { url, key, model, prompt, steps, seed } = target;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const png = (bytes, name) => toFile(bytes, name, { type: "image/png" });
const redSquare = () => png(target.redSquare, "red.png");

await target.run([
  ["base64, models", async () => {
    const asked = { model, prompt, response_format: "b64_json", num_inference_steps: steps, seed };
    assert.equal((await client.images.generate(asked)).data[0].b64_json, target.expected);
    const models = await client.models.list();
    assert.ok(models.data.some((one) => one.id === model));
  }],
  ["its own defaults: only a prompt; `gpt-image-1`, 1024x1024", async () => {
    const made = await client.images.generate({ model, prompt });
    assert.ok(target.decode(made.data[0].b64_json).width);
    const named = { model: "gpt-image-1", prompt, n: 2, size: "1024x1024", quality: "high", background: "auto" };
    assert.equal((await client.images.generate(named)).data.length, 2);
  }],
  ["stream with partial images", async () => {
    const events = [];
    const asked = { model, prompt, stream: true, partial_images: 2, num_inference_steps: steps, seed };
    for await (const event of await client.images.generate(asked)) events.push(event);
    assert.deepEqual(events.map((event) => event.type.split(".")[1]), ["partial_image", "partial_image", "completed"]);
    assert.equal(events.at(-1).b64_json, target.expected);
  }],
  ["errors in the server's words", async () => {
    const wrong = client.images.generate({ model, prompt, n: 11 });
    await assert.rejects(wrong, (error) => error instanceof OpenAI.BadRequestError && /between 1 and 10/.test(error.message));
  }],
  ["edits: picture, strength, mask, stream", async () => {
    const plain = await client.images.edit({ model, prompt, image: await redSquare() });
    assert.ok(target.decode(plain.data[0].b64_json).width);
    const soft = await client.images.edit({ model, prompt, image: await redSquare(), strength: target.little });
    target.checkNearlyRed(soft.data[0].b64_json);
    const masked = await client.images.edit({
      model, prompt: "a cat", image: [await redSquare()], mask: await png(target.transparentHole, "mask.png"),
    });
    target.checkOutside(masked.data[0].b64_json);
    const types = [];
    const asked = { model, prompt, image: await redSquare(), stream: true, partial_images: 1 };
    for await (const event of await client.images.edit(asked)) types.push(event.type);
    assert.equal(types.at(-1), "image_edit.completed");
  }],
]);
