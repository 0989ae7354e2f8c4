// The page: brings pictures, budget and views together.

import { ApiError, getModels, token } from "./api.js";
import { BudgetPanel } from "./budget.js";
import { watchCamera } from "./camera.js";
import { Collection, ORDERS, sorted } from "./collection.js";
import { Detail, sentence } from "./detail.js";
import { byId, h, still } from "./dom.js";
import { pictures as some } from "./format.js";
import { Gallery } from "./gallery.js";
import { fetchSample, offerSamples, watch } from "./intake.js";
import { Messages } from "./messages.js";
import { showNetwork } from "./network.js";
import { Runner } from "./runner.js";

const TOP_K = 5;
const PATIENCE_MS = 400; // before a progress bar comes: shorter ones would only flicker

const collection = new Collection();
const messages = new Messages({ onRetry: start, onToken: start });
const detail = new Detail();
const gallery = new Gallery({ onOpen: open, onRemove: remove });
const budget = new BudgetPanel(() => runner.restart());
const runner = new Runner(collection, {
  settings: () => ({ budget: budget.value, topK: TOP_K, limits: model.limits, first: shown() }),
  onChange: render,
  onAnswer: (answer) => budget.used(answer),
  onDone: () => requestAnimationFrame(announceResult), // once it is on the page
  onTrouble: trouble,
  onWait: (seconds, message) => messages.waiting(seconds, message),
});

let model = null;
let opened = null; // the picture that was chosen; one that is alone is shown without that
let order = "cost";
let frame = 0;

// -- the server ---------------------------------------------------------------------------------

/** Ask the server what it serves, and send what waits; also once more after trouble. */
async function start() {
  messages.clear();
  try {
    const [served] = await getModels({ onWait: (s, message) => messages.waiting(s, message) });
    messages.settled();
    if (model === null) offer(served);
  } catch (error) {
    trouble(error);
    return;
  }
  runner.wake();
}

function trouble(error) {
  messages.trouble(error, collection.pictures.length > 0);
}

function offer(served) {
  model = served;
  const size = `${model.image_size_px}\u00a0×\u00a0${model.image_size_px}\u00a0px`;
  byId("model").replaceChildren(
    h("strong", {}, model.name),
    ` · ${model.num_classes} classes · ${size} · ${model.backend}`,
  );
  document.title = `${model.name} – dynaslim`;
  budget.offer(model);
  detail.offer(model);
  gallery.offer(model);
  showNetwork(model);
  offerSamples(model.samples, { pick: pickSample, pickAll: pickAllSamples });
  render();
}

// -- pictures -----------------------------------------------------------------------------------

/** Take in pictures; one that comes alone is opened, unless it is one of `several`. */
function add(files, { leftOut = 0, several = files.length > 1 } = {}) {
  const added = collection.add(files);
  messages.clear();
  if (several) close();
  else if (added.length && collection.pictures.length > 1) open(added[0]);
  if (model === null) start(); // pictures wait until the server is there
  else runner.wake();
  if (leftOut) { // last: a start clears what was said before
    const [files, are] = leftOut === 1 ? ["file", "is no picture"] : ["files", "are no pictures"];
    messages.say(`${leftOut} ${files} of the folder ${are}: left out.`);
  }
  render();
  requestAnimationFrame(bringIntoSight);
}

/** On a small screen the results may lie below what was touched. */
function bringIntoSight() {
  const results = byId("results");
  if (results.getBoundingClientRect().top < innerHeight * 0.6) return;
  results.scrollIntoView({ behavior: still() ? "auto" : "smooth" });
}

/** A sample that is there already is shown, not sent again. */
async function pickSample(sample) {
  const there = collection.pictures.find((picture) => picture.sample === sample.url);
  if (there) {
    if (collection.pictures.length > 1) open(there);
    return;
  }
  await addSamples([sample], { several: false });
}

async function pickAllSamples() {
  const there = new Set(collection.pictures.map((picture) => picture.sample));
  const missing = model.samples.filter((sample) => !there.has(sample.url));
  if (missing.length) await addSamples(missing, { several: true });
  else close();
}

async function addSamples(samples, options) {
  try {
    add(await Promise.all(samples.map(fetchSample)), options);
  } catch (error) {
    trouble(error instanceof TypeError // of fetch
      ? new ApiError(0, "unreachable", "the server does not answer") : error);
  }
}

function remove(pictures) {
  for (const picture of pictures) collection.remove(picture);
  if (pictures.includes(opened)) opened = null;
  render();
}

function clear() {
  runner.cancel();
  collection.clear();
  opened = null;
  messages.clear();
  render();
  byId("choose").focus();
}

