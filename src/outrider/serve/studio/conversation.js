// The chat: one conversation on screen, its turns, and what can be done with each of them.

import { MIN_SPAN_MS } from "./charts.js";
import { byId, clip, make, perFrame, plural } from "./dom.js";
import { AnswerView } from "./tokens.js";

const TITLE = 40; // characters
const SPEAKERS = { user: "You", assistant: "Answer", log: "Added to the log" };

/** Draws a conversation, runs turns, and reports through `hooks`: stepped, ended, changed. */
export class Conversation {
  #log = byId("log");
  #views = new WeakMap(); // the element of an answer -> its AnswerView
  #running = null; // AbortController of the turn in flight

  constructor(backend, store, settings, hooks) {
    this.backend = backend;
    this.store = store;
    this.settings = settings;
    this.hooks = hooks;
    this.current = null;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(byId("message").value.trim());
    });
    byId("message").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("composer").requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.#running?.abort());
  }

  viewOf(element) {
    const text = element.closest(".text");
    return text && this.#views.get(text);
  }

  get is_running() {
    return this.#running !== null;
  }

  /** Shows one of the stored conversations, or an empty page for null. */
  open(conversation) {
    if (this.is_running) return;
    this.current = conversation;
    const turns = (conversation?.turns ?? []).map((turn, at) => this.#article(turn, at));
    this.#log.replaceChildren(...turns);
    byId("welcome").hidden = turns.length > 0;
    byId("welcome-elsewhere").hidden = !conversation?.is_elsewhere || turns.length > 0;
    this.hooks.changed();
    this.#log.lastElementChild?.scrollIntoView({ block: "end" });
  }

  /** Opens one; what this browser does not know of it is asked of the server. */
  async visit(conversation) {
    if (this.is_running) return;
    this.open(conversation);
    if (conversation.kind !== "session") return;
    const { head } = await this.backend.look(conversation.id);
    if (conversation.turns.length && head === conversation.head) return;
    const told = await this.backend.told(conversation.id);
    if (this.is_running) return;
    const turns = told.turns.map((turn, at) => known(conversation.turns[at], turn));
    Object.assign(conversation, told, { turns });
    const first = turns.find((turn) => turn.role === "user");
    if (conversation.is_elsewhere && first) conversation.title = clip(first.text, TITLE);
    this.store.save();
    if (this.current === conversation) this.open(conversation);
  }

  async send(text) {
    if (!text || this.is_running) return;
    this.#running = new AbortController();
    this.#busy(true);
    byId("message").value = "";
    let answer = null;
    try {
      if (!this.current) await this.#create(text);
      answer = this.#begin(text);
      await this.#run(text, answer);
    } catch (error) {
      this.#failed(text, answer, error);
    } finally {
      this.#running = null;
      this.#busy(false);
      this.hooks.changed();
    }
  }

  async #create(text) {
    const made = await this.backend.create();
    const one = { ...made, title: clip(text, TITLE), kind: this.backend.kind, turns: [] };
    this.current = this.store.add(one);
    this.hooks.changed();
  }

  /** The user's turn and an empty answer, on screen but not stored yet. */
  #begin(text) {
    byId("welcome").hidden = true;
    byId("welcome-elsewhere").hidden = true;
    const at = this.current.turns.length;
    const user = this.#article({ role: "user", text, before: this.current.place }, at);
    const turn = { role: "assistant", text: "", steps: [], note: "" };
    const article = this.#article(turn, at + 1);
    article.setAttribute("aria-busy", "true");
    this.#log.append(user, article);
    article.scrollIntoView({ block: "end" });
    return { user, article, turn, view: this.#views.get(article.querySelector(".text")) };
  }

  async #run(text, { article, turn, view }) {
    const settings = this.settings.read();
    const conversation = this.current;
    const { place: before, id } = conversation;
    const times = [];
    let reader = null;
    const paint = perFrame(() => {
      const is_near = nearEnd();
      view.show(reader);
      this.hooks.stepped(reader, times);
      if (is_near) article.scrollIntoView({ block: "end" });
    });
    const changed = (at) => {
      reader = at;
      while (times.length < at.steps.length) times.push(performance.now());
      paint();
    };
    const { signal } = this.#running;
    const { reader: whole, ...now } = await this.backend.send(
      conversation,
      text,
      settings,
      changed,
      signal,
    );
    reader = whole;
    if (reader.error) throw new Error(reader.error);
    view.show(reader);
    Object.assign(turn, {
      text: reader.committed,
      steps: reader.steps,
      note: note(reader, times),
      place: now.place,
    });
    conversation.turns.push({ role: "user", text, before }, turn);
    Object.assign(conversation, now);
    if (now.id !== id)
      this.hooks.said("Somebody else went on with this session; this is a branch of it.");
    this.store.save();
    article.removeAttribute("aria-busy");
    article.querySelector(".note").textContent = turn.note;
    this.hooks.ended(reader, times);
    byId("status").textContent = `Answer complete, ${turn.note}. ${turn.text}`;
  }

  /** An answer that failed is not part of the log: the server went back to the last head. */
  #failed(text, answer, error) {
    const is_stopped = error.name === "AbortError";
    const said = is_stopped ? "Stopped; the session stays as it was before." : error.message;
    if (answer) {
      answer.article.removeAttribute("aria-busy");
      answer.article.classList.add("failed");
      answer.view.tail.textContent = "";
      answer.article.querySelector(".note").textContent = said;
      answer.user.querySelector(".actions").remove();
      answer.article.querySelector(".actions").remove();
    }
    byId("message").value = text;
    this.hooks.said(said, !is_stopped);
  }

  #article(turn, at) {
    const is_answer = turn.role === "assistant";
    const article = make("article", { className: `turn ${turn.role}` });
    article.append(make("h3", { textContent: SPEAKERS[turn.role] }));
    if (is_answer) this.#answer(article, turn);
    else article.append(make("p", { className: "said", textContent: turn.text }));
    const action = is_answer ? this.#forker(turn, at) : this.#rewinder(turn, at);
    article.append(make("div", { className: "actions", hidden: this.is_running }, action));
    return article;
  }

  #answer(article, turn) {
    const view = new AnswerView(article, "Answer, step by step; arrow keys go from step to step");
    this.#views.set(view.text, view);
    view.show({ committed: turn.text, steps: turn.steps ?? [] });
    article.append(make("p", { className: "note", textContent: turn.note ?? "" }));
  }

  #rewinder(turn, at) {
    const title = "Takes this message and all after it back";
    return this.#action("Rewind to before this", title, () => this.#rewind(turn, at));
  }

  #forker(turn, at) {
    const title = "A new conversation that shares everything up to here";
    return this.#action("Fork from here", title, () => this.#fork(turn, at));
  }

  #action(label, title, act) {
    const button = make("button", {
      type: "button",
      className: "quiet",
      textContent: label,
      title,
    });
    button.addEventListener("click", async () => {
      if (this.is_running) return;
      try {
        await act();
      } catch (error) {
        this.hooks.said(error.message, true);
      }
    });
    return button;
  }

  async #rewind(turn, at) {
    Object.assign(this.current, await this.backend.rewind(this.current, turn.before));
    this.current.turns.length = at;
    this.store.save();
    this.open(this.current);
    byId("message").value = turn.text;
    byId("message").focus();
    this.hooks.said("Rewound: the message is in the field again.");
  }

  async #fork(turn, at) {
    const made = await this.backend.fork(this.current, turn.place);
    const { title, kind, turns } = this.current;
    const copied = structuredClone(turns.slice(0, at + 1));
    this.open(this.store.add({ ...made, title: `${title} (fork)`, kind, turns: copied }));
    byId("message").focus();
    this.hooks.said("Forked: this is the new branch.");
  }

  #busy(is_busy) {
    byId("send").hidden = is_busy;
    byId("stop").hidden = !is_busy;
    for (const actions of this.#log.querySelectorAll(".actions")) actions.hidden = is_busy;
    if (is_busy) byId("status").textContent = "Answer started.";
  }
}

