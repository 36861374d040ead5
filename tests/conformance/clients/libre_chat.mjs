// LibreChat's requests, sent as its tools send them: it needs a database and a browser of its own.
// Its "Stable Diffusion" tool knows no key, and its "OpenAI Image Tools" always name gpt-image-1.

import assert from "node:assert/strict";
import axios from "axios";
import FormData from "form-data";
import OpenAI from "openai";
import * as target from "./target.mjs";

const { url, key } = target;
const prompt = "a red apple, teal background, studio light, soft shadow, sharp, centred, glossy";
const negative_prompt = "semi-realistic, cgi, 3d, render, sketch, cartoon, drawing, anime, out of frame, low quality, ugly";

await target.run([
  ["Stable Diffusion tool: 1024x1024 and a negative prompt", async () => {
    const payload = { prompt, negative_prompt, cfg_scale: 4.5, steps: 22, width: 1024, height: 1024 };
    const { data } = await axios.post(`${process.env.OPEN_URL}/sdapi/v1/txt2img`, payload);
    const picture = target.decode(data.images[0].split(",", 1)[0]);
    const info = JSON.parse(data.info);
    assert.deepEqual([info.width, info.height], [picture.width, picture.height]);
    assert.ok(info.infotexts[0].startsWith(prompt));
  }],
  ["image generation tool: gpt-image-1", async () => {
    const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
    const made = await openai.images.generate({
      model: "gpt-image-1", prompt, n: 1, background: "auto", output_format: "png", quality: "auto", size: "auto",
    });
    assert.ok(target.decode(made.data[0].b64_json).width);
  }],
  ["image edit tool", async () => {
    const form = new FormData();
    const fields = { model: "gpt-image-1", prompt, quality: "auto", size: "auto" };
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    form.append("image[]", target.redSquare, { filename: "red.png", contentType: "image/png" });
    const headers = { ...form.getHeaders(), authorization: `Bearer ${key}` };
    const { data } = await axios.post("/images/edits", form, { headers, baseURL: `${url}/v1` });
    assert.ok(!Buffer.from(data.data[0].b64_json, "base64").equals(target.redSquare));
  }],
]);
