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
  return { whole, careless, plain, phone, broken };
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

/** What a hasty person does: files that are no pictures, and a budget that moves meanwhile, or all the time. */
async function careless() {
  const page = await opened({ width: 1200, height: 950 });
  await settled(page, 1);
  const messages = [];
  const steps = {};
  const step = async (name, picture, action) => {
    const before = await page.evaluate("asks()");
    await action();
    await page.waitForFunction(`asks() > ${before} && chosen() === "${picture}"`, { timeout: asked.timeout });
    steps[name] = await settled(page, before + 1);
    messages.push(await page.$eval("#message", (shown) => shown.textContent));
  };
  const { light, jpeg, text, large, long } = asked.files;
  await step("large", "ankle boot", async () => {
    await drop(page, large);
    await pressed(page, "#slider", "ArrowLeft", 8, 50);
  });
  await step("several", "light.png", () => drop(page, text, light, long, jpeg, text));
  await step("long", "photo.jpg", () => page.click('#thumbs label:has([alt="long.png"])'));
  const names = await page.$$eval("#thumbs img", (images) => images.map((image) => image.alt));
  const shares = await page.evaluate(moving);
  return { steps, messages, names, shares, errors: await page.evaluate("seen.errors") };
}

/** Runs in the page: moves the budget in every frame for some seconds; what the page says of the MACs meanwhile. */
async function moving() {
  const slider = document.getElementById("slider");
  const shares = new Set();
  for (const start = performance.now(); performance.now() < start + 4000; ) {
    slider.valueAsNumber = 0.3 + ((performance.now() - start) / 4000) * 0.35;
    slider.dispatchEvent(new Event("input"));
    await new Promise(requestAnimationFrame);
    shares.add(document.getElementById("saved").textContent);
  }
  return [...shares];
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
  const tops = [await topOf(page, "#kept")];
  await page.tap(".block:nth-child(2)");
  tops.push(await topOf(page, "#kept"));
  const widths = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  const slider = await page.$eval("#slider", (found) => found.getBoundingClientRect().toJSON());
  const dark = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  if (asked.shots) await page.screenshot({ path: `${asked.shots}/phone.png` });
  return { tapped, tops, widths, slider, dark };
}

/** Where something begins, from the top of the page. */
function topOf(page, where) {
  return page.$eval(where, (found) => found.getBoundingClientRect().top + scrollY);
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
  globalThis.chosen = () => document.querySelector("#thumbs input:checked + img")?.alt;
  globalThis.isSettled = (least) => {
    const trained = document.getElementById("trained").ariaPressed === "true";
    const budget = trained ? 0 : document.getElementById("slider").valueAsNumber;
    return latest.timing?.id >= least && latest.timing.id === latest.result.id && latest.result.budget === budget;
  };
  globalThis.found = () => {
    const { id, crop, tone, logits, tokens, heads, sublayers, macs, budget } = latest.result;
    const { adaptive, dense } = latest.timing;
    const lists = Object.entries({ crop, logits, tokens, heads, sublayers }).map(([k, v]) => [k, Array.from(v)]);
    const picture = chosen();
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

async function pressed(page, where, key, times, delay = 0) {
  await page.focus(where);
  for (let time = 0; time < times; time++) await page.keyboard.press(key, { delay });
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

/** Drops files on the page, as the browser sees it from outside. */
async function drop(page, ...files) {
  const client = await page.createCDPSession();
  const data = { items: [], files, dragOperationsMask: 1 };
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
