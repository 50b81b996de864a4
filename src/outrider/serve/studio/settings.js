// The form that says how the next answer is sampled and speculated; one form for chat and race.

import { byId, make, plural } from "./dom.js";

/** Reads the form; fills it from /v1/outrider/methods. */
export class Settings {
  constructor(about, changed) {
    this.about = about;
    this.form = byId("settings");
    this.#fillMethods();
    this.#fillPolicies();
    this.#fillRules();
    this.form.addEventListener("change", (event) => {
      if (event.target.id === "method") this.#methodChanged();
      if (event.target.id === "rule") this.#ruleChanged();
      if (["policy", "draft-tokens", "width"].includes(event.target.id)) this.#policyChanged();
      sayActive(this.read());
      changed();
    });
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.#methodChanged();
    sayActive(this.read());
  }

  /** What `backend.send` takes; numbers are null where the field is empty. */
  read() {
    return {
      temperature: number("temperature") ?? 0,
      top_p: number("top-p") ?? 1,
      max_tokens: number("max-tokens") ?? 128,
      seed: number("seed"),
      tail: byId("tail").checked,
      min_stability: number("stability") ?? 0.8,
      speculation: this.#speculation(),
    };
  }

  /** Says who decided how far to draft in the answer that has just ended. */
  showInForce({ metrics }) {
    const told = metrics?.speculative_decoding;
    if (told?.policy === undefined) return;
    const policy = told.policy ?? "off, nothing could be drafted";
    byId("policy-in-force").textContent = `In force in the last answer: ${policy}.`;
  }

  /** One line for people: "suffix, policy fixed, K 8, rule sampled". */
  describe() {
    const { speculation } = this.read();
    if (speculation?.method === "off") return "off";
    const method = speculation?.method ?? this.about.defaults.method;
    const given = [
      speculation?.policy && `policy ${speculation.policy}`,
      speculation?.num_draft_tokens != null && `K ${speculation.num_draft_tokens}`,
      speculation?.width != null && `width ${speculation.width}`,
      speculation?.verifier && `rule ${speculation.verifier}`,
    ];
    return [method, ...given.filter(Boolean)].join(", ");
  }

  #speculation() {
    const method = byId("method").value;
    const found = {};
    if (method) found.method = method;
    const k = number("draft-tokens");
    const width = number("width");
    if (method !== "off") {
      const policy = byId("policy");
      if (policy.value && !policy.disabled) found.policy = policy.value;
      add(found, "policy_options", options("policy"));
      if (k !== null) found.num_draft_tokens = k;
      if (width !== null) found.width = width;
      if (byId("sample-method").value) found.draft_sample_method = byId("sample-method").value;
      add(found, "drafter_options", options("drafter"));
      const expected = byId("prediction").value;
      if (this.#method()?.needs.includes("prediction") && expected) found.prediction = expected;
    }
    if (byId("rule").value) found.verifier = byId("rule").value;
    add(found, "verifier_options", options("verifier"));
    return Object.keys(found).length ? found : null;
  }

  #method() {
    const name = byId("method").value || this.about.defaults.method;
    return this.about.methods.find((one) => one.name === name);
  }

  #fillMethods() {
    const usual = this.about.defaults.method;
    const choices = this.about.methods.map((one) =>
      make("option", {
        value: one.name,
        disabled: !one.is_here,
        textContent: one.is_here ? one.name : `${one.name} (not here)`,
        title: one.reason ?? "",
      }),
    );
    byId("method").replaceChildren(
      make("option", { value: "", textContent: `${usual} (default)` }),
      make("option", { value: "off", textContent: "off: plain decoding" }),
      ...choices,
    );
  }

  #fillPolicies() {
    const choices = this.about.policies.map(({ name }) =>
      make("option", { value: name, textContent: name }),
    );
    const usual = this.about.defaults.policy;
    byId("policy").replaceChildren(
      make("option", { value: "", textContent: `${usual} (default)` }),
      ...choices,
    );
  }

  #fillRules() {
    const usual = this.about.defaults.rule;
    const kept = byId("rule").value;
    const fitting = this.#method()?.rules;
    const choices = this.about.rules
      .filter((rule) => rule.is_allowed)
      .map((rule) =>
        make("option", {
          value: rule.name,
          textContent: `${rule.name}: ${rule.exactness}${fitting?.includes(rule.name) === false ? " (other drafts)" : ""}`,
        }),
      );
    byId("rule").replaceChildren(
      make("option", { value: "", textContent: `${usual} (default)` }),
      ...choices,
    );
    byId("rule").value = kept;
  }

  #methodChanged() {
    const method = this.#method();
    const is_off = byId("method").value === "off" || !method;
    for (const id of ["policy", "draft-tokens", "width", "sample-method"]) {
      byId(id).disabled = is_off;
    }
    byId("draft-tokens").max = this.about.limits.num_draft_tokens;
    byId("width").placeholder = method ? `${method.width}` : "";
    byId("width").min = method?.min_width ?? 1;
    byId("width").max = method?.max_width ?? 1;
    if (!byId("width").checkValidity()) byId("width").value = "";
    byId("width-note").textContent = widthNote(is_off ? null : method);
    byId("sample-method").replaceChildren(
      make("option", { value: "", textContent: "as the rule prefers" }),
      ...(method?.sample_methods ?? []).map((name) =>
        make("option", { value: name, textContent: name }),
      ),
    );
    byId("prediction-row").hidden = is_off || !method.needs.includes("prediction");
    this.#fillRules();
    fillOptions("drafter", is_off ? {} : method.options);
    byId("method-note").textContent = methodNote(is_off ? null : method);
    this.#policyChanged();
    this.#ruleChanged();
  }

  #policyChanged() {
    const method = this.#method();
    const is_off = byId("method").value === "off" || !method;
    const chosen = byId("policy").value;
    const is_sized = number("draft-tokens") !== null || number("width") !== null;
    const name = chosen || (is_sized ? "fixed" : this.about.defaults.policy);
    const policy = this.about.policies.find((one) => one.name === name);
    if (byId("policy-options").dataset.of !== name || is_off)
      fillOptions("policy", is_off ? {} : (policy?.options ?? {}));
    byId("policy-options").dataset.of = is_off ? "" : name;
    byId("draft-tokens").placeholder = method ? usualK(method, name) : "";
    byId("policy-note").textContent = is_off ? "" : policyNote(name, !chosen && is_sized);
  }

  #ruleChanged() {
    const name = byId("rule").value || this.about.defaults.rule;
    const rule = this.about.rules.find((one) => one.name === name);
    fillOptions("verifier", rule?.options ?? {});
    byId("rule-note").textContent = ruleNote(rule);
  }
}

