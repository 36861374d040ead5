// Reads the settings in picture files: our own in PNG, JPEG and WebP, those of AUTOMATIC1111 and Forge, and ComfyUI's.
// The file stays in the browser.

import { parse } from "./api.js";

const MAX_STEPS = 50;
const latin = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""); // TextDecoder's latin1 is another
const utf8 = (bytes) => new TextDecoder().decode(bytes);

/** The request's fields, as far as the file says them; an Error has a sentence for the user. */
export async function readSettings(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const texts = await textsOf(bytes);
  if (!texts) throw new Error(`${file.name} is no PNG, JPEG or WebP.`);
  const fields = ours(texts.mezzotint) ?? ofInfotext(texts.parameters) ?? ofGraph(texts.prompt);
  if (!fields) throw new Error(`${file.name} has no settings in it that this page can read.`);
  if (fields.num_inference_steps > MAX_STEPS) fields.num_inference_steps = MAX_STEPS;
  if (fields.seed !== undefined) fields.seed = BigInt.asUintN(63, BigInt(fields.seed)).toString(); // ComfyUI's have 64 bits
  return fields;
}

async function textsOf(bytes) {
  const head = latin(bytes.subarray(0, 12));
  if (head.startsWith("\x89PNG\r\n\x1a\n")) return ofPng(bytes);
  if (head.startsWith("\xff\xd8\xff")) return ofJpeg(bytes);
  if (head.startsWith("RIFF") && head.endsWith("WEBP")) return ofWebp(bytes);
  return null;
}

// ---------------------------------------------------------------- containers

async function ofPng(bytes) {
  const view = new DataView(bytes.buffer);
  const texts = {};
  for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    const kind = latin(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    const end = data.indexOf(0);
    if (end < 0 || !["tEXt", "zTXt", "iTXt"].includes(kind)) continue;
    texts[latin(data.subarray(0, end))] = await pngText(kind, data.subarray(end + 1));
  }
  return texts;
}

async function pngText(kind, data) {
  if (kind === "tEXt") return latin(data);
  if (kind === "zTXt") return latin(await inflate(data.subarray(1)));
  const language = data.indexOf(0, 2);
  const text = data.subarray(data.indexOf(0, language + 1) + 1);
  return utf8(data[0] ? await inflate(text) : text);
}

async function inflate(data) {
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function ofJpeg(bytes) {
  const view = new DataView(bytes.buffer);
  const texts = {};
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda; at += 2 + view.getUint16(at + 2)) {
    const data = bytes.subarray(at + 4, at + 2 + view.getUint16(at + 2));
    if (bytes[at + 1] === 0xfe) texts.mezzotint = utf8(data);
    if (bytes[at + 1] === 0xe1 && latin(data.subarray(0, 6)) === "Exif\0\0") texts.parameters = exif(data.slice(6)).comment;
  }
  return texts;
}

function ofWebp(bytes) {
  const view = new DataView(bytes.buffer);
  for (let at = 12; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at + 4, true);
    if (latin(bytes.subarray(at, at + 4)) === "EXIF") {
      const data = bytes.slice(at + 8, at + 8 + size);
      const found = exif(latin(data.subarray(0, 6)) === "Exif\0\0" ? data.slice(6) : data);
      return { mezzotint: found.note, parameters: found.comment };
    }
    at += 8 + size + (size % 2);
  }
  return {};
}

/** UserComment and MakerNote. */
function exif(bytes) {
  const view = new DataView(bytes.buffer);
  const little = view.getUint16(0) === 0x4949;
  const found = {};
  const read = (start) => {
    for (let n = 0; n < view.getUint16(start, little); n++) {
      const at = start + 2 + 12 * n;
      const [tag, size, value] = [view.getUint16(at, little), view.getUint32(at + 4, little), view.getUint32(at + 8, little)];
      if (tag === 0x8769) read(value);
      if (tag === 0x9286) found.comment = comment(bytes.subarray(value, value + size));
      if (tag === 0x927c) found.note = utf8(bytes.subarray(value, value + size));
    }
  };
  try {
    read(view.getUint32(4, little));
  } catch {
    // cut short: what was found is what there is
  }
  return found;
}

function comment(bytes) {
  const text = bytes.subarray(8);
  if (!latin(bytes.subarray(0, 7)).startsWith("UNICODE")) return utf8(text);
  return new TextDecoder(text[1] === 0 && text[0] ? "utf-16le" : "utf-16be").decode(text);
}

// ---------------------------------------------------------------- what they say

function ours(text) {
  try {
    const fields = parse(text);
    const { adapter_scale: scale, pipeline, ...rest } = fields;
    if (typeof fields.prompt !== "string") return null;
    const [, route] = (fields.model ?? "").split(":");
    return scale == null || !route ? rest : { ...rest, adapters: [{ route, scale }] };
  } catch {
    return null;
  }
}

