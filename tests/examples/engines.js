// Runs a single file: node engines.js node|web '{"folder": ..., "name": ..., "side": ..., "url": ..., "chromium": ...}'
// NAME.onnx and NAME.raw, the images, are in the folder, which a server has at the url. Prints the outputs as JSON.

import { readFile } from "node:fs/promises";

const [engine, text] = process.argv.slice(2);
const asked = JSON.parse(text);
console.log(JSON.stringify(await (engine === "node" ? inNode() : inChromium())));

async function inNode() {
  const { default: ort } = await import("onnxruntime-node");
  const { outputsOf } = await import("./outputs.js");
  const [model, raw] = await Promise.all(["onnx", "raw"].map((kind) => readFile(`${asked.folder}/${asked.name}.${kind}`)));
  return outputsOf(ort, model, new Float32Array(new Uint8Array(raw).buffer), asked.side);
}

async function inChromium() {
  const { default: puppeteer } = await import("puppeteer-core");
  const browser = await puppeteer.launch({ executablePath: asked.chromium, args: ["--no-sandbox", "--disable-gpu"] });
  try {
    const page = await browser.newPage();
    await page.goto(`${asked.url}outputs.js`); // of the server's origin
    return await page.evaluate(inPage, asked);
  } finally {
    await browser.close();
  }
}

async function inPage({ url, name, side }) {
  const ort = await import(`${url}ort/ort.js`);
  ort.env.wasm.wasmPaths = { mjs: `${url}ort/wasm.js`, wasm: `${url}ort/ort.wasm` };
  ort.env.wasm.numThreads = 1;
  const { outputsOf } = await import(`${url}outputs.js`);
  const bytes = async (kind) => (await fetch(`${url}${name}.${kind}`)).arrayBuffer();
  return outputsOf(ort, await bytes("onnx"), new Float32Array(await bytes("raw")), side);
}