/** What the folded fields say. */
function sayActive({ temperature, top_p, max_tokens, seed, tail }) {
  const parts = [
    temperature ? `temperature ${temperature}` : "greedy",
    temperature && top_p < 1 && `top p ${top_p}`,
    plural(max_tokens, "token"),
    seed !== null && `seed ${seed}`,
    tail && "tail",
  ];
  byId("sampling-said").textContent = parts.filter(Boolean).join(", ");
}

function number(id) {
  const field = byId(id);
  return field.value === "" || field.disabled || Number.isNaN(field.valueAsNumber)
    ? null
    : field.valueAsNumber;
}

function add(found, name, values) {
  if (Object.keys(values).length) found[name] = values;
}

function widthNote(method) {
  if (!method) return "";
  return method.max_width === 1
    ? "Chains only."
    : `${method.min_width} to ${method.max_width}; 1 is a chain.`;
}

function methodNote(method) {
  if (!method) return "The target alone, one token per step.";
  const needs = method.needs.length ? `Needs ${method.needs.join(", ")}.` : "Needs tokens only.";
  return `${needs} State is rebuilt from ${WARMTH[method.warmth] ?? method.warmth}.`;
}

const WARMTH = {
  R0: "tokens alone (R0)",
  R1: "tokens and draft compute (R1)",
  R2: "hidden states of the target (R2)",
};

const DECIDES = {
  adaptive: "drafts as far as pays now, up to K; nothing where nothing pays.",
  fixed: "drafts K tokens in every step.",
  off: "drafts nothing.",
  table: "takes K from a table, by the number of sequences.",
};

/** "adaptive: drafts as far as pays now, ..." */
function policyNote(name, is_by_size) {
  const why = is_by_size ? " The default where a size is given." : "";
  return `${name}: ${DECIDES[name] ?? "decides how far to draft."}${why}`;
}

const PROMISES = {
  exact: "Exact: the law of the text is the target's, whatever is drafted.",
  "exact-greedy": "Exact at temperature 0: token for token what greedy decoding gives.",
  lossy: "Lossy: trades the target's law for speed.",
  synthetic: "Synthetic: accepts at a set rate; for benchmarks, not for reading.",
};

function ruleNote(rule) {
  if (!rule) return "";
  return `${PROMISES[rule.exactness] ?? ""}${rule.greedy_only ? " Temperature 0 only." : ""}`;
}

const OWNERS = { drafter: "method", policy: "policy", verifier: "rule" };

/** One field per option of a drafter, policy or rule; an empty one keeps the default. */
function fillOptions(kind, known) {
  const rows = Object.entries(known).map(([name, about]) => {
    const id = `${kind}-${name}`;
    const note = make("small", { id: `${id}-note`, textContent: about.meaning });
    const field = optionField(id, name, about);
    field.setAttribute("aria-describedby", note.id);
    return make(
      "div",
      { className: "field" },
      make("label", { htmlFor: id, textContent: name }),
      field,
      note,
    );
  });
  byId(`${kind}-options`).replaceChildren(...rows);
  byId(`${kind}-options-box`).hidden = !rows.length;
  byId(`${kind}-options-title`).textContent =
    `${plural(rows.length, "option")} of the ${OWNERS[kind]}`;
}

function optionField(id, name, about) {
  const common = { id, name, className: `${kindOf(id)}-option` };
  if (about.choices.length || typeof about.default === "boolean") {
    const values = about.choices.length ? about.choices : ["true", "false"];
    const usual = make("option", { value: "", textContent: `default (${about.default})` });
    const field = make(
      "select",
      common,
      usual,
      ...values.map((v) => make("option", { value: v, textContent: v })),
    );
    field.dataset.type = typeof about.default;
    return field;
  }
  const is_number = typeof about.default === "number";
  const field = make("input", {
    ...common,
    type: is_number ? "number" : "text",
    placeholder: `${about.default}`,
  });
  if (is_number) {
    field.step = "any";
    if (about.low !== null) field.min = about.low;
    if (about.high !== null) field.max = about.high;
  }
  field.dataset.type = typeof about.default;
  return field;
}

function kindOf(id) {
  return id.split("-")[0];
}

function options(kind) {
  const found = {};
  for (const field of document.querySelectorAll(`.${kind}-option`)) {
    if (field.value === "") continue;
    const read = { number: Number, boolean: (text) => text === "true", string: String };
    found[field.name] = read[field.dataset.type](field.value);
  }
  return found;
}

/** What stands for K where nothing is asked for: a number, or the name of who decides. */
function usualK(method, policy) {
  return policy !== "fixed" ? policy : `${method.num_draft_tokens}`;
}
