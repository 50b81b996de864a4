// The list of conversations, each with how warm the server still has it.

import { byId, make, plural } from "./dom.js";

const WARMTH = {
  live: { sign: "●", says: "live: a request runs" },
  warm: { sign: "◐", says: "warm: KV kept" },
  cold: { sign: "○", says: "cold: the log only" },
  local: { sign: "□", says: "kept in this browser" },
  gone: { sign: "✕", says: "gone from the server" },
};

const MAX_LOOKS = 16; // the older ones show what was known of them

/** Keeps the list in step with the store and, where there are sessions, with the server. */
export class SessionList {
  #list = byId("sessions");
  #looks = new Map(); // id -> what the server says of it

  constructor(backend, store, conversation, said) {
    this.backend = backend;
    this.store = store;
    this.conversation = conversation;
    this.said = said;
    byId("new-session").addEventListener("click", () => {
      conversation.open(null);
      byId("message").focus();
    });
  }

  /** Asks the server about warmth, then draws. */
  async refresh() {
    if (this.backend.kind === "session") {
      const listed = await this.backend.list();
      if (listed) for (const one of listed) this.#adopt(one);
      await Promise.all(
        this.store
          .all()
          .slice(0, MAX_LOOKS)
          .map((one) => this.#look(one)),
      );
    }
    this.draw();
  }

  draw() {
    const all = this.store.all().filter((one) => one.kind === this.backend.kind);
    this.#list.replaceChildren(...all.map((one) => this.#item(one)));
    byId("no-sessions").hidden = all.length > 0;
  }

  /** A session of the server that another page made: its text is asked for when it is opened. */
  #adopt(one) {
    if (this.store.get(one.id)) return;
    const title = `Session ${one.id.slice(-8)}`;
    this.store.add({
      id: one.id,
      head: one.head,
      place: one.n_tokens,
      title,
      kind: "session",
      turns: [],
      is_elsewhere: true,
    });
  }

  async #look(one) {
    if (one.kind !== "session") return;
    try {
      this.#looks.set(one.id, await this.backend.look(one.id));
    } catch (error) {
      if (error.status !== 404) throw error;
      this.#looks.set(one.id, { state: "gone" });
    }
  }

  #item(one) {
    const about = this.#looks.get(one.id) ?? { state: one.kind === "local" ? "local" : "cold" };
    const warmth = WARMTH[about.state] ?? WARMTH.cold;
    const is_here = one === this.conversation.current;
    const open = make(
      "button",
      { type: "button", className: "session" },
      make("span", { className: "title", textContent: one.title }),
      make(
        "span",
        { className: `warmth ${about.state}` },
        make("span", { className: "sign", "aria-hidden": "true", textContent: warmth.sign }),
        ` ${describe(about, warmth)}`,
      ),
    );
    if (about.kv_tokens) open.append(share(about));
    if (is_here) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => this.#visit(one));
    return make("li", {}, open, this.#remover(one));
  }

  async #visit(one) {
    try {
      await this.conversation.visit(one);
    } catch (error) {
      this.said(error.message, true);
    }
  }

  #remover(one) {
    const button = make("button", {
      type: "button",
      className: "quiet remove",
      textContent: "✕",
      title: "Delete",
      "aria-label": `Delete ${one.title}`,
    });
    button.addEventListener("click", async () => {
      if (this.conversation.is_running) return;
      try {
        await this.backend.remove(one.id);
      } catch (error) {
        if (error.status !== 404) return this.said(error.message, true);
      }
      this.store.remove(one.id);
      if (one === this.conversation.current) this.conversation.open(null);
      this.draw();
      this.said(`Deleted ${one.title}.`);
    });
    return button;
  }
}

/** How much of the log is in the cache; the words beside it say the same. */
function share({ kv_tokens, n_tokens }) {
  return make("progress", {
    className: "share",
    max: n_tokens,
    value: kv_tokens,
    "aria-hidden": "true",
  });
}

/** "warm: KV kept, 48 of 59 tokens; drafts ready in part: draft_model (R1) to 16" */
function describe(about, warmth) {
  const kv = about.kv_tokens ? `, ${about.kv_tokens} of ${plural(about.n_tokens, "token")}` : "";
  const behind = Object.entries(about.spec ?? {})
    .filter(([, one]) => one.ready_upto < about.kv_tokens)
    .map(([name, one]) => `${name} (${one.class}) to ${one.ready_upto}`);
  return warmth.says + kv + (behind.length ? `; drafts ready in part: ${behind.join(", ")}` : "");
}
