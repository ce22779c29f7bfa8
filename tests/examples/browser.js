// Uses the page as a person does: node browser.js '{"url": ..., "chromium": ..., "files": {...}, "shots": ...}'
// Prints what it saw as JSON.

import puppeteer from "puppeteer-core";

const asked = JSON.parse(process.argv[2]);
const browser = await puppeteer.launch({ executablePath: asked.chromium, args: ["--no-sandbox", "--disable-gpu"] });
try {
  console.log(JSON.stringify(await STORIES()[asked.story]()));
} finally {
  await browser.close();
}

function STORIES() {
  return { whole, plain, phone, broken };
}

/** Everything that a person can do, at the width of a desktop. */
async function whole() {
  const page = await opened({ width: 1200, height: 950 });
  const steps = { first: await settled(page, 1) };
  const step = async (name, action) => {
    const before = await page.evaluate("asks()");
    await action();
    steps[name] = await settled(page, before + 1);
  };
  await step("clicked", () => page.click("#thumbs label:nth-child(6)"));
  await step("keyed", () => pressed(page, "#slider", "ArrowLeft", 6));
  await step("dragged", () => drag(page, "#slider", 0.9));
  const dragged = await page.$eval("#slider", (slider) => slider.valueAsNumber);
  await step("arrowed", () => pressed(page, "#thumbs input:checked", "ArrowRight", 1));
  await step("trained", () => page.click("#trained"));
  await step("dropped", () => drop(page, asked.files.light));
  await step("toned", () => page.select("#tone", "stretched"));
  await step("picked", async () => (await page.$("#files")).uploadFile(asked.files.jpeg));
  await step("text", () => drop(page, asked.files.text));
  const message = await page.$eval("#message", (shown) => shown.textContent);
  const names = await page.$$eval("#thumbs img", (images) => images.map((image) => image.alt));
  const blocks = await blocksOf(page);
  if (asked.shots) await page.screenshot({ path: `${asked.shots}/desktop.png` });
  return { steps, dragged, message, names, blocks, ...(await page.evaluate("seen")), requests: page.requests };
}

/** The page on a server that does not isolate it. */
async function plain() {
  const page = await opened({ width: 1200, height: 950 });
  return { first: await settled(page, 1), where: await page.$eval("#where", (shown) => shown.textContent) };
}

/** The page on a small screen: what it shows, and whether anything is wider than the screen. */
async function phone() {
  const page = await opened({ width: 360, height: 740, isMobile: true, hasTouch: true, deviceScaleFactor: 2 }, true);
  await settled(page, 1);
  await page.tap("#thumbs label:nth-child(2)");
  const tapped = await settled(page, 3);
  const widths = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  const slider = await page.$eval("#slider", (found) => found.getBoundingClientRect().toJSON());
  const dark = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  if (asked.shots) await page.screenshot({ path: `${asked.shots}/phone.png` });
  return { tapped, widths, slider, dark };
}

/** The page without its model: what it says. */
async function broken() {
  const page = await opened({ width: 1200, height: 950 });
  await page.waitForSelector("#message", { visible: true, timeout: asked.timeout });
  return { message: await page.$eval("#message", (shown) => shown.textContent) };
}

async function opened(viewport, dark = false) {
  const page = await browser.newPage();
  page.requests = [];
  page.on("request", (request) => page.requests.push(request.url()));
  await page.setViewport(viewport);
  if (dark) await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "dark" }]);
  await page.evaluateOnNewDocument(listen);
  await page.goto(asked.url);
  return page;
}

/** Runs in the page, before its own scripts: notes what the page tells, and what goes wrong. */
function listen() {
  globalThis.seen = { results: 0, errors: [], longest: 0 };
  const latest = {};
  for (const kind of ["result", "timing"]) {
    document.addEventListener(`adavit-${kind}`, ({ detail }) => (latest[kind] = detail));
  }
  document.addEventListener("adavit-result", () => (seen.results += 1));
  addEventListener("error", ({ message }) => seen.errors.push(message));
  addEventListener("unhandledrejection", ({ reason }) => seen.errors.push(String(reason)));
  globalThis.asks = () => latest.result?.id ?? 0;
  globalThis.isSettled = (least) => {
    const trained = document.getElementById("trained").ariaPressed === "true";
    const budget = trained ? 0 : document.getElementById("slider").valueAsNumber;
    return latest.timing?.id >= least && latest.timing.id === latest.result.id && latest.result.budget === budget;
  };
  globalThis.found = () => {
    const { id, crop, tone, logits, tokens, heads, sublayers, macs, budget } = latest.result;
    const { adaptive, dense } = latest.timing;
    const lists = Object.entries({ crop, logits, tokens, heads, sublayers }).map(([k, v]) => [k, Array.from(v)]);
    const picture = document.querySelector("#thumbs input:checked + img").alt;
    const texts = ["share", "speedup", "saved", "spoken", "caption"].map((name) => [
      name,
      document.getElementById(name).textContent.replaceAll("\u00a0", " "),
    ]);
    const best = document.querySelector("#classes li").textContent.replaceAll("\u00a0", " ");
    return { id, tone, macs, budget, adaptive, dense, picture, best, ...Object.fromEntries([...lists, ...texts]) };
  };
}

/** What is shown once the answer to this request, or to a later one, was timed. */
async function settled(page, least) {
  await page.waitForFunction(`isSettled(${least})`, { timeout: asked.timeout });
  return page.evaluate("found()");
}

async function pressed(page, where, key, times) {
  await page.focus(where);
  for (let time = 0; time < times; time++) await page.keyboard.press(key);
}

/** Drags the slider from where it is to a share of its width. */
async function drag(page, where, share) {
  const box = await (await page.$(where)).boundingBox();
  const at = await page.$eval(where, ({ value, min, max }) => (value - min) / (max - min));
  const middle = box.y + box.height / 2;
  await page.mouse.move(box.x + box.width * at, middle);
  await page.mouse.down();
  await page.mouse.move(box.x + box.width * share, middle, { steps: 25 });
  await page.mouse.up();
}

/** Drops a file on the page, as the browser sees it from outside. */
async function drop(page, file) {
  const client = await page.createCDPSession();
  const data = { items: [], files: [file], dragOperationsMask: 1 };
  for (const type of ["dragEnter", "dragOver", "drop"]) {
    await client.send("Input.dispatchDragEvent", { type, x: 600, y: 500, data });
  }
}

/** Chooses block 1 by keyboard, and lets go of it; the labels of all blocks, and the caption meanwhile. */
async function blocksOf(page) {
  await page.focus(".block:nth-child(2)");
  await page.keyboard.press("Enter");
  const caption = await page.$eval("#caption", (shown) => shown.textContent);
  const chosen = await page.$$eval(".block[aria-pressed=true]", (found) => found.length);
  await page.keyboard.press("Escape");
  const left = await page.$$eval(".block[aria-pressed=true]", (found) => found.length);
  const labels = await page.$$eval(".block", (found) => found.map((block) => block.ariaLabel));
  const outline = await page.$eval(".block:nth-child(2)", (block) => getComputedStyle(block).outlineStyle);
  return { caption, chosen, left, labels, outline };
}
