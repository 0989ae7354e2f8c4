// The network as blocks, one for each stage, and the part of each that a route uses.
//
// A block's area is its number of channels; it is filled from below, as a slimmable network uses
// the first channels of a layer. The bands between are the channels handed on.

import { h, s, set, still } from "./dom.js";

const TALLEST_PX = 168;
const LOWEST_PX = 56; // of the largest block: on a narrow screen the drawing scrolls instead
const NARROWEST_PX = 38; // with the gap beside it, room for "of 1024"
const GAP_PX = { least: 10, most: 84, label: 36 };
const TOP_PX = 26;
const BOTTOM_PX = 42;
const GLIDE_MS = 320;

/** Channels of every stage on the widest of the routes that the gates can take. */
export function fullWidths(model) {
  return model.stages.map((stage, i) =>
    Math.max(...(model.routes.length ? model.routes.map((r) => r.widths[i]) : [stage.largest])),
  );
}

/**
 * How dear a route is, 0 (cheapest) to 3 (widest): its place among those that are listed, or
 * between them by its multiply-adds.
 */
export function level(model, route, madds) {
  const listed = model.routes.findIndex((one) => one.route === route);
  const place = listed < 0 ? model.routes.filter((one) => one.madds < madds).length - 1 : listed;
  const last = Math.max(model.routes.length - 1, 1);
  return Math.round((Math.min(Math.max(place, 0), last) / last) * 3);
}

/** What a drawing shows, in words. */
export function inWords(model, widths) {
  const full = fullWidths(model);
  return model.stages
    .map((stage, i) => {
      const gate = stage.gated ? "a gate chooses, then " : "";
      return `${gate}${stage.name} ${widths[i]} of ${full[i]} channels`;
    })
    .join("; ");
}

/** A route as a few bars, small enough for a badge. */
export function glyph(model, widths, routeLevel) {
  const full = fullWidths(model);
  const tallest = Math.sqrt(Math.max(...full));
  const pitch = 5;
  const bars = full.flatMap((channels, i) => {
    const height = Math.max((Math.sqrt(channels) / tallest) * 14, 2);
    const used = height * (widths[i] / channels);
    return [
      s("rect", { class: "glyph-full", x: i * pitch, y: 15 - height, width: 4, height }),
      s("rect", { class: "glyph-used", x: i * pitch, y: 15 - used, width: 4, height: used }),
    ];
  });
  const width = full.length * pitch;
  return s(
    "svg",
    { class: "glyph", "data-level": routeLevel, viewBox: `0 0 ${width} 16`, width, height: 16,
      "aria-hidden": "true" },
    bars,
  );
}

/** The drawing of a model's routes; `show` glides from one to the next. */
export class RouteDrawing {
  #model;
  #full;
  #shown = null;
  #frame = 0;
  #parts = [];
  #width = 0;
  #svg;
  #text;

