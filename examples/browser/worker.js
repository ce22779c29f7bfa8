// Runs the adaptive model and its dense twin, away from the page, so that the page stays responsive.
// In: {kind: "open", site, info, threads}, then {kind: "show", id, picture, file, tone, budget}.
// Out: "progress", "ready", "dense", then of each request a "result" and "timing", "unreadable" or "error".

import * as ort from "./ort/ort.js";
import { cropped, normalised, rgb, suggestedTone, toned, UNREADABLE } from "./pixels.js";

const ROUNDS = 9; // of timing, in turns with the dense twin
const FIRST = 3; // rounds before times are shown
const REMEMBERED = 32; // pictures that stay decoded and cropped
const MOST_PIXELS = 100e6;

const model = { adaptive: null, dense: null, info: null };
const crops = new Map();
let newest = null;
let busy = false;

self.onmessage = async ({ data }) => {
  if (data.kind === "show") {
    newest = data;
    if (model.adaptive && !busy) await work();
    return;
  }
  try {
    await open(data);
  } catch (error) {
    post("error", { message: `The model could not be loaded: ${error.message}` });
  }
};

function post(kind, values) {
  self.postMessage({ kind, ...values });
}

async function open({ site, info, threads }) {
  const place = (name) => new URL(`./ort/${name}`, import.meta.url).href;
  ort.env.wasm.wasmPaths = { mjs: place("wasm.js"), wasm: place("ort.wasm") };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  model.info = info;
  model.adaptive = await load(site.model, "the adaptive model");
  post("ready", {});
  await work();
  model.dense = await load(site.dense, "its dense twin");
  post("dense", {});
}

async function load(file, what) {
  const options = { executionProviders: ["wasm"] };
  const session = await ort.InferenceSession.create(await download(file, what), options);
  const side = model.info.architecture.image_size;
  await run(session, new Float32Array(3 * side * side), 0); // the first run is slower
  return session;
}

async function download(file, what) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  const total = Number(response.headers.get("Content-Length")) || 0;
  const parts = [];
  let loaded = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    loaded += value.length;
    post("progress", { what, loaded, total });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** Answers requests until there is none left; of those that came meanwhile, the newest alone. */
async function work() {
  busy = true;
  while (newest) {
    const request = newest;
    newest = null;
    try {
      await answer(request);
    } catch ({ message }) {
      post("error", { message });
    }
  }
  busy = false;
}

async function answer(request) {
  const { id, picture, budget } = request;
  const found = await prepared(request).catch(({ message }) => post("unreadable", { picture, message }));
  if (!found) return;
  const { crop, tone, pixels } = found;
  const { outputs, ms } = await run(model.adaptive, pixels, budget);
  post("result", { id, picture, budget, crop, tone, ms, ...plain(outputs) });
  if (!model.dense) return;
  const times = { adaptive: [], dense: [] };
  for (let round = 1; round <= ROUNDS; round++) {
    for (const name in times) {
      if (await overtaken()) return;
      times[name].push((await run(model[name], pixels, budget)).ms);
    }
    const done = round === ROUNDS;
    const [adaptive, dense] = [median(times.adaptive), median(times.dense)];
    if (done || round === FIRST) post("timing", { id, budget, adaptive, dense, done }); // what is drawn costs time too
  }
}

/** Whether another request came; messages arrive only while nothing runs. */
async function overtaken() {
  await new Promise((resolve) => setTimeout(resolve));
  return newest !== null;
}

async function run(session, pixels, budget) {
  const side = model.info.architecture.image_size;
  const feeds = { images: new ort.Tensor("float32", pixels, [1, 3, side, side]) };
  if (session.inputNames.includes("budget")) feeds.budget = new ort.Tensor("float32", [budget], [1]);
  const start = performance.now();
  const outputs = await session.run(feeds);
  return { outputs, ms: performance.now() - start };
}

function plain({ logits, tokens, heads, sublayers, macs }) {
  return {
    logits: logits.data,
    tokens: tokens.data,
    heads: heads.data,
    sublayers: sublayers.data,
    macs: Number(macs.data[0]),
  };
}

/** A request's picture as the model takes it, and as it is shown. */
async function prepared({ picture, file, tone }) {
  const key = `${picture} ${tone}`;
  if (!crops.has(key)) {
    const decoded = await decode(file);
    const chosen = tone ?? suggestedTone(decoded);
    const crop = cropped(toned(decoded, chosen), model.info.preprocessing);
    crops.set(key, { crop: crop.data, tone: chosen, pixels: normalised(crop, model.info.preprocessing) });
    if (crops.size > REMEMBERED) crops.delete(crops.keys().next().value);
  }
  return crops.get(key);
}

async function decode(file) {
  const how = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" };
  const bitmap = await createImageBitmap(file, how).catch(() => {
    throw new Error(UNREADABLE);
  });
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) throw new Error(`${width}x${height} pixels are too many; make it smaller`);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return rgb(context.getImageData(0, 0, width, height));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
