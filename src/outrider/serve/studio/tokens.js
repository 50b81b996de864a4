// Text of an answer with its steps marked: drafted and accepted, corrected, bonus, plain, tail.

import { byId, clip, make, plural, visible } from "./dom.js";
import { alone, depth, kinds } from "./protocol.js";
import { drawTree } from "./tree.js";

const WORDS = {
  accepted: "drafted and accepted",
  corrected: "corrected by the target",
  bonus: "bonus of the target",
  plain: "not drafted",
};

const NO_TEXT = "; no text of its own: a special token, or part of a character";

/** Shows one answer in `place` and keeps up with it; only what is new is drawn. */
export class AnswerView {
  #num_drawn = 0;
  #told = 0; // characters drawn

  constructor(place, label) {
    this.steps = [];
    this.text = make("div", { className: "text", role: "group", "aria-label": label });
    this.tail = make("span", { className: "tail", "aria-hidden": "true" });
    this.text.append(this.tail);
    this.text.addEventListener("keydown", (event) => this.#walk(event));
    place.append(this.text);
  }

  /** `answer` has committed, tail and steps: a Reader, or a turn as it was stored. */
  show({ committed, tail = "", steps }) {
    this.steps = steps;
    for (; this.#num_drawn < steps.length; this.#num_drawn += 1) {
      const step = steps[this.#num_drawn];
      this.#told += step.text.length;
      this.tail.before(this.#span(step, this.#num_drawn));
    }
    if (!steps.length && this.#told < committed.length) {
      this.tail.before(committed.slice(this.#told));
      this.#told = committed.length;
    }
    this.tail.textContent = tail;
  }

  #span(step, index) {
    if (!step.tokens) return document.createTextNode(step.text);
    const span = make("span", {
      className: "step",
      role: "group",
      tabIndex: this.text.querySelector(".step") ? -1 : 0,
      "aria-label": spoken(step, index),
      "data-step": index,
    });
    span.append(...pieces(step));
    return span;
  }

  /** One tab stop per answer; arrows go from step to step. */
  #walk(event) {
    const all = [...this.text.querySelectorAll(".step")];
    const at = all.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined || !all[to]) return;
    event.preventDefault();
    all[at].tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  }
}

/** Spans of a step's tokens; what the stream held back or cut off is left out here too. */
function pieces(step) {
  const kind = kinds(step);
  if (step.tokens.join("") !== step.text) return unsure(step, kind);
  return step.tokens.map((text, i) =>
    make("span", { className: `tok ${kind[i]}`, textContent: text }),
  );
}

/** Where text was held back, tokens and text of a step differ: mark the step as one. */
function unsure(step, kind) {
  const all = new Set(kind);
  const name = all.size === 1 ? kind[0] : "mixed";
  return step.text ? [make("span", { className: `tok ${name}`, textContent: step.text })] : [];
}

function outcome(step) {
  const last = kinds(step).at(-1);
  if (!step.num_drafted) return "nothing drafted";
  const kept = `${step.accepted} of ${plural(step.num_drafted, "drafted token")} accepted`;
  const path = step.tree?.accepted.length ?? 0;
  const end = path > step.accepted ? ", then the answer ended" : "";
  const then = { corrected: ", then a correction", bonus: ", then a bonus token" }[last] ?? end;
  return kept + then;
}

function sentence(text) {
  return text[0].toUpperCase() + text.slice(1);
}

function spoken(step, index) {
  return `Step ${index + 1}: ${outcome(step)}. Text: ${step.text}`;
}

/** The card that opens at a step under the pointer or the focus; Escape closes it. */
export class StepCard {
  #card = byId("step-card");
  #closing = 0;
  #step = null;

  constructor(viewOf) {
    this.viewOf = viewOf; // element inside an answer -> its AnswerView
    for (const kind of ["pointerover", "focusin", "click"]) {
      document.addEventListener(kind, (event) => this.#enter(event.target));
    }
    for (const kind of ["pointerout", "focusout"]) {
      document.addEventListener(kind, () => this.#leaveSoon());
    }
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.close();
    });
    addEventListener("scroll", () => this.#step && this.#place(this.#step), { passive: true });
  }

  close() {
    clearTimeout(this.#closing);
    this.#step?.classList.remove("open");
    this.#step = null;
    this.#card.hidden = true;
  }

  #enter(target) {
    if (!(target instanceof Element)) return;
    if (target.closest("#step-card")) return clearTimeout(this.#closing);
    const step = target.closest(".step");
    if (!step) return;
    clearTimeout(this.#closing);
    if (step !== this.#step) this.#open(step);
  }

  #leaveSoon() {
    clearTimeout(this.#closing);
    this.#closing = setTimeout(() => {
      const focused = document.activeElement?.closest(".step");
      if (this.#card.matches(":hover")) return;
      if (!focused) this.close();
      else if (focused !== this.#step) this.#open(focused);
    }, 200);
  }

  #open(span) {
    const view = this.viewOf(span);
    if (!view) return;
    this.#step?.classList.remove("open");
    this.#step = span;
    span.classList.add("open");
    const index = Number(span.dataset.step);
    this.#card.replaceChildren(...about(view.steps[index], index));
    this.#card.hidden = false;
    this.#place(span);
  }

  #place(span) {
    const lines = span.getClientRects();
    const at = lines[lines.length - 1] ?? span.getBoundingClientRect();
    const { width, height } = this.#card.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, innerWidth - width - 8));
    const below = at.bottom + 8;
    const top = below + height < innerHeight ? below : Math.max(8, lines[0].top - height - 8);
    this.#card.style.left = `${left}px`;
    this.#card.style.top = `${top}px`;
  }
}

function about(step, index) {
  const who = step.num_drafted ? `drafted by ${step.source}` : "plain";
  const k = step.num_drafted ? `, K = ${depth(step)}` : "";
  return [
    make("p", { className: "card-title", textContent: `Step ${index + 1}: ${who}${k}` }),
    make("p", { className: "card-note", textContent: `${sentence(outcome(step))}.` }),
    step.num_drafted ? make("div", { className: "tree-box" }, drawTree(step)) : "",
    list(step),
  ].filter(Boolean);
}

function list(step) {
  const kind = kinds(step);
  const items = step.tokens.map((text, i) =>
    make(
      "li",
      {},
      make("code", {
        className: `tok ${kind[i]}`,
        textContent: clip(visible(alone(step, i)), 24),
      }),
      ` ${WORDS[kind[i]]}${text ? "" : NO_TEXT}`,
    ),
  );
  return make("ol", { className: "card-tokens" }, ...items);
}
