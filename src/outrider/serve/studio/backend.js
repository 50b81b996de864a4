// Where a conversation lives: sessions on the server, or plain chat with the history sent along.

import { ApiError, call, events } from "./api.js";
import { plural } from "./dom.js";
import { Reader } from "./protocol.js";

const MAX_RESUMES = 3;

/** Sessions where the server has them, else plain chat. `about` is /v1/outrider/methods. */
export function choose(about) {
  const needed = ["POST /v1/sessions", "POST /v1/responses"];
  const has_all = needed.every((one) => about.endpoints.includes(one));
  return has_all ? new Sessions(about) : new Chat(about);
}

/** Conversations that the server keeps: its token log is the truth, this page shows it. */
export class Sessions {
  kind = "session";

  constructor(about) {
    this.about = about;
  }

  async create() {
    const made = await call("POST", "/v1/sessions", {
      model: this.about.model,
      detach: "continue",
    });
    return at(made);
  }

  /**
   * Runs one turn; `changed(reader)` after each event. Returns the reader, and where the
   * conversation is now: in another session if somebody else has gone on with this one.
   */
  async send(conversation, text, settings, changed, signal) {
    const body = {
      model: this.about.model,
      input: text,
      stream: true,
      stream_options: streamOptions(settings, this.about),
      max_output_tokens: settings.max_tokens,
      outrider: { session: conversation.id, if_head: conversation.head, on_conflict: "fork" },
      ...sampling(settings),
    };
    const reader = new Reader();
    try {
      await follow(reader, events("POST", "/v1/responses", body, signal), changed, signal);
    } catch (error) {
      if (signal.aborted) await this.#cancel(conversation);
      throw error;
    }
    return { reader, ...at(await this.look(reader.session?.id ?? conversation.id)) };
  }

  async fork(conversation, place) {
    const [branch] = (await this.#act(conversation, "fork", { at: place, n: 1 })).data;
    return at(branch);
  }

  async rewind(conversation, place) {
    return at(await this.#act(conversation, "rewind", { to: place }));
  }

  look(id) {
    return call("GET", `/v1/sessions/${encodeURIComponent(id)}`);
  }

  /** Where a session is, and its turns as the server tells them. */
  async told(id) {
    const found = await call("GET", `/v1/outrider/transcripts/${encodeURIComponent(id)}`);
    return { head: found.head, place: found.n_tokens, turns: found.data.map(turn) };
  }

  /** All sessions of this key, or null where the server lists none. */
  async list() {
    if (!this.about.endpoints.includes("GET /v1/sessions")) return null;
    return (await call("GET", "/v1/sessions?limit=100")).data;
  }

  remove(id) {
    return call("DELETE", `/v1/sessions/${encodeURIComponent(id)}`);
  }

  /** The server goes on without a listener, so it is told; what came too late is taken back. */
  async #cancel(conversation) {
    const { response_in_progress: running } = await this.look(conversation.id);
    if (running) await call("POST", `/v1/responses/${encodeURIComponent(running)}/cancel`);
    const { head } = await this.look(conversation.id);
    if (head === conversation.head) return;
    Object.assign(conversation, await this.rewind(conversation, conversation.place));
  }

  #act(conversation, verb, body) {
    return call("POST", `/v1/sessions/${encodeURIComponent(conversation.id)}/${verb}`, body);
  }
}

/** A turn of a transcript as this page keeps it. */
function turn({ role, text, begin, end, ...more }) {
  if (role !== "assistant") return { role, text, before: begin };
  return { role, text, place: end, note: noteOf(more) };
}

/** "14 tokens, 2.00 tokens per draft, exact" */
function noteOf({ usage, metrics, outrider }) {
  const { mean_acceptance_length: length, policy } = metrics?.speculative_decoding ?? {};
  return [
    usage && plural(usage.output_tokens, "token"),
    length && `acceptance length ${length.toFixed(2)}`,
    policy && `policy ${policy}`,
    outrider?.exactness?.mode,
  ]
    .filter(Boolean)
    .join(", ");
}

/** Where a session is: `head` names it there, `place` (in tokens) in its branches too. */
function at({ id, head, n_tokens }) {
  return { id, head, place: n_tokens };
}

/** Conversations that only this page keeps; every turn sends all of it. */
export class Chat {
  kind = "local";

  constructor(about) {
    this.about = about;
  }

  async create() {
    return { id: `local-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`, place: 0 };
  }

  async send(conversation, text, settings, changed, signal) {
    const past = conversation.turns.map(({ role, text }) => ({ role, content: text }));
    const messages = [...past, { role: "user", content: text }];
    const reader = await chat(messages, settings, this.about, changed, signal);
    return { reader, id: conversation.id, place: messages.length + 1 };
  }

  async fork(conversation, place) {
    return { ...(await this.create()), place };
  }

  async rewind(conversation, place) {
    return { place };
  }

  async list() {
    return null;
  }

  async remove() {}
}

/** One stateless answer; what the race runs on too. */
export async function chat(messages, settings, about, changed, signal) {
  const body = {
    model: about.model,
    messages,
    stream: true,
    stream_options: { include_usage: true, ...streamOptions(settings, about) },
    max_tokens: settings.max_tokens,
    ...sampling(settings),
  };
  const reader = new Reader();
  await follow(
    reader,
    events("POST", "/v1/chat/completions", body, signal),
    changed,
    signal,
    false,
  );
  return reader;
}

/** Feeds the reader; a broken connection is taken up again where the server goes on. */
async function follow(reader, stream, changed, signal, may_resume = true) {
  for (let left = MAX_RESUMES; ; left -= 1) {
    try {
      for await (const event of stream) {
        reader.take(event);
        changed(reader);
      }
      if (reader.is_done || !may_resume || !reader.response_id || !left) break;
    } catch (error) {
      const is_network = error instanceof TypeError && reader.response_id;
      if (signal?.aborted || !may_resume || !is_network || !left) throw error;
    }
    stream = resumed(reader, signal);
  }
  if (!reader.is_done) throw new ApiError(0, "the stream broke off before the answer was complete");
}

function resumed(reader, signal) {
  const id = encodeURIComponent(reader.response_id);
  const path = `/v1/responses/${id}?stream=true&starting_after=${reader.last}`;
  return events("GET", path, undefined, signal);
}

function sampling(settings) {
  const found = { temperature: settings.temperature, top_p: settings.top_p };
  if (settings.ignore_eos) found.ignore_eos = true;
  if (settings.seed != null) found.seed = settings.seed;
  if (settings.speculation) found.speculation = settings.speculation;
  return found;
}

/** Only options that this server says it knows. */
function streamOptions(settings, about) {
  const known = about.stream_options;
  const wanted = settings.tail
    ? { visibility: "provisional", min_stability: settings.min_stability, steps: true }
    : { visibility: "verified", steps: true };
  const asked = Object.entries(wanted).filter(([name]) => known.includes(name));
  return asked.length ? { outrider: Object.fromEntries(asked) } : {};
}
