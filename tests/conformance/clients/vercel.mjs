// Vercel's AI SDK, with its provider for compatible servers and with OpenAI's.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";
import * as target from "./target.mjs";

const { url, key, prompt, steps, seed } = target;
const at = { baseURL: `${url}/v1`, apiKey: key };
const model = createOpenAICompatible({ name: "mezzotint", ...at }).imageModel(target.model);
const openai = createOpenAI(at).image("gpt-image-1");
const more = (fields) => ({ providerOptions: { mezzotint: fields } });

await target.run([
  ["generateImage", async () => {
    const made = await generateImage({ model, prompt, ...more({ num_inference_steps: steps, seed }) });
    assert.equal(made.image.base64, target.expected);
  }],
  ["its own defaults, n and size, OpenAI's provider", async () => {
    assert.ok(target.decode((await generateImage({ model, prompt })).image.base64).width);
    const several = await generateImage({ model: openai, prompt, n: 2, size: "1024x1024" });
    assert.equal(several.images.length, 2);
    for (const image of several.images) assert.ok(target.decode(image.base64).width);
  }],
  ["errors in the server's words", async () => {
    const wrong = generateImage({ model, prompt, maxRetries: 0, ...more({ guidance_scale: 1000 }) });
    await assert.rejects(wrong, /between 0 and 100/);
  }],
  ["edits: `prompt.images`, strength, mask", async () => {
    const images = [target.redSquare];
    for (const which of [model, openai]) {
      const plain = await generateImage({ model: which, prompt: { images, text: prompt } });
      assert.ok(target.decode(plain.image.base64).width);
    }
    const soft = await generateImage({ model, prompt: { images, text: prompt }, ...more({ strength: target.little }) });
    target.checkNearlyRed(soft.image.base64);
    const masked = await generateImage({ model, prompt: { images, text: "a cat", mask: target.transparentHole } });
    target.checkOutside(masked.image.base64);
  }],
]);
