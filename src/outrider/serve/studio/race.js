// The race: the same prompt and seed, decoded plainly and speculatively, side by side.

import { chat } from "./backend.js";
import { byId, make, perFrame } from "./dom.js";
import { AnswerView } from "./tokens.js";

const PLAIN = { method: "off" };

/** Runs both lanes and says whether the texts are the same. */
export class Race {
  #views = new WeakMap();
  #running = null;

  /** `stepped(reader, times_ms)` is called as a lane goes on. */
  constructor(about, settings, stepped) {
    this.about = about;
    this.stepped = stepped;
    this.settings = settings;
    byId("race-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    byId("race-stop").addEventListener("click", () => this.#running?.abort());
  }

  viewOf(element) {
    const text = element.closest(".text");
    return text && this.#views.get(text);
  }

  describe() {
    byId("race-speculation").textContent = this.settings.describe();
  }

  async run() {
    if (this.#running) return;
    const asked = this.#asked();
    if (asked.speculation?.method === "off" || asked.speculation?.policy === "off") {
      return tell(
        "Choose a method and a policy other than “off” under Speculation, or there is nothing to race.",
      );
    }
    this.#running = new AbortController();
    this.#busy(true);
    tell("The race is on.");
    const lanes = [
      this.#lane("plain", { ...asked, speculation: PLAIN }),
      this.#lane("fast", asked),
    ];
    try {
      if (byId("race-together").checked) await Promise.all(lanes.map((lane) => this.#drive(lane)));
      else for (const lane of lanes) await this.#drive(lane);
      tell(verdict(...lanes));
    } catch (error) {
      this.#running.abort();
      tell(error.name === "AbortError" ? "The race was stopped." : error.message);
    } finally {
      this.#running = null;
      this.#busy(false);
    }
  }

  #asked() {
    const settings = this.settings.read();
    const seed = byId("race-seed").valueAsNumber;
    return {
      ...settings,
      tail: false,
      max_tokens: byId("race-tokens").valueAsNumber || 160,
      seed: Number.isNaN(seed) ? 0 : seed,
      ignore_eos: byId("race-on").checked,
    };
  }

  #lane(name, settings) {
    const place = byId(`lane-${name}`);
    const old = place.querySelector(".text");
    const label = `Text of the ${name === "plain" ? "plain" : "speculative"} lane`;
    const view = new AnswerView(place, label);
    this.#views.set(view.text, view);
    old?.remove();
    const bar = byId(`bar-${name}`);
    bar.max = settings.max_tokens;
    bar.value = 0;
    byId(`stats-${name}`).textContent = "waiting";
    return { name, settings, view, bar, reader: null, seconds: 0, num_tokens: 0 };
  }

  async #drive(lane) {
    const messages = [{ role: "user", content: byId("race-prompt").value }];
    let start = null; // the first token: who comes second finds the prompt in the cache
    const times = [];
    const is_charted = lane.name === "fast" || !byId("race-together").checked;
    const paint = perFrame(() => {
      show(lane);
      if (is_charted) this.stepped(lane.reader, times);
    });
    const changed = (reader) => {
      lane.reader = reader;
      lane.num_tokens = count(reader);
      while (times.length < reader.steps.length) times.push(performance.now());
      if (reader.steps.length) start ??= performance.now();
      if (start !== null && !reader.is_done) lane.seconds = (performance.now() - start) / 1000;
      paint();
    };
    await chat(messages, lane.settings, this.about, changed, this.#running.signal);
    if (lane.reader.error) throw new Error(lane.reader.error);
    lane.bar.max = Math.max(lane.num_tokens, 1); // it may have stopped early
    show(lane);
  }

  #busy(is_busy) {
    byId("race-start").hidden = is_busy;
    byId("race-stop").hidden = !is_busy;
  }
}

function show(lane) {
  lane.view.show(lane.reader);
  lane.bar.value = lane.num_tokens;
  const steps = lane.reader.steps.filter((step) => step.tokens?.length).length;
  const rate = lane.seconds ? ` · ${Math.round(lane.num_tokens / lane.seconds)} tokens/s` : "";
  const per_step = steps ? ` · ${(lane.num_tokens / steps).toFixed(2)} per step` : "";
  byId(`stats-${lane.name}`).textContent =
    `${lane.num_tokens} tokens${per_step} · ${lane.seconds.toFixed(2)} s${rate}`;
}

function count(reader) {
  const told = reader.usage?.completion_tokens;
  return told ?? reader.steps.reduce((sum, step) => sum + (step.tokens?.length ?? 1), 0);
}

function tell(text) {
  byId("race-verdict").replaceChildren(make("p", { textContent: text }));
}

/** Same text or not, and by how much one was faster; a lossy rule promised nothing. */
export function verdict(plain, fast) {
  const [a, b] = [plain.reader.committed, fast.reader.committed];
  const factor = plain.seconds / Math.max(fast.seconds, 1e-9);
  const steps = (lane) => lane.reader.steps.filter((step) => step.tokens?.length).length;
  const fewer = steps(fast) ? `${steps(fast)} steps instead of ${steps(plain)}. ` : "";
  const speed =
    factor >= 1
      ? `${factor.toFixed(2)} times as fast`
      : `slower: ${factor.toFixed(2)} times the speed`;
  const mode = fast.reader.exactness?.mode ?? "";
  return `${sameness(a, b, mode)} Speculation took ${fewer || "the same road. "}It was ${speed}.`;
}

function sameness(a, b, mode) {
  if (a === b) return `Identical text: yes, all ${[...a].length} characters.`;
  const at = [...a].findIndex((sign, i) => sign !== [...b][i]);
  const where = at < 0 ? Math.min(a.length, b.length) : at;
  const why = {
    lossy: " The rule is lossy, so it may.",
    exact: " Rules that draw by root keep the law, not each sample; “sampled” keeps both.",
  };
  return `Identical text: no, they part at character ${where + 1}.${why[mode] ?? ""}`;
}
