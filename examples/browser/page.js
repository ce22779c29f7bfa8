// The page: pictures in, a budget, and a worker that runs the model.

import { UNREADABLE } from "./pixels.js";
import { $, element, percent, prepareView, showResult, showTime, speak } from "./view.js";

const state = {
  site: null, // site.json
  info: null, // the model's JSON file
  threads: 1,
  budget: 0, // 0 is the trained policy
  pictures: new Map(), // by number: {file, name, tone}
  picture: 0, // the number of the chosen one
  shown: 0, // the number of the one whose result is shown
  leftOut: 0, // how many of the photographs added last could not be read
  asked: 0, // the number of the newest request
  dense: null, // milliseconds of the dense twin
};
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let frame = 0;
let pictures = 0;

start().catch((error) => complain(`The page could not be loaded: ${error.message}`));

async function start() {
  state.site = await fetched("site.json", "json");
  state.info = await fetched(state.site.info, "json");
  state.threads = threads();
  prepareView(state.info);
  prepareBudget();
  preparePictures();
  for (const { file, name } of state.site.samples) addPicture(await fetched(file, "blob"), name, "plain");
  worker.onmessage = ({ data }) => RECEIVED[data.kind](data);
  worker.onerror = ({ message }) => complain(`The worker stopped: ${message || "it could not be loaded"}`);
  worker.postMessage({ kind: "open", site: state.site, info: state.info, threads: state.threads });
  choose(1);
}

async function fetched(file, kind) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  return response[kind]();
}

/** Threads need a page that is isolated from others; `?threads=1` asks for so many, of those that the device has. */
function threads() {
  if (!self.crossOriginIsolated) return 1;
  const most = navigator.hardwareConcurrency;
  const asked = Number(new URLSearchParams(location.search).get("threads"));
  return Number.isInteger(asked) && asked > 0 ? Math.min(asked, most) : Math.min(4, most);
}

// What the worker says

const RECEIVED = {
  progress({ what, loaded, total }) {
    $("loaded").textContent = `Loading ${what}: ${(loaded / 1e6).toFixed(1)} MB`;
    if (total) $("progress").value = loaded / total;
  },
  ready() {
    $("loading").hidden = true;
    document.querySelector("main").hidden = false;
    showWhere();
  },
  dense() {
    ask();
  },
  result(found) {
    if (found.picture !== state.picture) return; // of an older budget too, while the slider moves
    state.shown = found.picture;
    const picture = state.pictures.get(found.picture);
    $("tone").value = picture.tone ??= found.tone;
    showResult(found, picture.name);
    showTime(found.ms, state.dense);
    tell("result", found);
  },
  timing(found) {
    if (found.id !== state.asked) return;
    state.dense = found.dense;
    showTime(found.adaptive, found.dense);
    if (!found.done) return;
    speak(found.adaptive, found.dense);
    tell("timing", found);
  },
  unreadable({ picture, message }) {
    leaveOut(picture, message);
  },
  error({ message }) {
    complain(message);
  },
};

/** Tells scripts: `document.addEventListener("adavit-result", ({detail}) => ...)`. */
function tell(kind, found) {
  document.dispatchEvent(new CustomEvent(`adavit-${kind}`, { detail: found }));
}

function complain(message) {
  $("message").textContent = message;
  $("message").hidden = false;
  $("loading").hidden = true;
}

function showWhere() {
  const { info, threads: count } = state;
  const where = `${info.name}, ${info.precision}, ONNX Runtime in WebAssembly, ${count} thread${count > 1 ? "s" : ""}.`;
  const more = self.crossOriginIsolated ? "" : " More threads need a server that sends COOP and COEP headers.";
  $("where").textContent = where + more;
}

/** Asks for what is chosen now: at most once a frame, and the worker answers the newest request alone. */
function ask() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    const { picture, budget } = state;
    const { file, tone } = state.pictures.get(picture);
    state.asked += 1;
    worker.postMessage({ kind: "show", id: state.asked, picture, file, tone, budget });
  });
}

// Pictures

function preparePictures() {
  $("contrast").hidden = !state.site.tones;
  $("tone").addEventListener("change", () => {
    state.pictures.get(state.picture).tone = $("tone").value;
    ask();
  });
  $("files").addEventListener("change", () => {
    addPhotographs([...$("files").files]);
    $("files").value = "";
  });
  document.addEventListener("paste", ({ clipboardData }) => addPhotographs([...clipboardData.files]));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
    });
  }
  document.addEventListener("drop", ({ dataTransfer }) => addPhotographs([...dataTransfer.files]));
}

function addPhotographs(files) {
  if (!files.length) return;
  $("message").hidden = true;
  state.leftOut = 0;
  const tone = state.site.tones ? null : "plain"; // null: the worker suggests one
  const added = files.map((file) => addPicture(file, file.name, tone));
  choose(added[0]);
}

function addPicture(file, name, tone) {
  const number = ++pictures;
  state.pictures.set(number, { file, name, tone });
  const radio = element("input", { type: "radio", name: "picture", value: number });
  radio.addEventListener("change", () => choose(number));
  const image = element("img", { src: URL.createObjectURL(file), alt: name });
  image.addEventListener("error", () => leaveOut(number, UNREADABLE));
  $("thumbs").append(element("label", {}, radio, image));
  return number;
}

/** Takes a picture away, and says why. If it was chosen, the next one is, or else the one that is shown. */
function leaveOut(number, reason) {
  const picture = state.pictures.get(number);
  if (!picture) return; // the page and the worker both find that it cannot be read
  const more = state.leftOut++ ? ` (${state.leftOut} files left out)` : "";
  complain(`${picture.name}: ${reason}${more}`);
  state.pictures.delete(number);
  const radio = radioOf(number);
  URL.revokeObjectURL(radio.nextSibling.src);
  radio.parentNode.remove();
  if (number !== state.picture) return;
  choose([...state.pictures.keys()].find((other) => other > number) ?? state.shown);
}

function choose(number) {
  state.picture = number;
  radioOf(number).checked = true;
  radioOf(number).parentNode.scrollIntoView({ block: "nearest", inline: "nearest" });
  ask();
}

function radioOf(number) {
  return document.querySelector(`#thumbs input[value="${number}"]`);
}

// Budget

function prepareBudget() {
  const { least, most } = state.info.budget;
  Object.assign($("slider"), { min: least, max: most });
  $("least").textContent = percent(least);
  $("most").textContent = percent(most);
  $("slider").addEventListener("input", () => setBudget($("slider").valueAsNumber));
  $("trained").addEventListener("click", () => setBudget(0));
  showBudget();
}

function setBudget(budget) {
  state.budget = budget;
  showBudget();
  ask();
}

function showBudget() {
  const { budget } = state;
  const { trained } = state.info.budget;
  if (!budget) $("slider").value = trained;
  const text = budget ? percent(budget, 1) : `about ${percent(trained)}`;
  $("share").textContent = $("slider").ariaValueText = text;
  $("trained").ariaPressed = String(!budget);
}
