// outrider-stream/1 on the client's side: SSE frames, and a Reader that knows what is committed.

/** Frames of an SSE body as {event, id, data}; `chunks` is any async iterable of texts. */
export async function* frames(chunks) {
  let rest = "";
  for await (const chunk of chunks) {
    rest += chunk;
    const ended = rest.endsWith("\r"); // half of a line break, perhaps
    const text = (ended ? rest.slice(0, -1) : rest).replace(/\r\n?/g, "\n");
    const parts = text.split("\n\n");
    rest = parts.pop() + (ended ? "\r" : "");
    for (const part of parts) {
      const frame = parse(part);
      if (frame.data !== "") yield frame;
    }
  }
}

function parse(part) {
  const frame = { event: "", id: "", data: "" };
  const data = [];
  for (const line of part.split("\n")) {
    const at = line.indexOf(":");
    if (at <= 0) continue; // a comment, or a field without a value
    const name = line.slice(0, at);
    const value = line.slice(at + 1).replace(/^ /, "");
    if (name === "data") data.push(value);
    else if (name === "event" || name === "id") frame[name] = value;
  }
  frame.data = data.join("\n");
  return frame;
}

const ENDS = ["response.completed", "response.incomplete", "response.failed", "response.cancelled"];

/**
 * One answer as it arrives, from either dialect.
 *
 * committed: text that is final; it only grows.   tail: what is expected to follow, or "".
 * steps: {text, tokens, accepted, num_drafted, source, without_text?, tree?} of each commit; tokens
 * is null where the server says no more than the text.
 */
export class Reader {
  committed = "";
  tail = "";
  stability = null;
  steps = [];
  num_tails = 0;
  is_done = false;
  error = "";
  finish = "";
  response_id = "";
  last = -1; // sequence_number of the last durable event
  version = -1;
  usage = null;
  metrics = null;
  exactness = null;
  session = null;
  stream = null;

  /** Takes one parsed event of the Responses dialect or one chunk of Chat Completions. */
  take(event) {
    if ("choices" in event) this.#chunk(event);
    else if ("sequence_number" in event) this.#durable(event);
    else if (event.type === "outrider:output_text.tail" && event.base === this.last) {
      this.#provisional(event);
    } else if ("error" in event) this.#fail(event.error);
  }

  #durable(event) {
    if (event.sequence_number <= this.last) return; // replayed after a broken connection
    this.last = event.sequence_number;
    this.#void();
    if (event.type === "response.output_text.delta") {
      this.#commit(event.delta, event.outrider?.step);
    } else if (event.type === "error") {
      this.#fail(event.error ?? event);
    }
    if (event.response) this.#about(event.response);
    if (ENDS.includes(event.type)) this.#end(event.response, event.type);
  }

  #chunk(chunk) {
    const choice = chunk.choices[0];
    const text = choice?.delta?.content ?? "";
    if (text !== "" || choice?.finish_reason) this.#void();
    this.#commit(text, chunk.outrider?.step);
    if (choice?.finish_reason) {
      this.finish = choice.finish_reason;
      this.is_done = true;
    }
    this.#about(chunk);
    const tail = chunk.outrider?.tail;
    if (tail && !this.is_done && tail.committed_chars === [...this.committed].length) {
      this.#provisional(tail);
    }
  }

  #provisional(tail) {
    if (tail.v <= this.version || this.is_done) return;
    this.version = tail.v;
    this.tail = tail.text;
    this.stability = tail.stability ?? null;
    this.num_tails += 1;
  }

  #commit(text, step) {
    if (text === "" && !step) return;
    this.committed += text;
    this.steps.push({ text, tokens: null, accepted: 0, num_drafted: 0, source: "", ...step });
  }

  #void() {
    this.tail = "";
    this.stability = null;
  }

  #about(part) {
    if (typeof part.id === "string") this.response_id = part.id;
    this.usage = part.usage ?? this.usage;
    this.metrics = part.metrics ?? this.metrics;
    this.exactness = part.outrider?.exactness ?? this.exactness;
    this.session = part.outrider?.session ?? this.session;
    this.stream = part.outrider?.stream ?? this.stream;
  }

  #end(response, type) {
    this.is_done = true;
    this.finish = response?.incomplete_details?.reason ?? response?.status ?? type.split(".")[1];
    if (response?.error) this.#fail(response.error);
  }

  #fail(error) {
    this.#void();
    this.is_done = true;
    this.finish = "error";
    this.error =
      typeof error === "string" ? error : (error?.message ?? "the server gave no reason");
  }
}

/**
 * What became of each token of a step: "accepted" was drafted and stands; "corrected" replaces a
 * draft that did not; "bonus" follows a draft that stood whole; "plain" was not drafted at all.
 */
export function kinds(step) {
  const tokens = step.tokens ?? [];
  return tokens.map((_, i) => {
    if (i < step.accepted) return "accepted";
    if (!step.num_drafted) return "plain";
    return stoodWhole(step) ? "bonus" : "corrected";
  });
}

/** One token of a step as it reads alone: what has no text in the stream has a name, or bytes. */
export function alone(step, i) {
  return step.tokens[i] || (step.without_text?.[i] ?? "");
}

function stoodWhole(step) {
  if (!step.tree) return step.accepted >= step.num_drafted;
  const path = step.tree.accepted;
  const end = path.length ? path[path.length - 1] : -1;
  return !step.tree.parents.includes(end);
}

/** Longest path of a step's draft: K, as far as the step tells. */
export function depth(step) {
  if (!step.tree) return step.num_drafted;
  const depths = [];
  for (const parent of step.tree.parents) depths.push(parent < 0 ? 1 : depths[parent] + 1);
  return Math.max(0, ...depths);
}
