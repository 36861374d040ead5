// The real SillyTavern server, asked through its own routes for images as its page asks them.
// The page's defaults are read from the page's own script.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, openSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import * as target from "./target.mjs";

const { url, key, model, prompt } = target;
const program = fileURLToPath(new URL("node_modules/sillytavern/", import.meta.url));
const folder = mkdtempSync(join(tmpdir(), "sillytavern-"));

const port = await new Promise((done) => {
  const free = createServer().listen(0, "127.0.0.1", () => {
    const found = free.address().port;
    free.close(() => done(found));
  });
});
const log = join(folder, "log");
const tavern = spawn(
  "node",
  [join(program, "server.js"), "--port", port, "--dataRoot", join(folder, "data"), "--configPath", join(folder, "config.yaml"),
    "--browserLaunchEnabled", "false", "--disableCsrf", "true"],
  { cwd: program, stdio: ["ignore", openSync(log, "a"), openSync(log, "a")] },
);
process.on("exit", () => {
  tavern.kill();
  rmSync(folder, { recursive: true, force: true });
});

const home = `http://127.0.0.1:${port}`;
const ask = (route, body) =>
  fetch(`${home}/api/sd/${route}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

async function json(route, body) {
  const answer = await ask(route, body);
  assert.ok(answer.ok, `${route}: ${answer.status}\n${readFileSync(log, "utf8").slice(-1500)}`);
  const text = await answer.text();
  return text && text !== "OK" ? JSON.parse(text) : text;
}

async function started() {
  for (let tried = 0; tried < 180; tried++) {
    if (tavern.exitCode !== null) break;
    if ((await fetch(`${home}/version`).catch(() => null))?.ok) return;
    await new Promise((done) => setTimeout(done, 1000));
  }
  throw new Error(readFileSync(log, "utf8").slice(-3000));
}

// What its page sends before anyone has changed a setting.
function defaults() {
  const text = readFileSync(join(program, "public/scripts/extensions/stable-diffusion/index.js"), "utf8");
  const constant = (name) => text.match(new RegExp(`^const ${name} = ('.*');$`, "m"))[1];
  const settings = text.match(/^const defaultSettings = (\{.*?^\});$/ms)[1];
  const read = new Function("sources", "promptTemplates", "defaultStyles", "defaultPrefix", "defaultNegative", `return ${settings}`);
  return read({}, {}, [], ...["defaultPrefix", "defaultNegative"].map((name) => new Function(`return ${constant(name)}`)()));
}

await started();
const sd = defaults();
const words = `${sd.prompt_prefix} ${prompt}`;
const auto = { url, auth: `anyone:${key}` };
// The body of the page's generateAutoImage().
const body = {
  ...auto, prompt: words, negative_prompt: sd.negative_prompt, sampler_name: sd.sampler, scheduler: sd.scheduler, steps: sd.steps,
  cfg_scale: sd.scale, width: sd.width, height: sd.height, restore_faces: sd.restore_faces, enable_hr: sd.enable_hr,
  hr_upscaler: sd.hr_upscaler, hr_scale: sd.hr_scale, hr_additional_modules: [], denoising_strength: sd.denoising_strength,
  hr_second_pass_steps: sd.hr_second_pass_steps, override_settings: { CLIP_stop_at_last_layers: sd.clip_skip },
  override_settings_restore_afterwards: true, clip_skip: sd.clip_skip, save_images: true, send_images: true, do_not_save_grid: false,
  do_not_save_samples: false,
};

await target.run([
  ["Stable Diffusion Web UI: connects, lists, chooses a model", async () => {
    await json("ping", auto);
    const models = await json("models", auto);
    assert.ok(models.some((one) => one.value === model));
    for (const list of ["samplers", "schedulers", "upscalers", "vaes"]) assert.ok(Array.isArray(await json(list, auto)), list);
    await json("set-model", { ...auto, model });
    assert.equal(await (await ask("get-model", auto)).text(), model);
  }],
  ["its own defaults: 512x512, a long negative prompt", async () => {
    assert.deepEqual([sd.width, sd.height], [512, 512]);
    assert.ok(sd.negative_prompt.length > 100);
    const made = await json("generate", body);
    const picture = target.decode(made.images[0]);
    assert.deepEqual([picture.width, picture.height], [128, 128]);
    assert.match(made.info, /cannot draw 512x512/);
  }],
  ["more steps than 50, hires fix and ADetailer", async () => {
    const script = { ADetailer: { args: [true, true, { ad_model: "face_yolov8n.pt" }] } };
    const made = await json("generate", { ...body, steps: 150, enable_hr: true, alwayson_scripts: script });
    assert.ok(target.decode(made.images[0]).width);
    for (const said of [/num_inference_steps is 50/, /hires fix/, /ADetailer/]) assert.match(made.info, said);
  }],
  ["stable-diffusion.cpp, a server without a key", async () => {
    const sdcpp = { url: process.env.OPEN_URL };
    await json("sdcpp/ping", sdcpp);
    const models = await json("sdcpp/models", sdcpp);
    assert.ok(models.data.some((one) => one.id === model));
    const { steps, scale, width, height, sampler, scheduler, clip_skip } = sd;
    const made = await json("sdcpp/generate", {
      ...sdcpp, model, prompt: words, negative_prompt: sd.negative_prompt, steps, cfg_scale: scale, width, height, batch_size: 1,
      sampler_name: sampler, scheduler, clip_skip,
    });
    assert.ok(target.decode(made.images[0]).width);
  }],
  ["a refusal reaches its user as an error", async () => {
    const refused = await ask("generate", { ...body, auth: "anyone:wrong" });
    assert.equal(refused.status, 500);
  }],
]);
process.exit();
