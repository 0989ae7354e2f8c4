// How pictures come onto the page: dropped, chosen, pasted, a folder, the server's samples.

import { byId, h } from "./dom.js";

const SUFFIXES = /\.(png|jpe?g|jpe|webp|bmp|gif|tiff?|ppm|pgm|avif|heic)$/i;

/**
 * Watch for pictures. `add(files, {leftOut})` gets {name, blob}s, and how many files of a folder
 * were no pictures.
 */
export function watch(add) {
  const files = byId("files");
  const folder = byId("folder");
  byId("choose").addEventListener("click", () => files.click());
  byId("choose-folder").addEventListener("click", () => folder.click());
  for (const input of [files, folder]) {
    input.addEventListener("change", () => {
      const chosen = [...input.files].map(named);
      input.value = ""; // the same file may be chosen again
      if (input === folder) addFolder(chosen, add);
      else if (chosen.length) add(chosen, { leftOut: 0 });
    });
  }
  addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])].map(named);
    if (!pasted.length) return;
    event.preventDefault();
    add(pasted, { leftOut: 0 });
  });
  watchDrops(add);
}

/** Buttons for the pictures that the server offers; `pick(sample)` gets the one that is chosen. */
export function offerSamples(samples, { pick, pickAll }) {
  byId("samples").hidden = samples.length === 0;
  byId("sample-list").replaceChildren(
    ...samples.map((sample) => {
      const image = { src: sampleUrl(sample), alt: "", width: 48, height: 48, draggable: "false" };
      const button = {
        type: "button", class: "sample", title: sample.name,
        "aria-label": `Sample: ${sample.name}`, onclick: () => pick(sample),
      };
      return h("li", {}, h("button", button, h("img", image)));
    }),
  );
  byId("all-samples").onclick = pickAll;
}

/** A sample as a picture. */
export async function fetchSample(sample) {
  const response = await fetch(sampleUrl(sample));
  if (!response.ok) throw new Error(`sample ${sample.name}: answered ${response.status}`);
  return { name: sample.name, blob: await response.blob(), sample: sample.url };
}

/** Beside the page, so that it is found behind a proxy that serves it under a prefix. */
const sampleUrl = (sample) => sample.url.replace(/^\/+/, "");

const named = (file) => ({ name: file.name || "pasted picture", blob: file });

const isPicture = ({ name, blob }) => blob.type.startsWith("image/") || SUFFIXES.test(name);

function addFolder(files, add) {
  const shown = files.filter(isPicture);
  add(shown, { leftOut: files.length - shown.length });
}

function watchDrops(add) {
  let depth = 0; // of elements that the pointer has entered and not left
  const veil = byId("veil");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const show = (value) => {
    depth = value;
    veil.hidden = depth === 0;
  };
  addEventListener("dragenter", (event) => hasFiles(event) && show(depth + 1));
  addEventListener("dragleave", (event) => hasFiles(event) && show(Math.max(depth - 1, 0)));
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", async (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(0);
    // entries must be asked for before the event is over; what is in them may come later
    const items = [...event.dataTransfer.items].filter((item) => item.kind === "file");
    const entries = items.map((item) => item.webkitGetAsEntry?.() ?? null);
    const single = [...event.dataTransfer.files].map(named);
    if (!entries.some((entry) => entry?.isDirectory)) {
      if (single.length) add(single, { leftOut: 0 });
      return;
    }
    const found = await Promise.all(entries.filter(Boolean).map(filesOf));
    addFolder(found.flat(), add);
  });
}

/** All files in and below an entry of a drop. */
async function filesOf(entry) {
  if (entry.isFile) {
    return [named(await new Promise((resolve, reject) => entry.file(resolve, reject)))];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    // a reader gives a hundred at a time, and none at the end
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    found.push(...(await Promise.all(some.map(filesOf))).flat());
  }
  return found;
}
