// Shows what a run found: the picture, its blocks, predictions and what they cost.

import { blockOf, drawPatches, mark, marksOf, pictureOf } from "./drawing.js";

const TOP = 4; // predictions shown
const LARGE = 24; // canvas pixels a patch of the large picture
const LOOKS = [
  ["dot", "head used / not"],
  ["square", "attention ran / skipped"],
  ["triangle", "MLP ran / skipped"],
];
const shown = { info: null, arch: null, grid: 0, result: null, name: "", canvas: null, pinned: null };

export const $ = (id) => document.getElementById(id);

export function element(tag, values = {}, ...children) {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...children);
  return made;
}

export function percent(share, digits = 0) {
  return `${(100 * share).toFixed(digits)}\u00a0%`;
}

/** Makes a button for each block, and the legend. */
export function prepareView(info) {
  const arch = info.architecture;
  Object.assign(shown, { info, arch, grid: arch.image_size / arch.patch_size });
  for (let block = 0; block < arch.depth; block++) $("blocks").append(blockButton(block));
  document.addEventListener("keydown", ({ key }) => key === "Escape" && pin(null));
  const swatches = [element("span", { className: "swatch" }), element("span", { className: "swatch off" })];
  $("legend").append(element("li", {}, ...swatches, "patch kept / dropped"));
  for (const [shape, meaning] of LOOKS) {
    $("legend").append(element("li", {}, mark(shape, true), mark(shape, false), meaning));
  }
}

function blockButton(block) {
  const word = element("span", { className: "wide" }, "block ");
  const name = element("span", { className: "name" }, element("span", {}, word, block), element("b"));
  const parts = [element("canvas"), element("span", { className: "marks" }), name];
  const button = element("button", { type: "button", className: "block", ariaPressed: "false" }, ...parts);
  button.addEventListener("click", () => pin(shown.pinned === block ? null : block));
  button.addEventListener("mouseenter", () => showPicture(block));
  button.addEventListener("mouseleave", () => showPicture(shown.pinned));
  return button;
}

/** Shows a block's patches on the large picture until another is chosen; null shows the picture alone. */
function pin(block) {
  shown.pinned = block;
  [...$("blocks").children].forEach((button, index) => (button.ariaPressed = String(index === block)));
  showPicture(block);
}

/** Shows a result of the worker, and the name of its picture. */
export function showResult(result, name) {
  const { info, arch, grid } = shown;
  Object.assign(shown, { result, name, canvas: pictureOf(result.crop, arch.image_size) });
  [...$("blocks").children].forEach((button, index) => {
    const block = blockOf(result, arch, index);
    const [canvas, marks, caption] = button.children;
    drawPatches(canvas, shown.canvas, block.patches, grid);
    marks.replaceChildren(...marksOf(block));
    caption.lastChild.textContent = block.runs ? percent(block.kept / block.patches.length) : "skipped";
    button.ariaLabel = describe(block, index);
  });
  showPicture(shown.pinned);
  showClasses();
  $("saved").textContent = percent(result.macs / info.macs.dense);
  showPair("macs", [result.macs, info.macs.dense], (count) => `${(count / 1e6).toFixed(0)} M`);
}

function showPicture(index) {
  const { result, arch, canvas, grid, name } = shown;
  if (!result) return;
  const block = index === null ? null : blockOf(result, arch, index);
  drawPatches($("picture"), canvas, block?.patches, grid, LARGE);
  const whole = `As the model sees it, ${arch.image_size} by ${arch.image_size} pixels`;
  $("caption").textContent = block ? describe(block, index) : whole;
  $("picture").ariaLabel = `${name}. ${$("caption").textContent}`;
}

function describe(block, index) {
  if (!block.runs) return `Block ${index}: skipped`;
  const heads = block.heads.filter(Boolean).length;
  const parts = [
    `${block.kept} of ${block.patches.length} patches`,
    block.attention ? `attention with ${heads} of ${block.heads.length} heads` : "no attention",
    block.mlp ? "MLP" : "no MLP",
  ];
  return `Block ${index}: ${parts.join(", ")}`;
}

function showClasses() {
  const entries = predictions().map(({ name, share }) => {
    const line = element("div", {}, element("span", {}, name), element("span", {}, percent(share, 1)));
    const bar = element("i");
    bar.style.setProperty("--part", share);
    return element("li", {}, line, bar);
  });
  $("classes").replaceChildren(...entries);
}

/** The likeliest classes: their names and probabilities. */
function predictions() {
  const { logits } = shown.result;
  const most = Math.max(...logits);
  const scores = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = scores.reduce((a, b) => a + b);
  const named = scores.map((score, index) => ({ name: className(index), share: score / sum }));
  return named.sort((a, b) => b.share - a.share).slice(0, TOP);
}

function className(index) {
  return shown.info.labels?.[index]?.replaceAll("_", " ") ?? `class ${index}`;
}

/** Shows milliseconds; those of the dense twin are null until it is there. */
export function showTime(adaptive, dense) {
  showPair("time", [adaptive, dense], (ms) => ms.toFixed(1));
  $("speedup").textContent = dense ? `${(dense / adaptive).toFixed(1)}×` : "–";
}

function showPair(id, values, text) {
  const most = Math.max(...values);
  [...$(id).querySelectorAll("dd")].forEach((row, index) => {
    row.querySelector("i").style.setProperty("--part", (values[index] ?? 0) / most);
    row.querySelector("b").textContent = values[index] === null ? "loading" : text(values[index]);
  });
}

/** What a screen reader says once the times are settled. */
export function speak(adaptive, dense) {
  const [{ name, share }] = predictions();
  const macs = percent(shown.result.macs / shown.info.macs.dense);
  const faster = (dense / adaptive).toFixed(1);
  $("spoken").textContent = `${name}, ${percent(share)}. ${macs} of the dense MACs, ${faster} times as fast.`;
}