const numeric = (text) => (text === undefined || text === "" || Number.isNaN(Number(text)) ? undefined : Number(text));

/** AUTOMATIC1111's text: the prompt, `Negative prompt: ` and its lines, then one line of settings. */
function ofInfotext(text) {
  const lines = (text ?? "").trim().split(/\r?\n/);
  const last = lines.pop();
  const values = Object.fromEntries([...last.matchAll(/([\w -]{1,40}): ("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)/g)].map(([, name, value]) => [name.trim(), value]));
  if (!/^\d+$/.test(values.Steps ?? "")) return null;
  const [words, negative] = lines.join("\n").split(/\n?^Negative prompt: /m);
  const uses = [...words.matchAll(/<lora:([^:>]+)(?::(-?[\d.]+))?[^>]*>/gi)];
  const [, width, height] = /^(\d+)x(\d+)$/.exec(values.Size ?? "") ?? [];
  return trimmed({
    model: values.Model ?? "",
    prompt: words.replace(/\s*<lora:[^>]*>/gi, "").trim(),
    negative_prompt: negative?.trim(),
    num_inference_steps: numeric(values.Steps),
    guidance_scale: numeric(values["Distilled CFG Scale"] ?? values["CFG scale"]),
    seed: /^\d+$/.test(values.Seed ?? "") ? values.Seed : undefined,
    width: numeric(width),
    height: numeric(height),
    strength: "Hires upscale" in values ? undefined : numeric(values["Denoising strength"]),
    adapters: uses.length ? uses.map(([, route, scale]) => ({ route, scale: numeric(scale) ?? 1 })) : undefined,
  });
}

const trimmed = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined && value !== ""));

/** ComfyUI's graph as it was run: nodes {class_type, inputs} by id; an input may be [id of a node, output]. */
function ofGraph(text) {
  let nodes;
  try {
    nodes = JSON.parse(text.replace(/"(seed|noise_seed)":\s*(\d+)/g, '"$1":"$2"'));
  } catch {
    return null;
  }
  const node = (input) => (Array.isArray(input) ? nodes[input[0]] : undefined);
  /** The first answer of `look` along the inputs of these names, from a node backwards. */
  const seek = (start, names, look, deep = 0) => {
    if (!start || deep > 30) return undefined;
    const found = look(start.inputs ?? {}, start);
    if (found !== undefined) return found;
    return names.map((name) => seek(node(start.inputs?.[name]), names, look, deep + 1)).find((each) => each !== undefined);
  };
  const sampler = Object.values(nodes ?? {}).find(({ inputs }) => inputs && ("latent_image" in inputs) && ("steps" in inputs || "sigmas" in inputs));
  if (!sampler) return null;
  const { inputs } = sampler;
  const guider = node(inputs.guider) ?? sampler;
  const along = ["conditioning", "conditioning_1", "positive"];
  const say = (start) => seek(start, [...along, "text", "text_g"], ({ text: words, text_g: global, t5xxl, value, string }) =>
    [words, global, t5xxl, value, string].find((each) => typeof each === "string" && each.trim()));
  const positive = node(guider.inputs.positive) ?? node(guider.inputs.conditioning);
  const number = (start, names, name) => seek(start, names, ({ [name]: value }) => (typeof value === "number" ? value : undefined));
  const uses = [];
  const weights = seek(node(guider.inputs.model), ["model"], ({ lora_name: lora, strength_model: scale, ckpt_name: name, unet_name: other }) => {
    if (lora) uses.unshift({ route: stem(lora), scale: scale ?? 1 });
    return name ?? other;
  });
  const size = (name) => number(node(inputs.latent_image), ["samples", "latent_image"], name);
  const noise = node(inputs.noise)?.inputs ?? inputs;
  const sigmas = node(inputs.sigmas)?.inputs ?? inputs;
  return trimmed({
    model: stem(weights ?? ""),
    prompt: say(positive),
    negative_prompt: say(node(guider.inputs.negative)),
    num_inference_steps: sigmas.steps,
    guidance_scale: number(positive, along, "guidance") ?? guider.inputs.cfg,
    seed: [noise.seed, noise.noise_seed].find((each) => /^\d+$/.test(each ?? "")),
    width: size("width"),
    height: size("height"),
    strength: sigmas.denoise < 1 ? sigmas.denoise : undefined,
    adapters: uses.length ? uses : undefined,
  });
}

/** The name of a file of weights, without its folders and ending. */
const stem = (path) => path.split(/[\\/]/).pop().replace(/\.(safetensors|ckpt|pt|gguf|sft)$/, "");
