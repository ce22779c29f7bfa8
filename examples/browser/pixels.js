// Pictures as the model takes them, pixel for pixel as `runtime.preprocess` makes them: Pillow's arithmetic.

export const UNREADABLE = "this browser cannot read it as a picture";

const LONGEST = 64; // times its short side that a picture's long side may be
const BITS = 22; // of Pillow's fixed-point weights
const SUPPORT = 2; // of the bicubic filter, in source pixels where nothing is made smaller
const CUTOFF = 1; // percent of the pixels that are made black, and white, where contrast is stretched

/** Drops alpha: RGBA of a canvas to RGB. Both are {width, height, data}. */
export function rgb({ width, height, data }) {
  const out = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    out[to++] = data[from];
    out[to++] = data[from + 1];
    out[to++] = data[from + 2];
  }
  return { width, height, data: out };
}

/** A picture in grey with its contrast stretched, and inverted where it is asked for; "plain" leaves it as it is. */
export function toned(picture, tone) {
  if (tone === "plain") return picture;
  const grey = luma(picture);
  if (tone === "inverted") for (let i = 0; i < grey.length; i++) grey[i] = 255 - grey[i];
  const table = stretch(grey);
  const data = new Uint8Array(grey.length * 3);
  for (let i = 0, to = 0; i < grey.length; i++) {
    const value = table[grey[i]];
    data[to++] = value;
    data[to++] = value;
    data[to++] = value;
  }
  return { ...picture, data };
}

/** The tone that suits a photograph of a garment: on a light ground it is inverted. */
export function suggestedTone(picture) {
  const { width, height } = picture;
  const grey = luma(picture);
  const edge = Math.max(1, Math.round(Math.min(width, height) / 20));
  let sum = 0;
  let count = 0;
  for (let i = 0; i < grey.length; i++) {
    const [x, y] = [i % width, Math.floor(i / width)];
    if (Math.min(x, y, width - 1 - x, height - 1 - y) >= edge) continue;
    sum += grey[i];
    count++;
  }
  return sum / count > 127 ? "inverted" : "stretched";
}

/**
 * The picture's short side resized, and the middle cropped: {width, height, data} of S by S pixels.
 * The second argument is "preprocessing" of the model's JSON file, here and below.
 */
export function cropped(picture, { crop_size: { height: size }, crop_ratio: ratio }) {
  const { width, height } = picture;
  const short = Math.min(width, height);
  if (Math.max(width, height) > LONGEST * short) {
    throw new Error(`${width}x${height} pixels is too elongated; crop it first`);
  }
  const side = Math.floor(size / ratio);
  const resized = resize(picture, Math.floor((side * width) / short), Math.floor((side * height) / short));
  const left = toEven((resized.width - size) / 2);
  const top = toEven((resized.height - size) / 2);
  const data = new Uint8Array(size * size * 3);
  for (let y = 0; y < size; y++) {
    const from = ((top + y) * resized.width + left) * 3;
    data.set(resized.data.subarray(from, from + size * 3), y * size * 3);
  }
  return { width: size, height: size, data };
}

/** Pixels [S, S, 3] as the model's input, float32 [3, S, S]. */
export function normalised({ data }, { image_mean: mean, image_std: std }) {
  const count = data.length / 3;
  const out = new Float32Array(data.length);
  for (let channel = 0; channel < 3; channel++) {
    const [middle, spread] = [Math.fround(mean[channel]), Math.fround(std[channel])];
    for (let i = 0; i < count; i++) {
      const scaled = Math.fround(data[3 * i + channel] / 255);
      out[channel * count + i] = Math.fround(scaled - middle) / spread;
    }
  }
  return out;
}

function luma({ data }) {
  const grey = new Uint8Array(data.length / 3);
  for (let i = 0; i < grey.length; i++) {
    grey[i] = (data[3 * i] * 19595 + data[3 * i + 1] * 38470 + data[3 * i + 2] * 7471 + 0x8000) >>> 16;
  }
  return grey;
}

/** What each grey becomes, so that the darkest is black and the lightest white, but for CUTOFF percent of each. */
function stretch(grey) {
  const counts = new Array(256).fill(0);
  for (const value of grey) counts[value]++;
  const cut = Math.floor((grey.length * CUTOFF) / 100);
  const all = [...counts.keys()];
  take(counts, all, cut);
  take(counts, [...all].reverse(), cut);
  const low = counts.findIndex((count) => count > 0);
  const high = counts.findLastIndex((count) => count > 0);
  if (high <= low) return all;
  const scale = 255 / (high - low);
  return all.map((value) => Math.min(255, Math.max(0, Math.trunc(value * scale - low * scale))));
}

/** Takes so many pixels out of a histogram, in an order of its greys. */
function take(counts, order, cut) {
  for (const value of order) {
    const taken = Math.min(cut, counts[value]);
    counts[value] -= taken;
    cut -= taken;
    if (!cut) return;
  }
}

/** Bicubic, over more pixels where the picture gets smaller: first along rows, then along columns. */
function resize({ width, height, data }, toWidth, toHeight) {
  if (toWidth !== width) data = along(data, height, width, toWidth, { line: width, step: 1, to: toWidth, next: 1 });
  if (toHeight !== height) {
    data = along(data, toWidth, height, toHeight, { line: 1, step: toWidth, to: 1, next: toWidth });
  }
  return { width: toWidth, height: toHeight, data };
}

/** Resizes `lines` lines of `from` pixels to `to`; the layout says how far pixels and lines are apart. */
function along(data, lines, from, to, layout) {
  const out = new Uint8ClampedArray(lines * to * 3);
  const step = 3 * layout.step;
  filters(from, to).forEach(({ first, weights }, place) => {
    for (let line = 0; line < lines; line++) {
      const start = 3 * line * layout.line + first * step;
      const target = 3 * (line * layout.to + place * layout.next);
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (BITS - 1);
        let at = start + channel;
        for (let i = 0; i < weights.length; i++) {
          sum += data[at] * weights[i];
          at += step;
        }
        out[target + channel] = sum >> BITS;
      }
    }
  });
  return out;
}

/** Of each pixel of `to`: the first of `from` that counts, and the fixed-point weights from there on. */
function filters(from, to) {
  const scale = from / to;
  const stretch = Math.max(1, scale);
  const found = [];
  for (let place = 0; place < to; place++) {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - SUPPORT * stretch + 0.5));
    const end = Math.min(from, Math.trunc(centre + SUPPORT * stretch + 0.5));
    const exact = [];
    for (let x = first; x < end; x++) exact.push(bicubic((x - centre + 0.5) * (1 / stretch)));
    const sum = exact.reduce((a, b) => a + b, 0);
    const weights = Int32Array.from(exact, (weight) => fixed(weight / sum));
    found.push({ first, weights });
  }
  return found;
}

function fixed(weight) {
  return Math.trunc((weight < 0 ? -0.5 : 0.5) + weight * (1 << BITS));
}

function bicubic(distance) {
  const x = Math.abs(distance);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/** Rounds halves to even, as Python does. */
function toEven(value) {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low % 2) : Math.round(value);
}
