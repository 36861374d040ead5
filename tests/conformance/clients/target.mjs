// The server that a Node.js client is driven against, and what its pictures must be; see target.py.
// Copied, with the client's script, into the client's environment.

import assert from "node:assert/strict";
import { PNG } from "pngjs";

export const [url, key, model] = process.argv.slice(2);
export const prompt = "a red apple on a teal background";
export const steps = 4;
export const seed = 7;
export const little = 0.2;
const hole = [40, 88];

export async function post(path, body) {
  const response = await fetch(url + path, {
    method: "POST",
    headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  assert.ok(response.ok, `${path}: ${response.status} ${response.ok ? "" : await response.text()}`);
  return response.json();
}

// The base64 of the PNG that prompt, steps and seed must give.
const asked = { model, prompt, num_inference_steps: steps, seed, response_format: "png" };
export const expected = (await post("/dedicated/v1/images/generations", asked)).data[0].b64_json;

export const decode = (base64) => PNG.sync.read(Buffer.from(base64, "base64"));

function drawn(colour) {
  const image = new PNG({ width: 128, height: 128 });
  for (let y = 0; y < 128; y++) for (let x = 0; x < 128; x++) image.data.set(colour(x, y), 4 * (128 * y + x));
  return image;
}
const within = (x, y, low, high) => x >= low && x < high && y >= low && y < high;
const red = drawn((x, y) => (within(x, y, 32, 96) ? [255, 0, 0, 255] : [255, 255, 255, 255]));
const mask = drawn((x, y) => (within(x, y, ...hole) ? [0, 0, 0, 0] : [0, 0, 0, 255]));

export const redSquare = PNG.sync.write(red);
export const transparentHole = PNG.sync.write(mask);

// A little strength leaves the red square a red square.
export function checkNearlyRed(base64) {
  const made = decode(base64);
  assert.deepEqual([made.width, made.height], [128, 128]);
  const sums = [0, 0, 0];
  for (let y = 44; y < 84; y++) for (let x = 44; x < 84; x++) for (let c = 0; c < 3; c++) sums[c] += made.data[4 * (128 * y + x) + c];
  const [r, g, b] = sums.map((sum) => sum / 1600);
  assert.ok(r > 200 && g < 60 && b < 60, `${r} ${g} ${b}`);
  assert.ok(!made.data.equals(red.data), "nothing was edited");
}

// Only the middle differs from the red square.
export function checkOutside(base64) {
  const made = decode(base64);
  for (let y = 0; y < 128; y++) {
    for (let x = 0; x < 128; x++) {
      const at = 4 * (128 * y + x);
      const far = [0, 1, 2].some((c) => Math.abs(made.data[at + c] - red.data[at + c]) > 2);
      assert.ok(!far || within(x, y, ...hole), `the pixel ${x},${y} outside the mask`);
    }
  }
  assert.ok(!made.data.equals(red.data), "nothing was edited");
}

export async function run(checks) {
  for (const [check, ask] of checks) {
    let fault = "";
    try {
      await ask();
    } catch (error) {
      fault = String(error?.stack ?? error);
    }
    console.log(JSON.stringify({ check, fault }));
  }
}
