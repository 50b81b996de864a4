"""Reading: the chunks of one streamed answer, from whichever server, put together to a reply."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from outrider.bench.target import Acceptance, Ask, Reply

DONE = b"[DONE]"
# Of a chat's delta; names of the thinking part differ between servers.
SPOKEN = ("reasoning_content", "reasoning", "content")


class Lines:
    """Cuts bytes into the data of server-sent events; what is unfinished waits for more."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, piece: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Reading:
    """One answer while it comes.

    Args:
        count_tokens: of a text, where a server counts none itself; None then refuses the answer.
    """

    def __init__(
        self,
        ask: Ask,
        due_s: float,
        sent_s: float,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        self.ask = ask
        self.due_s = due_s
        self.sent_s = sent_s
        self.error = ""
        self._count_tokens = count_tokens
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._chunk_s: list[float] = []
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._finish_reason = ""
        self._usage: Mapping[str, Any] = {}
        self._told: dict[str, Mapping[str, Any]] = {}

    def take(self, data: bytes, now_s: float) -> None:
        """One event's data; the first thing wrong with the stream stays its error."""
        if data == DONE or not data:
            return
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                self.fail(message_of(chunk))
            else:
                self._take(chunk, now_s)
        except (AttributeError, LookupError, TypeError, ValueError):
            self.fail(f"a chunk of no known form: {data[:80]!r}")

    def fail(self, reason: str) -> None:
        self.error = self.error or reason

    def reply(self) -> Reply:
        num_tokens = self._num_tokens()
        if not self._finish_reason:
            self.fail("the stream broke off before its end")
        elif self._finish_reason in ("abort", "error"):
            self.fail(f"ended by {self._finish_reason!r}")
        elif num_tokens is None:
            self.fail("the server does not say how many tokens these were: give a tokenizer")
        details = self._usage.get("prompt_tokens_details") or {}
        timings = self._told.get("timings", {})
        return Reply(
            ask=self.ask,
            due_s=self.due_s,
            sent_s=self.sent_s,
            first_s=self._first_s,
            last_s=self._last_s,
            chunk_s=tuple(self._chunk_s),
            num_prompt_tokens=int(self._usage.get("prompt_tokens") or 0),
            num_cached_tokens=int(details.get("cached_tokens") or timings.get("cache_n") or 0),
            num_tokens=num_tokens or 0,
            token_ids=tuple(self._token_ids) or None,
            text="".join(self._texts),
            finish_reason=self._finish_reason,
            acceptance=acceptance_of(self._told, num_tokens or 0),
            error=self.error,
        )

    def _take(self, chunk: Mapping[str, Any], now_s: float) -> None:
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        for choice in chunk.get("choices") or ():
            self._take_choice(choice, now_s)
            self._keep(choice)
        self._keep(chunk)

    def _keep(self, told: Mapping[str, Any]) -> None:
        for name in ("metrics", "timings", "meta_info"):
            if isinstance(told.get(name), Mapping):
                self._told[name] = told[name]

    def _take_choice(self, choice: Mapping[str, Any], now_s: float) -> None:
        text, ids = said(choice), choice.get("token_ids") or ()
        reason = choice.get("finish_reason")
        self._token_ids += ids
        if text or ids:
            self._texts.append(text)
            self._chunk_s.append(now_s)
        if text or ids or reason:
            self._first_s = now_s if self._first_s is None else self._first_s
            self._last_s = now_s
        if reason:
            self._finish_reason = str(reason)

    def _num_tokens(self) -> int | None:
        told = self._usage.get("completion_tokens")
        if told is None:
            told = self._told.get("timings", {}).get("predicted_n")
        if told is None and self._token_ids:
            told = len(self._token_ids)
        if told is None and self._count_tokens is not None:
            told = self._count_tokens("".join(self._texts))
        return None if told is None else int(told)


def said(choice: Mapping[str, Any]) -> str:
    """Text of a chunk's choice: completions have it plainly, chats in parts, calls included."""
    if choice.get("text"):
        return str(choice["text"])
    delta = choice.get("delta") or {}
    parts = [str(delta[name]) for name in SPOKEN if delta.get(name)]
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        parts += [str(function[key]) for key in ("name", "arguments") if function.get(key)]
    return "".join(parts)


def message_of(told: Any) -> str:
    """What an error says, in one of the shapes that servers give it."""
    inner = told.get("error", told) if isinstance(told, Mapping) else told
    if isinstance(inner, Mapping):
        inner = inner.get("message") or inner.get("detail") or inner
    return str(inner)[:300]


def acceptance_of(told: Mapping[str, Mapping[str, Any]], num_tokens: int) -> Acceptance | None:
    """Of the first source that has it; None where the answer says nothing of drafts."""
    vllm = told.get("metrics", {}).get("speculative_decoding")
    if isinstance(vllm, Mapping):
        return _of_vllm(vllm)
    sglang = told.get("meta_info", {})
    if sglang.get("spec_verify_ct") is not None:
        return _of_sglang(sglang, num_tokens)
    llama_cpp = told.get("timings", {})
    return _of_llama_cpp(llama_cpp, num_tokens) if "draft_n" in llama_cpp else None


def _of_vllm(told: Mapping[str, Any]) -> Acceptance:
    return Acceptance(
        num_drafts=_int(told, "num_spec_steps"),
        num_draft_tokens=_int(told, "num_draft_tokens"),
        num_accepted_tokens=_int(told, "num_accepted_draft_tokens"),
        histogram=tuple(int(count) for count in told.get("acceptance_histogram") or ()),
    )


def _of_sglang(told: Mapping[str, Any], num_tokens: int) -> Acceptance:
    """Each verification emits its bonus token; the prompt's pass emits one token more."""
    num_drafts = _int(told, "spec_verify_ct")
    derived = max(0, num_tokens - 1 - num_drafts)
    return Acceptance(
        num_steps=num_drafts + 1,
        num_drafts=num_drafts,
        num_draft_tokens=_int(told, "spec_draft_token_num", "spec_draft_tokens"),
        num_accepted_tokens=_int(
            told, "spec_accept_token_num", "spec_accepted_tokens", default=derived
        ),
        histogram=tuple(int(count) for count in told.get("spec_accept_histogram") or ()),
    )


def _of_llama_cpp(told: Mapping[str, Any], num_tokens: int) -> Acceptance:
    """Drafts are not counted there: all passes stand for them, so the length is a lower bound."""
    num_accepted = _int(told, "draft_n_accepted")
    num_steps = max(0, _int(told, "predicted_n", default=num_tokens) - num_accepted)
    num_drafted = _int(told, "draft_n")
    return Acceptance(
        num_steps=num_steps,
        num_drafts=num_steps if num_drafted else 0,
        num_draft_tokens=num_drafted,
        num_accepted_tokens=num_accepted,
    )


def _int(told: Mapping[str, Any], *names: str, default: int = 0) -> int:
    """The first of these that is there."""
    return next((int(told[name]) for name in names if told.get(name) is not None), default)
