// Times both models in Chromium, for browser.py: reads asked.json, prints JSON.

import { readFile } from "node:fs/promises";
import puppeteer from "puppeteer-core";

const asked = JSON.parse(await readFile("asked.json", "utf8"));
const browser = await puppeteer.launch({
  executablePath: asked.chromium,
  args: ["--no-sandbox", "--disable-gpu"],
  protocolTimeout: 3_600_000,
});
try {
  const page = await browser.newPage();
  await page.goto(`${asked.url}model.json`); // of the page's origin, and without the page
  const found = await page.evaluate(timed, asked);
  if (asked.picture) await draw(await browser.newPage());
  console.log(JSON.stringify({ ...found, browser: await browser.version() }));
} finally {
  await browser.close();
}

/** Runs in the browser: each picture in turns with both models, {times: {adaptive, dense}, macs, dense_macs}. */
async function timed({ url, images, budget, rounds, threads }) {
  const ort = await import(`${url}ort/ort.js`);
  ort.env.wasm.wasmPaths = { mjs: `${url}ort/wasm.js`, wasm: `${url}ort/ort.wasm` };
  ort.env.wasm.numThreads = threads;
  const info = await (await fetch(`${url}model.json`)).json();
  const side = info.architecture.image_size;
  const sessions = {};
  for (const [name, file] of [["adaptive", "model.onnx"], ["dense", "dense.onnx"]]) {
    sessions[name] = await ort.InferenceSession.create(url + file, { executionProviders: ["wasm"] });
  }
  const run = async (name, image) => {
    const feeds = { images: new ort.Tensor("float32", image, [1, 3, side, side]) };
    if (name === "adaptive") feeds.budget = new ort.Tensor("float32", [budget], [1]);
    const start = performance.now();
    const outputs = await sessions[name].run(feeds);
    return { outputs, ms: performance.now() - start };
  };
  const times = { adaptive: [], dense: [] };
  const macs = [];
  for (const values of images) {
    const image = Float32Array.from(values);
    for (const name in times) times[name].push([]);
    for (let round = 0; round <= rounds; round++) {
      for (const name in times) {
        const { outputs, ms } = await run(name, image);
        if (round) times[name].at(-1).push(ms); // the first one is not counted
        else if (outputs.macs) macs.push(Number(outputs.macs.data[0]));
      }
    }
  }
  return { times, macs, dense_macs: info.macs.dense };
}

/** The page as docs/browser.png shows it: a sneaker at the budget, and the patches of one block. */
async function draw(page) {
  await page.setViewport({ width: 1160, height: 900 });
  await page.goto(`${asked.url}?threads=1`);
  await timing(page, 0); // the browser compiles what runs often
  await page.click("#thumbs label:nth-child(8)");
  const settled = timing(page, asked.budget);
  await page.$eval("#slider", (slider, budget) => {
    slider.value = budget;
    slider.dispatchEvent(new Event("input"));
  }, asked.budget);
  await settled;
  await page.click(".block:nth-child(4)");
  await page.mouse.move(0, 0);
  await page.screenshot({ path: asked.picture, fullPage: true });
}

/** Waits until the page has timed a budget. */
function timing(page, budget) {
  const wait = (wanted) =>
    new Promise((resolve) => document.addEventListener("adavit-timing", ({ detail }) => detail.budget === wanted && resolve()));
  return page.evaluate(wait, budget);
}