// -- views --------------------------------------------------------------------------------------

/** The picture in the detail view, if that is what is shown. */
function shown() {
  return opened ?? (collection.pictures.length === 1 ? collection.pictures[0] : null);
}

function open(picture) {
  opened = picture;
  history.pushState({ picture: picture.id }, "");
  render();
  focusTitle();
}

function close() {
  if (opened === null) return;
  const before = opened;
  opened = null;
  history.pushState(null, "");
  render();
  requestAnimationFrame(() => gallery.focus(before));
}

function step(by) {
  const pictures = inOrder();
  const next = pictures[pictures.indexOf(opened) + by];
  if (!next) return;
  opened = next;
  history.replaceState({ picture: next.id }, "");
  render();
  messages.announce(next.result ? sentence(next) : next.name);
}

/** As the gallery shows them. */
function inOrder() {
  const { answered, pictures } = collection;
  return [...sorted(answered, order), ...pictures.filter((one) => !answered.includes(one))];
}

function focusTitle() {
  requestAnimationFrame(() => byId("detail-title").focus());
}

/** Bring the page in line with what is known, once a frame. */
function render() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(draw);
}

function draw() {
  const { pictures } = collection;
  const picture = shown();
  const view = model === null || !pictures.length ? "network" : picture ? "detail" : "gallery";
  for (const name of ["network", "detail", "gallery"]) byId(name).hidden = name !== view;
  byId("network").classList.toggle("loading", model === null);
  if (view === "detail") {
    detail.show(picture);
    const place = opened ? inOrder().indexOf(opened) : 0;
    byId("back").hidden = byId("steps").hidden = pictures.length < 2;
    byId("back-count").textContent = some(pictures.length);
    byId("previous").disabled = place <= 0;
    byId("next").disabled = place >= pictures.length - 1;
  }
  if (view === "gallery") gallery.show(collection, order);
  drawProgress();
}

let runningSince = null;

function drawProgress() {
  const waiting = collection.with("waiting").length;
  const held = collection.with("held").length;
  const running = runner.running !== null;
  const total = runner.done + waiting;
  byId("results").setAttribute("aria-busy", running);
  if (!running) runningSince = null;
  else if (runningSince === null) {
    runningSince = performance.now();
    setTimeout(render, PATIENCE_MS);
  }
  const long = running && performance.now() - runningSince > PATIENCE_MS * 0.9;
  byId("progress").hidden = !(long && total > 1);
  byId("sent").max = Math.max(total, 1);
  byId("sent").value = runner.done;
  byId("sent-text").textContent = `${runner.done} of ${total}`;
  byId("held").hidden = running || held === 0;
  byId("held-text").textContent = `${some(held)} not sent.`;
}

function announceResult() {
  messages.settled();
  const picture = shown();
  if (picture) {
    if (picture.result) messages.announce(sentence(picture));
    return; // what went wrong with it is an alert
  }
  const totals = collection.answered.length ? byId("totals-sentence").textContent : "";
  const failed = collection.with("failed").length;
  messages.announce(failed ? `${totals} ${some(failed)} could not be used.` : totals);
}

// -- controls -----------------------------------------------------------------------------------

byId("orders").append(
  ...Object.entries(ORDERS).map(([name, { label }]) =>
    h("label", {},
      h("input", { type: "radio", name: "order", value: name, checked: name === order,
        onchange: () => {
          order = name;
          render();
        } }),
      h("span", {}, label)),
  ),
);
byId("back").addEventListener("click", close);
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("remove").addEventListener("click", () => {
  const next = inOrder()[inOrder().indexOf(shown()) + 1] ?? null;
  const several = collection.pictures.length > 2;
  remove([shown()]);
  if (next && several) opened = next;
  if (collection.pictures.length) focusTitle();
  else byId("choose").focus();
});
byId("clear").addEventListener("click", clear);
byId("cancel").addEventListener("click", () => runner.cancel());
byId("resume").addEventListener("click", () => runner.resume());
// these go when they are used: the focus would go with them
for (const id of ["cancel", "resume", "retry", "dismiss", "remove-failed"]) {
  byId(id).addEventListener("click", () => byId("results").focus({ preventScroll: true }));
}
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // a new address would be a step of its own in the history
  byId("results").focus();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && opened && !document.querySelector("dialog[open]")) close();
});
addEventListener("popstate", ({ state }) => {
  opened = state?.picture ? collection.byId(state.picture) : null;
  render();
});
history.replaceState(null, "");
watch(add);
watchCamera((picture) => add([picture]));
start();
