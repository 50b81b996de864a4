"""Layouts: what rows of known data sets look like, and the prompt that each row holds."""

from collections.abc import Callable, Mapping, Sequence as Items
from typing import Any, NamedTuple, TypeAlias

from outrider.engine.prompts import Prompt
from outrider.errors import ConfigError

Row: TypeAlias = Mapping[str, Any]

# What stands where a published file withholds a text that its makers may not pass on.
WITHHELD = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"


class Read(NamedTuple):
    """What one row says.

    Attributes:
        id: as the row tells it, "" for none.
        prompt: a text to go on from, or messages to answer.
        answer: the recorded answer, whose length may bound ours; "" for none.
    """

    prompt: Prompt
    id: str = ""
    domain: str = ""
    answer: str = ""
    max_tokens: int | None = None


class Layout(NamedTuple):
    """One shape of rows.

    Attributes:
        keys: alternatives; a row has this layout when it holds every key of one of them.
        read: raises `Unusable` where a row holds no prompt.
        licence: of the data set that has this layout, "" where it is the user's own.
        note: what a reader of the numbers has to know; "" for nothing.
    """

    name: str
    keys: Items[frozenset[str]]
    read: Callable[[Row], Read]
    licence: str = ""
    note: str = ""

    def fits(self, row: Row) -> bool:
        return any(keys <= row.keys() for keys in self.keys)


class Unusable(ValueError):  # noqa: N818
    """A row without a prompt; the message is the reason, the same for all rows of its kind."""


def layout_of(rows: Items[Any], name: str) -> Layout:
    """The first layout that fits the first row that is an object.

    Raises:
        ConfigError: none fits, or the file holds lengths without text.
    """
    first = next((row for row in rows if isinstance(row, Mapping)), None)
    if first is None:
        raise ConfigError(f'{name!r} holds no objects: give rows like {{"prompt": "..."}}')
    for keys in TRACES:
        if keys <= first.keys():
            raise ConfigError(
                f"{name!r} is a trace of lengths without text: use it for arrivals "
                "(`outrider bench load --trace`), and give prompts beside it"
            )
    for layout in LAYOUTS:
        if layout.fits(first):
            return layout
    raise ConfigError(
        f"{name!r} has rows of an unknown layout, keys {', '.join(sorted(map(str, first)))}: "
        f'rename one to "prompt" or "messages" (known: {", ".join(one.name for one in LAYOUTS)})'
    )


def user(text: Any) -> Prompt:
    """A conversation that begins with this text."""
    return [{"role": "user", "content": _said(text)}]


def as_text(prompt: Prompt) -> Prompt:
    """Messages as one text, for models without a chat template; texts and ids as they are."""
    if isinstance(prompt, str) or not all(isinstance(item, Mapping) for item in prompt):
        return prompt
    messages = [item for item in prompt if isinstance(item, Mapping)]
    if len(messages) == 1:
        return str(messages[0]["content"])
    said = [f"{str(m['role']).capitalize()}: {m['content']}" for m in messages]
    return "\n\n".join([*said, "Assistant:"])


def _turns(row: Row) -> Read:
    """The first turn: later ones answer to an answer that is not there."""
    turns = row.get("turns")
    if not turns:
        return _messages(row)._replace(domain=_domain(row), id=_id(row))
    first = turns[0] if not isinstance(turns[0], Mapping) else turns[0].get("content")
    return Read(user(first), id=_id(row), domain=_domain(row))


def _messages(row: Row) -> Read:
    """The conversation up to the last thing that the user said; what follows is the answer."""
    body = row.get("body")
    held = body if isinstance(body, Mapping) else row
    messages = list(held.get("messages") or ())
    ends = [at for at, m in enumerate(messages) if m.get("role") in ("user", "tool")]
    if not ends:
        raise Unusable("no message of the user")
    kept, rest = messages[: ends[-1] + 1], messages[ends[-1] + 1 :]
    if any(message.get("tool_calls") or message["role"] == "tool" for message in kept):
        raise Unusable("calls of tools in the conversation")
    limit = held.get("max_completion_tokens", held.get("max_tokens"))
    return Read(
        [{"role": str(m["role"]), "content": _said(m.get("content"))} for m in kept],
        id=_id(row),
        domain=_domain(row),
        answer=_content(rest[0].get("content")) if rest else "",
        max_tokens=limit if isinstance(limit, int) else None,
    )


def _sharegpt(row: Row) -> Read:
    """The first exchange: what is commonly measured, and alike in length among conversations."""
    said = [turn for turn in row["conversations"] if turn.get("from") != "system"]
    if not said or said[0].get("from") not in ("human", "user"):
        raise Unusable("a conversation that the user does not begin")
    answer = _content(said[1].get("value")) if len(said) > 1 else ""
    return Read(user(said[0].get("value")), id=_id(row), answer=answer)


def _tree(row: Row) -> Read:
    """A tree of replies: its root."""
    return Read(user(row["prompt"]["text"]), id=str(row["message_tree_id"]))


