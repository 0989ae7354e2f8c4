// Many pictures: their totals, and a card for each in the order of cost, confidence or name.

import { ORDERS, sorted } from "./collection.js";
import { byId, h } from "./dom.js";
import {
  className, madds, mean, milliseconds, percent, pictures as some, untimed,
} from "./format.js";
import { glyph, level } from "./route.js";

const MOST_ROWS = 12; // of the histogram

export class Gallery {
  #model = null;
  #cards = new WeakMap(); // picture -> its list item

  /** `onOpen(picture)` when a card is chosen, `onRemove(pictures)` for unreadable ones. */
  constructor({ onOpen, onRemove }) {
    this.onOpen = onOpen;
    this.onRemove = onRemove;
  }

  /** Show pictures of this model from now on. */
  offer(model) {
    this.#model = model;
    this.#cards = new WeakMap();
  }

  /** Show a collection in an order of `ORDERS`. */
  show(collection, order) {
    const { pictures, answered } = collection;
    const failed = collection.with("failed");
    const unanswered = pictures.filter((one) => !one.result && one.status !== "failed");
    byId("gallery-title").textContent = some(pictures.length);
    byId("order-note").textContent = ORDERS[order].inWords;
    this.#showTotals(answered);
    this.#showFailed(failed);
    this.#showCards([...sorted(answered, order), ...unanswered]);
  }

  /** Put the keyboard's focus on a picture's card. */
  focus(picture) {
    this.#cards.get(picture)?.firstElementChild.focus();
  }

  #showTotals(answered) {
    byId("totals").hidden = answered.length === 0;
    if (answered.length === 0) return;
    const results = answered.map((picture) => picture.result);
    const { widest } = this.#model;
    const spent = mean(results.map((result) => result.madds));
    const timed = widest.ms !== null && results.every((result) => result.ms !== null);
    const ms = timed ? mean(results.map((result) => result.ms)) : null;
    byId("totals-sentence").replaceChildren(
      h("strong", {}, percent(spent / widest.madds)),
      ` of the widest route's multiply-adds on average: ${madds(spent)} instead of ` +
        `${madds(widest.madds)} a picture` +
        (timed ? `, ${milliseconds(ms)} instead of ${milliseconds(widest.ms)}.` : ".") +
        untimed(this.#model),
    );
    byId("histogram").replaceChildren(...histogram(this.#model, results));
  }

  #showFailed(failed) {
    byId("failed").hidden = failed.length === 0;
    byId("failed-title").textContent = `${some(failed.length)} could not be used`;
    byId("failed-list").replaceChildren(
      ...failed.map((picture) =>
        h("li", {}, h("strong", {}, picture.name), `: ${picture.error}`),
      ),
    );
    byId("remove-failed").onclick = () => this.onRemove(failed);
  }

  #showCards(pictures) {
    const list = byId("cards");
    const items = pictures.map((picture) => this.#card(picture));
    const same =
      items.length === list.children.length && items.every((item, i) => item === list.children[i]);
    if (same) return;
    const focused = list.contains(document.activeElement) ? document.activeElement : null;
    list.replaceChildren(...items);
    focused?.focus({ preventScroll: true }); // an element that moves loses the focus
  }

  #card(picture) {
    let item = this.#cards.get(picture);
    if (!item) {
      item = h("li", {}, h("button", { type: "button", class: "picture",
        onclick: () => this.onOpen(picture) }));
      this.#cards.set(picture, item);
    }
    // what a card shows is a function of the result: made anew only where that is another
    const state = picture.result ?? picture.status;
    if (item.shown !== state) {
      item.shown = state;
      item.firstElementChild.replaceChildren(...content(this.#model, picture));
    }
    item.classList.toggle("stale", picture.result !== null && picture.status === "waiting");
    return item;
  }
}

function content(model, picture) {
  const coarse = model.image_size_px < 128 ? "thumb coarse" : "thumb";
  const image = h("img", {
    class: coarse, src: picture.url, alt: "", loading: "lazy", decoding: "async",
    draggable: "false", // onto the page it came from
  });
  const name = h("span", { class: "picture-name" }, picture.name);
  const { result } = picture;
  if (!result) {
    const text = picture.status === "held" ? "not sent" : "waiting";
    return [image, h("span", { class: "answer muted" }, text), name];
  }
  const [best] = result.top;
  const routeLevel = level(model, result.route, result.madds);
  return [
    image,
    h("span", { class: "answer" },
      h("span", { class: "class-name" }, className(best)), " ",
      h("span", { class: "class-share" }, percent(best.probability))),
    name,
    h("span", { class: "card-cost", "data-level": routeLevel },
      glyph(model, result.widths, routeLevel),
      h("span", { class: "bar", "aria-hidden": "true" },
        h("span", { class: "bar-fill",
          style: { width: `${Math.min(result.madds_share, 1) * 100}%` } })),
      h("span", { class: "sr-only" }, "cost "),
      percent(result.madds_share),
      result.mirrored
        ? h("span", { class: "sr-only" }, ", mirror image asked too")
        : result.escalated ? h("span", { class: "sr-only" }, ", escalated") : null),
  ];
}

/** Table rows: how many pictures took which route, cheapest first. */
function histogram(model, results) {
  const groups = new Map(); // route -> its results
  for (const result of results) {
    if (!groups.has(result.route)) groups.set(result.route, []);
    groups.get(result.route).push(result);
  }
  const listed = model.routes.length <= MOST_ROWS ? model.routes : [];
  for (const route of listed) {
    if (!groups.has(route.route)) groups.set(route.route, []);
  }
  const costs = new Map(model.routes.map((route) => [route.route, route.madds]));
  const cost = ([route, group]) => costs.get(route) ?? mean(group.map((result) => result.madds));
  const ordered = [...groups].sort((a, b) => cost(a) - cost(b));
  const most = Math.max(...ordered.map(([, group]) => group.length));
  const row = ([route, group]) => {
    const routeLevel = level(model, route, cost([route, group]));
    return h(
      "tr",
      { "data-level": routeLevel },
      h("th", { scope: "row" }, h("span", { class: "badge" },
        glyph(model, route.split("-").map(Number), routeLevel), h("span", {}, route))),
      h("td", { class: "histogram-bar", "aria-hidden": "true" }, h("span", { class: "bar plain" },
        group.length
          ? h("span", { class: "bar-fill", style: { width: `${(group.length / most) * 100}%` } })
          : null)),
      ...counts(group.length),
    );
  };
  const counts = (count) => [
    h("td", { class: "number" }, `${count}`),
    h("td", { class: "number muted" }, percent(count / results.length)),
  ];
  const rows = ordered.slice(0, MOST_ROWS).map(row);
  const rest = ordered.slice(MOST_ROWS);
  if (rest.length) {
    const count = rest.reduce((sum, [, group]) => sum + group.length, 0);
    rows.push(h("tr", {}, h("th", { scope: "row" }, `${rest.length} dearer routes`), h("td"),
      ...counts(count)));
  }
  return rows;
}
