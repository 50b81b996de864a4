// Small SVG charts, and what they show of the steps of an answer.

import { draw } from "./dom.js";
import { depth } from "./protocol.js";

const WIDTH = 300;
const HEIGHT = 80;
export const MIN_SPAN_MS = 20;
const MIN_SLICE_MS = 16; // the page reads what arrived within a frame at once
const EDGE = { left: 34, right: 6, top: 8, bottom: 18 };

const inner = {
  width: WIDTH - EDGE.left - EDGE.right,
  height: HEIGHT - EDGE.top - EDGE.bottom,
};

/** A line through `values`, oldest first. */
export function lineChart(picture, values, { most = 0, unit = "", from = "", to = "" } = {}) {
  const top = nice(Math.max(most, ...values) || 1);
  const x = (i) => EDGE.left + (values.length < 2 ? 0 : (i / (values.length - 1)) * inner.width);
  const points = values.map((value, i) => `${x(i).toFixed(1)},${y(value, top).toFixed(1)}`);
  const line = draw("polyline", { class: "line", points: points.join(" ") });
  const area =
    points.length > 1
      ? [
          draw("polygon", {
            class: "area",
            points: `${EDGE.left},${y(0, top)} ${points.join(" ")} ${x(values.length - 1)},${y(0, top)}`,
          }),
        ]
      : [];
  const dot = values.length
    ? [draw("circle", { class: "dot", cx: x(values.length - 1), cy: y(values.at(-1), top), r: 3 })]
    : [];
  picture.replaceChildren(...axis(top, unit), ...area, line, ...dot, ...ends(from, to));
}

/** Bars; each is {value, part?, label?}: `part` of the value is filled, the rest outlined. */
export function barChart(picture, bars, { most = 0, unit = "", from = "", to = "" } = {}) {
  const top = nice(Math.max(most, ...bars.map((bar) => bar.value)) || 1);
  const pitch = inner.width / Math.max(bars.length, 8);
  const width = Math.max(1, pitch * 0.72);
  const drawn = bars.flatMap((bar, i) => {
    const x = EDGE.left + i * pitch + (pitch - width) / 2;
    const rects = [column(x, width, bar.value, top, "bar whole")];
    rects.push(column(x, width, bar.part ?? bar.value, top, "bar part"));
    if (bar.label) {
      rects.push(
        draw(
          "text",
          { class: "tick", x: x + width / 2, y: HEIGHT - 5, "text-anchor": "middle" },
          bar.label,
        ),
      );
    }
    return rects;
  });
  picture.replaceChildren(...axis(top, unit), ...drawn, ...ends(from, to));
}

function column(x, width, value, top, name) {
  return draw("rect", {
    class: name,
    x,
    width,
    y: y(value, top),
    height: Math.max(0, y(0, top) - y(value, top)),
  });
}

function y(value, top) {
  return EDGE.top + inner.height * (1 - Math.min(value / top, 1));
}

function axis(top, unit) {
  return [0, top / 2, top].flatMap((value) => [
    draw("line", {
      class: "grid",
      x1: EDGE.left,
      x2: WIDTH - EDGE.right,
      y1: y(value, top),
      y2: y(value, top),
    }),
    draw(
      "text",
      { class: "tick", x: EDGE.left - 4, y: y(value, top) + 3, "text-anchor": "end" },
      short(value) + unit,
    ),
  ]);
}

function ends(from, to) {
  return [
    draw("text", { class: "tick", x: EDGE.left, y: HEIGHT - 5 }, from),
    draw("text", { class: "tick", x: WIDTH - EDGE.right, y: HEIGHT - 5, "text-anchor": "end" }, to),
  ];
}

/** The next of 1, 2, 4, 5, 10 times a power of ten, so that halves are round too. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].find((m) => m * power >= value * 0.999) * power;
}

function short(value) {
  if (value >= 1000) return `${+(value / 1000).toPrecision(3)}k`;
  return `${+value.toPrecision(3)}`;
}

/** Tokens per second in equal slices of time; `times_ms` has one entry per step. */
export function rates(steps, times_ms, num_slices = 30) {
  if (steps.length < 3) return [];
  const start = times_ms[0];
  const span = times_ms.at(-1) - start;
  if (span < MIN_SPAN_MS) return []; // they came together: nothing can be said of their speed
  const slices = Math.min(steps.length / 3, span / MIN_SLICE_MS);
  const count = Math.min(num_slices, Math.max(2, Math.floor(slices)));
  const tokens = new Array(count).fill(0);
  for (let i = 1; i < steps.length; i += 1) {
    const slice = Math.min(count - 1, Math.floor(((times_ms[i] - start) / span) * count));
    tokens[slice] += steps[i].tokens?.length ?? 1;
  }
  return tokens.map((n) => (n * count * 1000) / span);
}

/** Share of drafted steps that accepted at least i tokens, i = 1, 2, ... */
export function acceptance(steps) {
  const drafted = steps.filter((step) => step.num_drafted);
  const deepest = Math.max(0, ...drafted.map(depth));
  return Array.from(
    { length: deepest },
    (_, i) => drafted.filter((step) => step.accepted > i).length / drafted.length,
  );
}

/** The same from an acceptance histogram, where the stream carried no steps. */
export function acceptanceOf(histogram) {
  const total = histogram.reduce((sum, n) => sum + n, 0);
  return histogram
    .slice(1)
    .map((_, i) => histogram.slice(i + 1).reduce((sum, n) => sum + n, 0) / Math.max(total, 1));
}
