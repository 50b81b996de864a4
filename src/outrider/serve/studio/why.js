// "Why this K?": what the policy in force decided, what it expects, and what things cost.

import { call } from "./api.js";
import { barChart, lineChart } from "./charts.js";
import { byId, draw, make, plural } from "./dom.js";

const PATH = "/debug/controller";
const MOST_ROWS = 64;
const MOST_DRAFTERS = 4;
const SILENT = {
  fixed: "K is what was asked for, always; nothing is measured.",
  off: "Nothing is drafted.",
  table: "K goes by the number of sequences, from a table.",
};

/** The panel; asks the server while it is open. */
export class Why {
  #box = byId("why");
  #policy = null; // in force in the last answer of this page

  constructor(about) {
    this.#box.hidden = !about.endpoints.includes(`GET ${PATH}`);
    this.#box.addEventListener("toggle", () => this.refresh());
  }

  /** From now on it is about the policy that was in force in this answer. */
  showPolicy({ metrics }) {
    this.#policy = metrics?.speculative_decoding?.policy ?? this.#policy;
  }

  async refresh() {
    if (this.#box.hidden || !this.#box.open) return;
    try {
      paint(summary(await call("GET", PATH), this.#policy));
    } catch (error) {
      byId("why-line").textContent = `The server does not say: ${error.message}`;
    }
  }
}

/** What is shown, from the server's report; null or [] where there is nothing to say. */
export function summary(report, policy = null) {
  const name = report.policies[policy] ? policy : shown(report);
  const told = report.policies[name] ?? {};
  const plain = told.plain_tokens_per_s ?? null;
  const expected = told.expected_tokens_per_s ?? null;
  return {
    policy: name,
    is_default: name === report.default,
    why: told.why ?? SILENT[name] ?? "It tells nothing of itself.",
    facts: [
      ["Sequences", `${report.num_running ?? 0}`],
      ["Plain decoding", speed(plain)],
      ["Expected", plain && expected ? `${speed(expected)}, ${overPlain(expected / plain)}` : "–"],
      ["Measured", overPlain(told.guard?.advantage)],
      ["Ended for losing", shut(told.guard)],
    ],
    depths: Object.entries(told.depths ?? {}).map(([depth, count]) => [Number(depth), count]),
    acceptance: [...(told.acceptance ?? [])]
      .filter((one) => one.num_drafts)
      .sort((a, b) => b.num_drafts - a.num_drafts)
      .slice(0, MOST_DRAFTERS)
      .map((one) => ({ label: label(one), stands: one.stands, num_drafts: one.num_drafts })),
    price: price(told.cost?.passes),
  };
}

/** The default policy, or where that measures nothing one that requests have made use of. */
function shown({ default: usual, policies }) {
  const used = ([, told]) => told?.plain_tokens_per_s != null;
  if (policies[usual]?.why != null) return usual;
  return Object.entries(policies).find(used)?.[0] ?? usual;
}

/** Milliseconds of a pass by rows, up to MOST_ROWS, never falling; [] before anything was timed. */
function price(passes) {
  if (!passes?.rows || passes.num_timings === 0) return [];
  let least = 0;
  return passes.rows
    .map((rows, i) => [rows, (least = Math.max(least, 1000 * passes.seconds[i]))])
    .filter(([rows]) => rows <= MOST_ROWS);
}

function label({ drafter, temperature_up_to: heat }) {
  if (heat === "0") return `${drafter}, greedy`;
  return `${drafter}, temperature ${heat === "inf" ? "above 1" : `up to ${heat}`}`;
}

function shut(guard) {
  if (!guard) return "–";
  const left = guard.shut_for_steps ? `, for ${plural(guard.shut_for_steps, "step")} more` : "";
  return guard.times_shut ? `${plural(guard.times_shut, "time")}${left}` : "never";
}

const speed = (value) => (value == null ? "–" : `${Math.round(value)} tokens/s`);
const overPlain = (value) => (value == null ? "–" : `${value.toFixed(2)} times plain`);

function paint({ policy, is_default, why, facts, depths, acceptance, price: points }) {
  byId("why-policy").textContent = is_default ? policy : `${policy} (not the default)`;
  byId("why-line").textContent = why;
  byId("why-facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [
      make("dt", { textContent: name }),
      make("dd", { textContent: value }),
    ]),
  );
  paintDepths(depths);
  paintPrice(points);
  byId("why-acceptance").replaceChildren(...acceptance.map(acceptanceFigure));
}

function paintDepths(depths) {
  const deepest = Math.max(0, ...depths.map(([depth]) => depth));
  const counts = new Map(depths);
  const bars = Array.from({ length: depths.length ? deepest + 1 : 0 }, (_, depth) => ({
    value: counts.get(depth) ?? 0,
    label: deepest <= 12 || depth % 4 === 0 ? `${depth}` : "",
  }));
  barChart(byId("chart-depths"), bars, { most: 1 });
  const all = depths.map(([depth, count]) => `K = ${depth}: ${plural(count, "sequence")}`);
  tell("depths", all.length === 1 ? `K = ${depths[0][0]}` : all.length ? "mixed" : "–", [
    "Depths in force",
    all.join(", ") || "nothing decided yet",
  ]);
}

function paintPrice(points) {
  const last = points.at(-1);
  const ends = last ? { from: "1 row", to: plural(last[0], "row") } : {};
  lineChart(
    byId("chart-price"),
    points.map(([, ms]) => ms),
    { unit: " ms", ...ends },
  );
  const grows = last ? `${(last[1] / points[0][1]).toFixed(1)} times` : "–";
  tell("price", grows, [
    "Milliseconds of a pass by its rows",
    points.map(([rows, ms]) => `${rows}: ${ms.toPrecision(2)}`).join(", ") || "not timed yet",
  ]);
}

function acceptanceFigure({ label: name, stands, num_drafts }) {
  const picture = draw("svg", { class: "chart", viewBox: "0 0 300 80", role: "img" });
  const bars = stands.map((value, i) => ({ value: 100 * value, label: `${i + 1}` }));
  barChart(picture, bars, { most: 100, unit: "%" });
  const all = stands.map((value) => `${Math.round(100 * value)} %`).join(", ");
  picture.setAttribute("aria-label", `Expected to stand at each depth, ${name}: ${all}`);
  const caption = make("figcaption", { textContent: `${name} ` });
  caption.append(make("output", { textContent: plural(num_drafts, "draft") }));
  return make("figure", {}, caption, picture);
}

function tell(chart, value, [meaning, all]) {
  byId(`value-${chart}`).textContent = value;
  byId(`chart-${chart}`).setAttribute("aria-label", `${meaning}: ${all}`);
}
