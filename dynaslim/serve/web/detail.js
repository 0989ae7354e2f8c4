// One picture: what the network saw, what it answered, what that cost, and the route it took.

import { byId, h } from "./dom.js";
import { className, madds, milliseconds, percent, untimed } from "./format.js";
import { drawSeen } from "./preview.js";
import { RouteDrawing, glyph, level } from "./route.js";

const MOST_TICKS = 8;

export class Detail {
  #model = null;
  #drawing = null;
  #seen = null; // the picture that the canvas shows

  /** Show pictures of this model from now on. */
  offer(model) {
    this.#model = model;
    this.#drawing = new RouteDrawing(model);
    byId("route").replaceChildren(this.#drawing.element);
    this.#seen = null;
  }

  /** Show a picture as far as it is known. */
  show(picture) {
    byId("detail-title").textContent = picture.name;
    byId("detail-error").hidden = picture.status !== "failed";
    byId("detail-error").textContent = picture.error ?? "";
    byId("detail").classList.toggle("stale", picture.status === "waiting");
    if (this.#seen !== picture) this.#showSeen(picture);
    if (picture.status === "failed" && byId("seen").hidden) byId("seen-card").hidden = true;
    const { result } = picture;
    for (const id of ["answer", "cost", "route-card"]) byId(id).hidden = picture.error !== null;
    byId("classes").replaceChildren(...(result ? result.top.map(classRow) : placeholders()));
    byId("cost-body").replaceChildren(...(result ? cost(this.#model, result) : []));
    byId("route-note").replaceChildren(...(result ? routeNote(this.#model, result) : []));
    if (result) {
      const { route, widths, madds: spent } = result;
      this.#drawing.show(widths, level(this.#model, route, spent));
    } else {
      this.#drawing.clear();
    }
  }

  async #showSeen(picture) {
    this.#seen = picture;
    const canvas = byId("seen");
    const caption = byId("seen-caption");
    const size = this.#model.image_size_px;
    const natural = await drawSeen(canvas, picture.blob, this.#model);
    if (this.#seen !== picture) return;
    canvas.hidden = natural === null;
    byId("seen-card").hidden = natural === null && picture.status === "failed";
    canvas.classList.toggle("coarse", size < 128);
    canvas.setAttribute("aria-label", `${picture.name} as the network sees it`);
    caption.textContent = natural
      ? `As the network sees it, at ${times(size, size)} px. ` +
        `The picture has ${times(natural.width, natural.height)}.`
      : "This browser cannot show this kind of picture.";
  }
}

const times = (width, height) => `${width}\u00a0×\u00a0${height}`;

/** What a result says, in one sentence for a screen reader. */
export function sentence(picture) {
  const { result } = picture;
  const [best] = result.top;
  const answer = `${className(best)}, ${percent(best.probability)} sure`;
  return `${picture.name}: ${answer}, ${percent(result.madds_share)} of the widest route's cost`;
}

function classRow(answer) {
  return h(
    "li",
    {},
    h("span", { class: "class-name" }, className(answer)),
    h("span", { class: "class-share" }, percent(answer.probability)),
    bar(answer.probability),
  );
}

function placeholders() {
  return Array.from({ length: 3 }, () => h("li", { class: "placeholder", "aria-hidden": "true" }));
}

function bar(share, ticks = []) {
  return h(
    "span",
    { class: "bar", "aria-hidden": "true" },
    h("span", { class: "bar-fill", style: { width: `${Math.min(share, 1) * 100}%` } }),
    ticks.map((tick) => h("span", { class: "bar-tick", style: { left: `${tick * 100}%` } })),
  );
}

function cost(model, result) {
  const timed = result.ms !== null && model.widest.ms !== null;
  const spentMs = timed ? milliseconds(result.ms) : null;
  const time = timed ? `, ${spentMs} instead of ${milliseconds(model.widest.ms)}` : "";
  const share = percent(result.madds_share);
  const routeLevel = level(model, result.route, result.madds);
  // where the other routes would end, unless they are too many to tell apart
  const others = model.routes.length > MOST_TICKS ? [] : model.routes;
  const ticks = (value, widest) =>
    others.map(value).filter((v) => v !== null && v < widest).map((v) => v / widest);
  const row = (name, part, text, marks) =>
    h(
      "div",
      { class: "cost-row", "data-level": routeLevel },
      h("span", { class: "cost-name" }, name),
      bar(part, marks),
      h("span", { class: "cost-text" }, text),
    );
  const { madds: all, ms } = model.widest;
  const rows = [
    row("Multiply-adds", result.madds_share, `${madds(result.madds)} of ${madds(all)}`,
      ticks((route) => route.madds, all)),
  ];
  if (timed) {
    rows.push(
      row("Time", result.ms / ms, `${spentMs} of ${milliseconds(ms)}`,
        ticks((route) => route.ms, ms)),
    );
  }
  return [
    h("p", { class: "headline" }, h("strong", {}, share),
      ` of the widest route's multiply-adds${time}.${untimed(model)}`),
    ...rows,
  ];
}

function routeNote(model, result) {
  const place = model.routes.findIndex((route) => route.route === result.route);
  const names = place < 0 ? "a mixed route" : `route ${place + 1} of ${model.routes.length}`;
  const badge = h(
    "span",
    { class: "badge" },
    glyph(model, result.widths, level(model, result.route, result.madds)),
    h("span", {}, result.route),
  );
  const remark = result.mirrored
    ? "The widest route was unsure too, so it was shown the picture's mirror image: the answer is " +
      "the mean of both. Every pass is paid for."
    : result.escalated
      ? "The first answer was unsure, so the picture was sent on along a wider route. " +
        "Every route is paid for; this is the last."
      : null;
  const escalated = remark ? h("span", { class: "remark" }, remark) : null;
  return [badge, h("span", { class: "muted" }, names), escalated].filter(Boolean);
}
