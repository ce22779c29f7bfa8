// What a run kept: dropped patches faded over the picture, and small marks, as `adavit.draw` draws them.

const FADED = [200, 203, 208];
const SHARE = 0.8; // how far dropped patches fade
const DETAIL = 8; // canvas pixels a patch at least
const SVG = "http://www.w3.org/2000/svg";

/** What ran in one block: {runs, patches [P], kept, heads [H], attention, mlp}. A block that is off keeps nothing. */
export function blockOf(result, arch, block) {
  const part = (mask, size) => Array.from(mask.subarray(block * size, (block + 1) * size), Boolean);
  const tokens = part(result.tokens, result.tokens.length / arch.depth);
  const [attention, mlp] = part(result.sublayers, 2);
  const runs = attention || mlp;
  const patches = tokens.slice(1).map((kept) => kept && runs);
  const heads = part(result.heads, arch.heads).map((used) => used && runs);
  return { runs, patches, kept: patches.filter(Boolean).length, heads, attention, mlp };
}

/** The cropped picture, RGB bytes [S, S, 3], as a canvas that others are drawn from. */
export function pictureOf(crop, side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) image.data.set([crop[3 * i], crop[3 * i + 1], crop[3 * i + 2], 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Draws a picture with the patches that are not in `patches` faded; without `patches`, the picture alone. */
export function drawPatches(canvas, picture, patches, grid, scale = DETAIL) {
  const cell = Math.max(scale, Math.ceil(picture.width / grid));
  canvas.width = canvas.height = cell * grid;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.fillStyle = `rgb(${FADED.join(" ")} / ${SHARE})`;
  patches?.forEach((kept, index) => {
    if (!kept) context.fillRect((index % grid) * cell, Math.floor(index / grid) * cell, cell, cell);
  });
}

/** A dot for each head, then a square for attention and a triangle for the MLP: filled where it ran. */
export function marksOf({ heads, attention, mlp }) {
  const all = [
    ...heads.map((on) => ["dot", on]),
    ["square", attention],
    ["triangle", mlp],
  ];
  return all.map(([shape, on]) => mark(shape, on));
}

export function mark(shape, on) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 12 12");
  svg.setAttribute("class", `mark ${shape} ${on ? "on" : "off"}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", SHAPES[shape]);
  svg.append(path);
  return svg;
}

const SHAPES = {
  dot: "M6 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
  square: "M2 2h8v8h-8z",
  triangle: "M6 1.5l5 9h-10z",
};