/** The turn as it is kept here, with its marks, if it is the one that the server tells. */
function known(kept, told) {
  const is_same = kept && kept.role === told.role && kept.text === told.text;
  return is_same ? { ...kept, ...told, note: kept.note } : told;
}

/** "policy adaptive", where something could be drafted. */
function policyOf({ metrics }) {
  const policy = metrics?.speculative_decoding?.policy;
  return policy && `policy ${policy}`;
}

function nearEnd() {
  const page = document.scrollingElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < 160;
}

/** "96 tokens in 24 steps, 4.0 tokens per step, exact" */
export function note(reader, times_ms) {
  const exactness = reader.exactness?.mode ?? "";
  const is_told = reader.steps.some((step) => step.tokens);
  const num_tokens = is_told
    ? reader.steps.reduce((sum, step) => sum + (step.tokens?.length ?? 0), 0)
    : (reader.usage?.output_tokens ?? reader.usage?.completion_tokens ?? null);
  if (num_tokens === null)
    return [plural(reader.steps.length, "piece"), exactness].filter(Boolean).join(", ");
  const num_steps = is_told ? reader.steps.filter((step) => step.tokens?.length).length : null;
  const span_ms = times_ms.at(-1) - times_ms[0];
  return [
    plural(num_tokens, "token") + (num_steps ? ` in ${plural(num_steps, "step")}` : ""),
    num_steps && `${(num_tokens / num_steps).toFixed(2)} tokens per step`,
    span_ms > MIN_SPAN_MS && `${Math.round((1000 * num_tokens) / span_ms)} tokens/s`,
    reader.session?.kv_hit_tokens > 0 &&
      `${plural(reader.session.kv_hit_tokens, "KV token")} reused`,
    policyOf(reader),
    exactness,
  ]
    .filter(Boolean)
    .join(", ");
}
