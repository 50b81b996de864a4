// The draft tree of one step: accepted path thick, what fell dashed and struck.

import { clip, draw, visible } from "./dom.js";
import { alone, kinds } from "./protocol.js";

const COLUMN = 92;
const ROW = 30;
const BOX = { width: 76, height: 22 };
const MAX_NODES = 48; // more do not fit a card

/** An SVG of `step.tree`, or of the chain that was kept where the server sends no tree. */
export function drawTree(step) {
  const tree = step.tree ?? chain(step);
  const nodes = layout(tree, step.accepted).slice(0, MAX_NODES);
  const end = answer(step, tree, nodes);
  const all = end ? [...nodes, end] : nodes;
  const width = Math.max(...all.map(left)) + BOX.width + 4;
  const height = (Math.max(...all.map((node) => node.row)) + 1) * ROW + 4;
  const picture = draw("svg", {
    class: "tree",
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    role: "img",
    "aria-label": spoken(tree, end),
  });
  picture.append(root(), ...all.map((node) => edge(node, nodes)), ...all.map(box));
  const num_hidden = tree.tokens.length - nodes.length;
  if (num_hidden > 0)
    picture.append(draw("text", { x: 4, y: height - 2, class: "more" }, `+${num_hidden} more`));
  return picture;
}

/** Without a tree only the accepted part of the draft is known. */
function chain(step) {
  const numbers = step.tokens.slice(0, step.accepted).map((_, i) => i);
  const tokens = numbers.map((i) => alone(step, i));
  return { tokens, parents: numbers.map((i) => i - 1), accepted: numbers };
}

/** Nodes with a column (depth) and a row; the first child stays on its parent's row. */
function layout({ tokens, parents, accepted }, num_taken) {
  const nodes = tokens.map((text, index) => ({
    text,
    index,
    parent: parents[index],
    name: nameOf(accepted.indexOf(index), num_taken),
    row: 0,
    column: 0,
  }));
  let num_rows = 0;
  const place = (parent, column) => {
    const children = nodes.filter((node) => node.parent === parent);
    children.forEach((node, i) => {
      if (i > 0) num_rows += 1;
      node.row = num_rows;
      node.column = column;
      place(node.index, column + 1);
    });
  };
  place(-1, 1);
  return nodes;
}

/** The target's own token, after the accepted path. */
function answer(step, tree, nodes) {
  if (step.tokens.length <= step.accepted) return null;
  const text = alone(step, step.accepted);
  const parent = tree.accepted.length ? tree.accepted.at(-1) : -1;
  const from = nodes[parent] ?? { row: 0, column: 0 };
  const taken = nodes.filter((node) => node.column === from.column + 1).map((node) => node.row);
  const row = taken.length ? Math.max(...nodes.map((node) => node.row)) + 1 : from.row;
  return { text, index: -1, parent, row, column: from.column + 1, name: kinds(step).at(-1) };
}

function root() {
  return draw("circle", { class: "root", cx: 12, cy: ROW / 2, r: 6 });
}

function edge(node, nodes) {
  const parent = nodes[node.parent];
  const x = parent ? left(parent) + BOX.width : 18;
  const y = (parent?.row ?? 0) * ROW + ROW / 2;
  const to = { x: left(node), y: node.row * ROW + ROW / 2 };
  const middle = (x + to.x) / 2;
  const path = `M${x} ${y}C${middle} ${y} ${middle} ${to.y} ${to.x} ${to.y}`;
  return draw("path", { class: `edge ${node.name}`, d: path });
}

function box(node) {
  const x = left(node);
  const y = node.row * ROW + (ROW - BOX.height) / 2;
  const label = draw("text", { x: x + BOX.width / 2, y: y + 15 }, clip(visible(node.text), 9));
  const frame = draw("rect", { x, y, rx: 5, ...BOX });
  return draw(
    "g",
    { class: `node ${node.name}` },
    frame,
    label,
    draw("title", {}, visible(node.text)),
  );
}

function left(node) {
  return node.column * COLUMN - COLUMN + 24;
}

/** What stood behind the end of the answer was accepted for nothing. */
function nameOf(place, num_taken) {
  if (place < 0) return "fallen";
  return place < num_taken ? "accepted" : "beyond";
}

function spoken(tree, end) {
  const path = tree.accepted.map((node) => visible(tree.tokens[node])).join(" ");
  const then = end ? `; the target adds ${visible(end.text)}` : "";
  return `Draft of ${tree.tokens.length} nodes; accepted path: ${path || "none"}${then}`;
}
