// What is shown before there is a picture: the network, and every route that it can take.

import { byId, h } from "./dom.js";
import { madds, milliseconds, percent, untimed } from "./format.js";
import { RouteDrawing, glyph, level } from "./route.js";

const MOST_ROWS = 12;

/** Show a model: a choice of routes, and the one chosen as a drawing. */
export function showNetwork(model) {
  const gates = model.stages.filter((stage) => stage.gated).length;
  byId("network-note").textContent = gates
    ? `${gates === 1 ? "A gate looks" : `${gates} gates look`} at every picture on its way and ` +
      `${gates === 1 ? "decides" : "decide"} how many channels the later stages compute. ` +
      "Choose a route to see it."
    : "This network has no gate: every picture takes the same route.";
  const drawing = new RouteDrawing(model);
  byId("network-drawing").replaceChildren(drawing.element);
  const show = (route) => drawing.show(route.widths, level(model, route.route, route.madds));
  const routes = some(model.routes);
  byId("routes").replaceChildren(table(model, routes, show));
  show(routes.at(-1));
}

/** Of many routes some at even distances, the cheapest and the widest among them. */
function some(routes) {
  if (routes.length <= MOST_ROWS) return routes;
  const step = (routes.length - 1) / (MOST_ROWS - 1);
  return Array.from({ length: MOST_ROWS }, (_, i) => routes[Math.round(i * step)]);
}

function table(model, routes, show) {
  const timed = routes.some((route) => route.ms !== null);
  const heading = (text) => h("th", { scope: "col", class: "number" }, text);
  const number = (text) => h("td", { class: "number" }, text);
  const choice = (route) =>
    h(
      "label",
      { class: "route-choice" },
      h("input", {
        type: "radio",
        name: "route",
        checked: route === routes.at(-1),
        onchange: () => show(route),
      }),
      glyph(model, route.widths, level(model, route.route, route.madds)),
      h("span", { class: "route-name" }, route.route),
    );
  return h(
    "table",
    {},
    model.steady ? null : h("caption", {}, untimed(model).trim()),
    h("thead", {}, h(
      "tr",
      {},
      h("th", { scope: "col" }, "Route (channels of each stage)"),
      heading("Multiply-adds"),
      h("td", { class: "share-bar" }),
      heading("of the widest"),
      timed ? heading("Time") : null,
    )),
    h("tbody", {}, routes.map((route) => h(
      "tr",
      {},
      h("td", {}, choice(route)),
      number(madds(route.madds)),
      h("td", { class: "share-bar", "aria-hidden": "true" }, h(
        "span",
        { class: "bar", "data-level": level(model, route.route, route.madds) },
        h("span", { class: "bar-fill",
          style: { width: `${(route.madds / model.widest.madds) * 100}%` } }),
      )),
      number(percent(route.madds / model.widest.madds)),
      timed ? number(route.ms === null ? "" : milliseconds(route.ms)) : null,
    ))),
  );
}
