// The budget: a slider, what the calibration promises for it, and the curve that it was read from.

import { byId, s } from "./dom.js";
import { milliseconds, percent } from "./format.js";

const DEBOUNCE_MS = 90; // a drag gives many values; the server needs only where it rests
const CHART = { width: 300, height: 92, left: 46, right: 6, top: 8, bottom: 20 };

/** The panel; `onChange(budget)` gets a share as text, or null where none is asked for. */
export class BudgetPanel {
  #model = null;
  #value = null;
  #timer = 0;
  #standing = null; // the budget that the server itself sets where none is asked for
  #chart = null;

  constructor(onChange) {
    this.onChange = onChange;
    this.slider = byId("budget");
    this.slider.addEventListener("input", () => this.#set(this.#reachable()));
    byId("as-trained").addEventListener("click", () => {
      this.slider.focus();
      this.#set(null);
    });
  }

  /** The budget that requests carry. */
  get value() {
    return this.#value;
  }

  /** Offer what this model can be asked for. */
  offer(model) {
    this.#model = model;
    const { budget } = model;
    byId("budget-panel").hidden = false;
    byId("budget-fields").hidden = budget === null;
    byId("no-budget").hidden = budget !== null;
    if (budget === null) return;
    // a step for every point: between two of them a budget gives no more than the cheaper one
    this.slider.max = budget.points.length - 1;
    this.slider.value = this.slider.max;
    this.#chart = drawChart(budget.points);
    byId("curve").replaceChildren(...(this.#chart ? [this.#chart.svg] : []));
    this.#tell();
  }

  /** What the server made of the budget, which is less under load where it may adapt. */
  used(answer) {
    if (this.#value === null && answer.budget !== this.#standing) {
      this.#standing = answer.budget;
      this.#tell();
    }
    byId("budget-used").textContent =
      answer.budget_used === answer.budget
        ? ""
        : `The server is under load and works to ${inWords(answer.budget_used)} for now.`;
    byId("budget-unlike").textContent =
      answer.unlike_curve && answer.budget !== null
        ? `Pictures of late cost ${answer.cost_ratio.toFixed(2)} times what was measured: they are ` +
          `unlike those that the budgets were measured on.`
        : "";
  }

  /** The budget of the point that the slider stands at. */
  #reachable() {
    return String(this.#model.budget.points[Number(this.slider.value)].budget);
  }

  #set(value) {
    this.#value = value;
    this.#tell();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.onChange(value), DEBOUNCE_MS);
  }

  #tell() {
    const value = this.#value;
    const point = value === null ? null : pointFor(this.#model.budget.points, Number(value));
    const own = this.#standing === null ? "as trained" : `server's ${inWords(this.#standing)}`;
    const asked = value === null ? own : `at most ${percent(Number(value))}`;
    const promise = point ? expectation(point) : "";
    byId("budget-value").textContent = asked;
    byId("budget-promise").textContent =
      value === null ? "Move the slider to make the network thriftier or more thorough." : promise;
    byId("as-trained").textContent = own.charAt(0).toUpperCase() + own.slice(1);
    byId("as-trained").disabled = value === null;
    this.slider.setAttribute(
      "aria-valuetext",
      value === null ? asked : `${asked} of the widest route's cost. ${promise}`,
    );
    this.slider.classList.toggle("untouched", value === null);
    this.#chart?.mark(point);
  }
}

/** The best that a budget affords, as the server chooses it; the cheapest where none is. */
function pointFor(points, budget) {
  return points.findLast((point) => point.budget <= budget + 1e-9) ?? points[0] ?? null;
}

/** A budget as a person reads it: a share in per cent, others ("4.5ms") as they are. */
function inWords(budget) {
  return Number.isFinite(Number(budget)) ? percent(Number(budget)) : budget;
}

function expectation(point) {
  const accuracy = point.top1 === null ? "" : `${(point.top1 * 100).toFixed(1)}% right`;
  const time = point.ms === null ? "" : ` (${milliseconds(point.ms)})`;
  const cost = `${percent(point.madds_share)} of the widest route's multiply-adds${time}`;
  return `Expected: ${accuracy ? `${accuracy} for ` : ""}${cost}, on average.`;
}

/** Accuracy against cost; null where it was not measured. */
function drawChart(points) {
  const known = points.filter((point) => point.top1 !== null);
  if (known.length < 2) return null;
  const [xs, ys] = [known.map((p) => p.madds_share), known.map((p) => p.top1)];
  const span = Math.max(Math.max(...ys) - Math.min(...ys), 0.005);
  const [low, high] = [Math.min(...ys) - span * 0.1, Math.max(...ys) + span * 0.1];
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const { width, height } = CHART;
  const x = (share) =>
    CHART.left + ((share - left) / (right - left || 1)) * (width - CHART.left - CHART.right);
  const y = (top1) =>
    height - CHART.bottom - ((top1 - low) / (high - low)) * (height - CHART.top - CHART.bottom);
  const text = (kind, at, value, anchor) =>
    s("text", { class: kind, x: at[0], y: at[1], "text-anchor": anchor }, value);
  const dot = s("circle", { class: "curve-dot", r: 5, visibility: "hidden" });
  const svg = s(
    "svg",
    { class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img" },
    s("title", {}, `Measured accuracy against cost: ${percent(Math.min(...ys))} at the cheapest, ` +
      `up to ${percent(Math.max(...ys))}`),
    s("line", { class: "axis", x1: CHART.left, x2: width - CHART.right,
      y1: height - CHART.bottom, y2: height - CHART.bottom }),
    text("axis-label", [CHART.left - 5, y(Math.max(...ys)) + 4], percent1(Math.max(...ys)), "end"),
    text("axis-label", [CHART.left - 5, y(Math.min(...ys)) + 4], percent1(Math.min(...ys)), "end"),
    text("axis-label", [CHART.left, height - 6], percent(left), "start"),
    text("axis-label", [(CHART.left + width - CHART.right) / 2, height - 6], "cost", "middle"),
    text("axis-label", [width - CHART.right, height - 6], percent(right), "end"),
    s("polyline", {
      class: "curve-line",
      points: known.map((p) => `${x(p.madds_share)},${y(p.top1)}`).join(" "),
    }),
    dot,
  );
  return {
    svg,
    mark(point) {
      const shown = point !== null && point.top1 !== null;
      dot.setAttribute("visibility", shown ? "visible" : "hidden");
      if (!shown) return;
      dot.setAttribute("cx", x(point.madds_share));
      dot.setAttribute("cy", y(point.top1));
    },
  };
}

const percent1 = (value) => `${(value * 100).toFixed(1)}%`;