def _mbpp(row: Row) -> Read:
    tests = "\n".join(row["test_list"])
    return Read(user(f"{_said(row['text'])}\nIt has to pass:\n{tests}"), id=_id(row), domain="code")


def _humaneval(row: Row) -> Read:
    """The head of a function, to go on from."""
    return Read(_said(row["prompt"]), id=_id(row), domain="code", answer=row["canonical_solution"])


def _question(row: Row) -> Read:
    """With what is to be read before it, if anything."""
    context = row.get("context") or row.get("passage") or ""
    asked = _said(row.get("question"))
    answer = row.get("answer") or row.get("ground_truth") or row.get("query")
    return Read(
        user(f"{context}\n\n{asked}" if context else asked),
        id=_id(row),
        domain=_domain(row),
        answer=answer if isinstance(answer, str) else "",
    )


def _longbench(row: Row) -> Read:
    return Read(
        user("\n\n".join(filter(None, (_content(row["context"]), _content(row["input"]))))),
        id=_id(row),
        domain=_domain(row),
    )


def _instruction(row: Row) -> Read:
    given = row.get("input") or ""
    asked = _said(row["instruction"])
    return Read(
        user(f"{asked}\n\n{given}" if given else asked),
        id=_id(row),
        domain=_domain(row),
        answer=_content(row.get("output")),
    )


def _prompt(row: Row) -> Read:
    """Text, token ids or messages, whatever "prompt" or "text" holds."""
    held = row.get("prompt", row.get("text"))
    answer = row.get("output", row.get("response", row.get("completion")))
    limit = row.get("max_tokens", row.get("output_tokens"))
    return Read(
        _any_prompt(held),
        id=_id(row),
        domain=_domain(row),
        answer=answer if isinstance(answer, str) else "",
        max_tokens=int(limit) if limit is not None and str(limit).isdigit() else None,
    )


def _any_prompt(held: Any) -> Prompt:
    if isinstance(held, list) and held and all(isinstance(item, int) for item in held):
        return list(held)
    if isinstance(held, list) and held and all(isinstance(item, Mapping) for item in held):
        return _messages({"messages": held}).prompt
    return _said(held)


def _id(row: Row) -> str:
    names = ("id", "question_id", "task_id", "custom_id", "_id")
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")


def _domain(row: Row) -> str:
    names = ("domain", "category", "query_category", "dataset", "task", "subject")
    return next((row[name] for name in names if isinstance(row.get(name), str)), "")


def _said(value: Any) -> str:
    """A text that is there."""
    text = _content(value)
    if not text.strip():
        raise Unusable("an empty prompt")
    if text.startswith(WITHHELD):
        raise Unusable("a placeholder for text that the data set's own preparation has to fetch")
    return text


def _content(value: Any) -> str:
    """Of a message: a text, or parts that must all be text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Unusable(f"a prompt of type {type(value).__name__}")
    if any(not isinstance(part, Mapping) or "text" not in part for part in value):
        raise Unusable("parts that are no text (images, sound)")
    return "".join(str(part["text"]) for part in value)


def _keys(*alternatives: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in alternatives)


FIRST_TURN = "of several turns the first is asked; later ones answer to an answer"

# Lengths only: vLLM's and SGLang's kind of replay (Mooncake, Azure, BurstGPT, Vidur).
TRACES = _keys(
    "timestamp input_length output_length",
    "TIMESTAMP ContextTokens GeneratedTokens",
    "Timestamp Model",
    "num_prefill_tokens num_decode_tokens",
)

# The first that fits, so the particular come before the general.
LAYOUTS = (
    Layout(
        "speed_bench",
        _keys("category sub_category turns", "category sub_category messages"),
        _turns,
        "NVIDIA Evaluation Dataset License: for evaluation only, not to be passed on",
        FIRST_TURN,
    ),
    Layout(
        "spec_bench",
        _keys("question_id category turns"),
        _turns,
        "of whoever wrote this file; the published Spec-Bench and MT-bench are Apache-2.0",
        FIRST_TURN,
    ),
    Layout("messages", _keys("messages", "body custom_id"), _messages),
    Layout(
        "sharegpt",
        _keys("conversations"),
        _sharegpt,
        "of whoever collected the conversations; look it up before passing anything on",
        "the first exchange of each conversation",
    ),
    Layout("oasst_tree", _keys("message_tree_id prompt"), _tree, "Apache-2.0 (OpenAssistant)"),
    Layout("mbpp", _keys("text code test_list"), _mbpp, "CC-BY-4.0 (MBPP)"),
    Layout(
        "humaneval",
        _keys("prompt canonical_solution entry_point"),
        _humaneval,
        "MIT (HumanEval)",
        "heads of functions to go on from: no chat template",
    ),
    Layout("longbench", _keys("context input answers"), _longbench, "MIT (LongBench)"),
    Layout("question", _keys("question"), _question),
    Layout("instruction", _keys("instruction"), _instruction),
    Layout("prompt", _keys("prompt", "text"), _prompt),
    Layout("turns", _keys("turns"), _turns, "", FIRST_TURN),
)
