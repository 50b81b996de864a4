// Calls to the server this page came from: JSON, event streams, errors with the server's words.

import { frames } from "./protocol.js";

const KEY = "outrider.key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The parsed answer to one call; ApiError with the server's own message where it refuses. */
export async function call(method, path, body) {
  const answer = await send(method, path, body);
  const text = await answer.text();
  return text ? JSON.parse(text) : {};
}

export async function text(path) {
  return (await send("GET", path)).text();
}

/** Parsed events of a stream, until it ends or `signal` is raised. */
export async function* events(method, path, body, signal) {
  const answer = await send(method, path, body, signal);
  for await (const frame of frames(chunks(answer.body))) {
    if (frame.data === "[DONE]") return;
    yield JSON.parse(frame.data);
  }
}

async function* chunks(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(method, path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const answer = await fetch(path, { method, headers, body: JSON.stringify(body), signal });
  if (!answer.ok) throw new ApiError(answer.status, await reason(answer));
  return answer;
}

async function reason(answer) {
  const text = await answer.text();
  try {
    const { error, detail } = JSON.parse(text);
    return error?.message ?? (typeof detail === "string" ? detail : text);
  } catch {
    return text || `the server answered ${answer.status}`;
  }
}
