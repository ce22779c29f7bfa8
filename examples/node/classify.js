// Classifies a picture: node classify.js MODEL.onnx PICTURE [--budget 0.35]
// MODEL.json lies beside the model; `adavit-export BUNDLE --single-file MODEL.onnx` writes both.

import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";

import ort from "onnxruntime-node";
import sharp from "sharp";

import { cropped, normalised } from "../browser/pixels.js";

const TOP = 3; // predictions printed

async function main() {
  const { values, positionals } = parseArgs({ allowPositionals: true, options: { budget: { type: "string" } } });
  const [model, picture] = positionals;
  if (positionals.length !== 2 || !model.endsWith(".onnx")) {
    throw new Error("give a model and a picture: node classify.js MODEL.onnx PICTURE [--budget 0.35]");
  }
  const budget = budgetOf(values.budget);
  const info = JSON.parse(await readFile(model.replace(/onnx$/, "json"), "utf8"));
  const session = await ort.InferenceSession.create(model);
  const side = info.architecture.image_size;
  const feeds = { images: new ort.Tensor("float32", await pixelsOf(picture, info.preprocessing), [1, 3, side, side]) };
  if (session.inputNames.includes("budget")) {
    feeds.budget = new ort.Tensor("float32", [budget ?? 0], [1]); // 0 is the trained policy
  } else if (budget !== undefined) {
    throw new Error("the model takes no budget; export it with --budget-input");
  }
  print(await session.run(feeds), info);
}

/** The budget as a number, if there is one; the model would take a number beyond 1 too, and use its largest budget. */
function budgetOf(text) {
  if (text === undefined) return undefined;
  const budget = Number(text);
  if (budget > 0 && budget <= 1) return budget;
  throw new Error(`the budget is "${text}"; give a share of the dense MACs, above 0 and at most 1`);
}

/** A picture as the model takes it, float32 [3, S, S]; the same pixels as `runtime.preprocess` makes in Python. */
async function pixelsOf(picture, preprocessing) {
  const decoder = sharp(picture).rotate().toColourspace("srgb").removeAlpha().raw();
  const { data, info } = await decoder.toBuffer({ resolveWithObject: true });
  return normalised(cropped({ width: info.width, height: info.height, data }, preprocessing), preprocessing);
}

function print({ logits, macs }, info) {
  const most = Math.max(...logits.data);
  const scores = Array.from(logits.data, (logit) => Math.exp(logit - most));
  const sum = scores.reduce((a, b) => a + b);
  const order = scores.map((_, index) => index).sort((a, b) => scores[b] - scores[a]);
  for (const index of order.slice(0, TOP)) {
    console.log(`${info.labels?.[index] ?? `class ${index}`} ${((100 * scores[index]) / sum).toFixed(2)} %`);
  }
  if (!macs) return; // a file without --with-policy
  const count = Number(macs.data[0]);
  console.log(`${count} MACs, ${((100 * count) / info.macs.dense).toFixed(1)} % of the dense ${info.macs.dense}`);
}

main().catch((error) => {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
});
