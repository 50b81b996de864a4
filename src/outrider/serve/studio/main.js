// Puts the page together: asks what the server has, then wires form, chat, race, charts and lists.

import { call, key } from "./api.js";
import { choose } from "./backend.js";
import { acceptance, acceptanceOf, barChart, lineChart, rates } from "./charts.js";
import { Conversation } from "./conversation.js";
import { byId } from "./dom.js";
import { look } from "./metrics.js";
import { depth } from "./protocol.js";
import { Race } from "./race.js";
import { SessionList } from "./sessions.js";
import { Settings } from "./settings.js";
import { Store } from "./store.js";
import { StepCard } from "./tokens.js";
import { Why } from "./why.js";

const POLL_MS = 2000;
const MAX_SAMPLES = 60;
const MAX_BARS = 40;

async function start() {
  wireTheme();
  wireDisclosures();
  byId("key").value = key.get();
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(byId("key").value.trim());
    location.reload();
  });
  try {
    open(await call("GET", "/v1/outrider/methods"));
  } catch (error) {
    said(`The server does not answer: ${error.message}`, true);
    byId("model").textContent = "not connected";
    if (error.status === 401) ask();
  }
}

/** Without the right key nothing works: show where it goes. */
function ask() {
  byId("key-box").open = true;
  byId("key").focus();
}

function open(about) {
  const backend = choose(about);
  const store = new Store();
  const settings = new Settings(about, () => race.describe());
  const why = new Why(about);
  const stepped = (reader, times) => {
    drawSteps(reader, times);
    settings.showInForce(reader);
    why.showPolicy(reader);
  };
  const race = new Race(about, settings, stepped);
  const hooks = {
    stepped,
    ended: (reader, times) => {
      stepped(reader, times);
      if (!reader.steps.some((step) => step.tokens)) drawSummary(reader);
    },
    changed: () => list.refresh().catch((error) => said(error.message, true)),
    said,
  };
  const conversation = new Conversation(backend, store, settings, hooks);
  const list = new SessionList(backend, store, conversation, said);
  new StepCard((element) => conversation.viewOf(element) ?? race.viewOf(element));
  byId("model").textContent = about.model + (about.draft_model ? ` with ${about.draft_model}` : "");
  byId("where").textContent = WHERE[backend.kind];
  byId("show-marks").addEventListener("change", showMarks);
  wireViews();
  race.describe();
  drawSteps({ steps: [] }, []);
  conversation.open(null);
  const refresh = () => {
    poll();
    why.refresh();
  };
  refresh();
  setInterval(() => document.hidden || refresh(), POLL_MS);
  document.body.dataset.ready = "true";
}

const WHERE = {
  session: "Sessions are kept by the server, marks of their answers by this browser.",
  local: "This server has no sessions: conversations are kept by this browser.",
};

function said(text, is_error = false) {
  const toast = byId("toast");
  toast.textContent = text;
  toast.classList.toggle("error", is_error);
  toast.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => (toast.hidden = true), is_error ? 12000 : 4000);
}

function showMarks() {
  document.body.classList.toggle("unmarked", !byId("show-marks").checked);
}

function wireTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = byId("theme");
  const is_dark = () =>
    (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const label = () => {
    button.textContent = is_dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${is_dark() ? "light" : "dark"} theme`);
  };
  button.addEventListener("click", () => {
    const theme = is_dark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("outrider.theme", theme);
    label();
  });
  dark.addEventListener("change", label);
  label();
}

/** On narrow screens the two side panels open and close. */
function wireDisclosures() {
  for (const button of document.querySelectorAll("[data-opens]")) {
    button.addEventListener("click", () => {
      const is_open = byId(button.dataset.opens).classList.toggle("open");
      button.setAttribute("aria-expanded", `${is_open}`);
    });
  }
}

function wireViews() {
  for (const button of document.querySelectorAll("[data-view]")) {
    button.addEventListener("click", () => {
      document.body.dataset.shown = button.dataset.view;
      for (const other of document.querySelectorAll("[data-view]")) {
        other.setAttribute("aria-pressed", `${other === button}`);
        byId(`view-${other.dataset.view}`).hidden = other !== button;
      }
    });
  }
}

function drawSteps(reader, times_ms) {
  const speeds = rates(reader.steps, times_ms);
  const scale = { most: speeds.length ? 0 : 100, from: "start", to: "now" };
  lineChart(byId("chart-rate"), speeds, scale);
  describe(
    "rate",
    speeds.length ? `${Math.round(overall(reader.steps, times_ms))} tokens/s` : "–",
    "Tokens per second over this answer",
  );
  drawAcceptance(acceptance(reader.steps));
  const drafted = reader.steps.filter((step) => step.tokens).slice(-MAX_BARS);
  const bars = drafted.map((step) => ({
    value: depth(step),
    part: Math.min(step.accepted, depth(step)),
  }));
  barChart(byId("chart-k"), bars, {
    most: 4,
    from: drafted.length ? "older steps" : "",
    to: drafted.length ? "latest" : "",
  });
  const last = drafted.at(-1);
  describe(
    "k",
    last ? `K = ${depth(last)}` : "–",
    "Draft depth chosen per step, filled as far as accepted",
  );
}

function overall(steps, times_ms) {
  const num_tokens = steps.slice(1).reduce((sum, step) => sum + (step.tokens?.length ?? 1), 0);
  return (num_tokens * 1000) / Math.max(times_ms.at(-1) - times_ms[0], 1);
}

function drawAcceptance(shares) {
  const bars = shares.map((value, i) => ({ value: 100 * value, label: `${i + 1}` }));
  barChart(byId("chart-acceptance"), bars, { most: 100, unit: "%" });
  const all = shares.map((value) => `${Math.round(100 * value)} %`).join(", ");
  describe(
    "acceptance",
    shares.length ? `first ${Math.round(100 * shares[0])} %` : "–",
    `Drafted steps that accepted at least so many tokens: ${all || "none yet"}`,
  );
}

/** A server that sends no steps still tells the sums at the end. */
function drawSummary(reader) {
  const histogram = reader.metrics?.speculative_decoding?.acceptance_histogram;
  if (histogram) drawAcceptance(acceptanceOf(histogram));
}

function describe(chart, value, meaning) {
  byId(`value-${chart}`).textContent = value;
  byId(`chart-${chart}`).setAttribute("aria-label", `${meaning}: ${value}`);
}

const samples = [];

async function poll() {
  let found = null;
  try {
    found = await look();
  } catch {
    // no /metrics here, or the server is away: the chart says so
  }
  if (found?.kv != null) samples.push(100 * found.kv);
  if (samples.length > MAX_SAMPLES) samples.shift();
  lineChart(byId("chart-kv"), samples, {
    most: 1,
    unit: "%",
    from: `${(samples.length * POLL_MS) / 1000} s ago`,
    to: "now",
  });
  const hits = found?.hit_rate != null ? `, ${Math.round(100 * found.hit_rate)} % prefix hits` : "";
  describe(
    "kv",
    found?.kv != null ? `${(100 * found.kv).toFixed(1)} %${hits}` : "not told",
    "KV blocks in use",
  );
}

start();
