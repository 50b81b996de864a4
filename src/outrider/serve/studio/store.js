// Conversations as this browser remembers them: text and heads; the server keeps the token logs.

const NAME = "outrider.conversations";

/**
 * conversation: {id, title, head, place, turns, kind}; kind is "session" or "local".
 * turn: {role, text, before?, place?, steps?, note?}; where the log stood before and after it.
 */
export class Store {
  #all = load();

  all() {
    return this.#all;
  }

  get(id) {
    return this.#all.find((one) => one.id === id);
  }

  add(conversation) {
    this.#all.unshift(conversation);
    this.save();
    return conversation;
  }

  remove(id) {
    this.#all = this.#all.filter((one) => one.id !== id);
    this.save();
  }

  /** When the browser's space is short, marks of old answers go first, then old conversations. */
  save() {
    for (let kept = this.#all; ; kept = lighter(kept)) {
      try {
        localStorage.setItem(NAME, JSON.stringify(kept));
        return;
      } catch (error) {
        if (!kept.length) throw error;
      }
    }
  }
}

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(NAME) ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

function lighter(conversations) {
  const marked = conversations.some((one) => one.turns.some((turn) => turn.steps));
  if (!marked) return conversations.slice(0, -1);
  const bare = ({ steps, ...turn }) => turn;
  return conversations.map((one) => ({ ...one, turns: one.turns.map(bare) }));
}
