// Preprocesses raw pictures: node pixels.js PIXELS_JS CASES_JSON; each case names its files, sizes, tone and preprocessing.

import { readFile, writeFile } from "node:fs/promises";

const [code, cases] = process.argv.slice(2);
const { cropped, normalised, suggestedTone, toned } = await import(code);

const tones = [];
for (const { file, width, height, tone, preprocessing } of JSON.parse(await readFile(cases, "utf8"))) {
  const picture = { width, height, data: new Uint8Array(await readFile(file)) };
  const pixels = normalised(cropped(toned(picture, tone), preprocessing), preprocessing);
  await writeFile(`${file}.out`, new Uint8Array(pixels.buffer));
  tones.push(suggestedTone(picture));
}
console.log(JSON.stringify(tones));