  constructor(model) {
    this.#model = model;
    this.#full = fullWidths(model);
    this.#text = s("title");
    this.#svg = s("svg", { class: "route", role: "img" }, this.#text);
    this.element = h("div", { class: "route-scroll" }, this.#svg);
    new ResizeObserver(() => requestAnimationFrame(() => this.#build())).observe(this.element);
  }

  /** Fill the blocks as far as a route of these widths does. */
  show(widths, routeLevel) {
    this.#text.textContent = inWords(this.#model, widths);
    this.#svg.dataset.level = routeLevel;
    cancelAnimationFrame(this.#frame);
    const from = this.#shown;
    if (from === null || still()) {
      this.#shown = [...widths];
      this.#draw();
      return;
    }
    const began = performance.now();
    const step = (now) => {
      const t = Math.min(Math.max((now - began) / GLIDE_MS, 0), 1);
      const eased = 1 - (1 - t) ** 3;
      this.#shown = from.map((width, i) => width + (widths[i] - width) * eased);
      this.#draw();
      if (t < 1) this.#frame = requestAnimationFrame(step);
    };
    this.#frame = requestAnimationFrame(step);
  }

  /** Empty blocks: no route is known. */
  clear() {
    cancelAnimationFrame(this.#frame);
    this.#shown = null;
    this.#text.textContent = "No route yet";
    this.#draw();
  }

  /** Lay out anew for the width of the page. */
  #build() {
    const available = this.element.clientWidth;
    if (available === 0 || available === this.#width) return;
    this.#width = available;
    const layout = lay(this.#full, available - 2); // and half a line's width on either side
    const base = TOP_PX + layout.tallest;
    const [width, height] = [layout.width + 2, base + BOTTOM_PX];
    set(this.#svg, { width, height, viewBox: `-1 0 ${width} ${height}` });
    // one that is wider than the screen scrolls, by the keyboard too
    if (width > available) this.element.tabIndex = 0;
    else this.element.removeAttribute("tabindex");
    const stages = this.#model.stages;
    this.#parts = stages.map((stage, i) => {
      const { x, side } = layout.blocks[i];
      const full = this.#full[i];
      const middle = x + side / 2;
      const before = layout.blocks[i - 1];
      const gateX = before ? (before.x + before.side + x) / 2 : x - GAP_PX.least / 2;
      return {
        base, side, full, x,
        before: before ?? null,
        band: s("path", { class: "band" }),
        used: s("rect", { class: "used", x, width: side }),
        outline: s("rect", { class: "full", x, y: base - side, width: side, height: side }),
        options: stage.widths
          .filter((width) => width < full)
          .map((width) => {
            const y = base - side * (width / full);
            return s("line", { class: "option", x1: x, x2: x + side, y1: y, y2: y });
          }),
        name: label(middle, base - side - 9, "stage-name", stage.name),
        count: label(middle, base + 17, "count", ""),
        of: label(middle, base + 33, "of", `of ${full}`),
        gate: stage.gated ? gateMark(gateX, base, layout.gap) : [],
      };
    });
    this.#svg.replaceChildren(
      this.#text,
      s("line", { class: "floor", x1: 0, x2: layout.width, y1: base + 0.5, y2: base + 0.5 }),
      ...this.#parts.flatMap((part) => [
        part.band, part.used, ...part.options, part.outline,
        part.name, part.count, part.of, ...part.gate,
      ]),
    );
    this.#draw();
  }

  #draw() {
    const shown = this.#shown ?? this.#full.map(() => 0);
    let heightBefore = 0;
    this.#parts.forEach((part, i) => {
      const height = part.side * Math.min(shown[i] / part.full, 1);
      set(part.used, { y: part.base - height, height });
      part.count.textContent = this.#shown === null ? "" : Math.round(shown[i]);
      if (part.before) {
        const left = part.before.x + part.before.side;
        const bend = (left + part.x) / 2;
        const [top, next] = [part.base - heightBefore, part.base - height];
        const path = `M${left} ${top}C${bend} ${top} ${bend} ${next} ${part.x} ${next}`;
        part.band.setAttribute("d", `${path}V${part.base}H${left}Z`);
      }
      heightBefore = height;
    });
  }
}

/** Where blocks stand in so many pixels: the largest that fit beside their labels. */
function lay(full, available) {
  const gaps = GAP_PX.least * (full.length - 1);
  const roots = full.map(Math.sqrt);
  const slots = (scale) => roots.map((root) => Math.max(root * scale, NARROWEST_PX));
  const room = (scale) => slots(scale).reduce((sum, slot) => sum + slot, gaps);
  let [low, high] = [LOWEST_PX / Math.max(...roots), TALLEST_PX / Math.max(...roots)];
  for (let i = 0; i < 20; i += 1) {
    const scale = (low + high) / 2;
    if (room(scale) <= available) low = scale;
    else high = scale;
  }
  const spare = Math.max(available - room(low), 0) / Math.max(full.length - 1, 1);
  const gap = Math.min(GAP_PX.least + spare, GAP_PX.most);
  const width = Math.max(room(low) - gaps + gap * (full.length - 1), available);
  let x = (width - (room(low) - gaps + gap * (full.length - 1))) / 2;
  const blocks = slots(low).map((slot, i) => {
    const side = Math.max(roots[i] * low, 6);
    const block = { x: x + (slot - side) / 2, side };
    x += slot + gap;
    return block;
  });
  return { blocks, width, gap, tallest: Math.max(...blocks.map((block) => block.side)) };
}

function label(x, y, kind, text) {
  return s("text", { class: kind, x, y, "text-anchor": "middle" }, text);
}

function gateMark(x, base, gap) {
  const name = gap < GAP_PX.label ? [] : [label(x, base + 33, "gate-name", "gate")];
  return [s("path", { class: "gate", d: `M${x} ${base - 7}l7 7-7 7-7-7z` }), ...name];
}
