"""Constrained output: which tokens keep it valid, after the committed tokens and along any path.

Shape legend: V vocabulary.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from outrider.errors import RequestError
from outrider.request import SamplingParams

_CACHE_BYTES = 256 * 2**20
MAX_WHITESPACE = 24  # between two parts of a JSON text; a weak model would never stop


@runtime_checkable
class ByteVocabulary(Protocol):
    """A tokenizer that knows the bytes each token stands for."""

    def token_bytes(self) -> Sequence[bytes]:
        """Per token id its bytes; b"" for special tokens, which no grammar allows."""
        ...


class GrammarCompiler:
    """Compiles requests' schemas, regular expressions and grammars for one model; made once.

    xgrammar is loaded at the first constrained request. Compiled grammars are kept by their
    text, up to 256 MiB.

    Args:
        tokenizer: a fast tokenizer of transformers, or a `ByteVocabulary`.
        vocab_size: width of the model's logits; padding beyond the tokenizer is never allowed.
        eos_token_ids: what may follow a complete output.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)

    def compile(self, sampling: SamplingParams) -> "GrammarState":
        """The state before the first token of a constrained request.

        Raises:
            RequestError: the constraint does not compile, or the model has no end of sequence.
        """
        if not self._eos_token_ids:
            raise RequestError(f"{_named(sampling)}: this model has no end-of-sequence token")
        with _request_errors(f"{_named(sampling)} does not compile"):
            matcher = self._xgrammar.GrammarMatcher(self._compiled(sampling))
        return GrammarState(matcher, self._ends, self._usable)

    def _compiled(self, sampling: SamplingParams) -> Any:
        if sampling.regex is not None:
            return self._compiler.compile_regex(sampling.regex)
        if sampling.grammar is not None:
            return self._compiler.compile_grammar(sampling.grammar)
        schema = sampling.json_schema
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return self._compiler.compile_json_schema(text, max_whitespace_cnt=MAX_WHITESPACE)

    @cached_property
    def _xgrammar(self) -> Any:
        import xgrammar

        return xgrammar

    @cached_property
    def _compiler(self) -> Any:
        return self._xgrammar.GrammarCompiler(self._vocabulary(), cache_limit_bytes=_CACHE_BYTES)

    def _vocabulary(self) -> Any:
        ends = list(self._eos_token_ids)
        if not isinstance(self._tokenizer, ByteVocabulary):
            return self._xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=ends
            )
        return self._xgrammar.TokenizerInfo(
            list(self._tokenizer.token_bytes())[: self._vocab_size],
            self._xgrammar.VocabType.RAW,
            vocab_size=self._vocab_size,
            stop_token_ids=ends,
        )

    @cached_property
    def _ends(self) -> Tensor:
        return _at(self._vocab_size, self._eos_token_ids)

    @cached_property
    def _usable(self) -> Tensor:
        """All but special tokens: xgrammar takes them for their text, "<pad>" for five letters."""
        special = getattr(self._tokenizer, "all_special_ids", ())
        special_V = _at(self._vocab_size, [i for i in special if i < self._vocab_size])
        return ~special_V | self._ends


class GrammarState:
    """How far one constrained output has come; moved by the committer only.

    A complete output may only be followed by end-of-sequence tokens.

    Attributes:
        tokens: those committed so far; replaying them through `advance` restores the state.
    """

    def __init__(self, matcher: Any, ends_V: Tensor, usable_V: Tensor) -> None:
        self.tokens: list[int] = []
        self._matcher = matcher
        self._ends_V = ends_V
        self._usable_V = usable_V

    @property
    def is_finished(self) -> bool:
        """Whether the end of sequence was committed after a complete output."""
        return bool(self._matcher.is_terminated())

    def mask(self, path_tokens: Sequence[int] = ()) -> Tensor | None:
        """Tokens allowed [V] after the committed ones and this path; None if all are.

        After a path that is itself forbidden nothing is.
        """
        with _request_errors("the grammar failed"), self._after(path_tokens) as is_allowed:
            if not is_allowed:
                return torch.zeros_like(self._ends_V)
            if self._matcher.is_terminated():
                return self._ends_V
            return self._next_tokens()

    def advance(self, tokens: Sequence[int]) -> None:
        """Commits tokens that masks allowed, each once."""
        with _request_errors("the grammar failed"):
            for token in tokens:
                is_allowed = self._accept(token) is not None
                assert is_allowed, f"token {token} was committed against the grammar"
        self.tokens.extend(tokens)

    def clone(self) -> "GrammarState":
        """An independent state at the same point, for n > 1 and forks."""
        state = GrammarState(self._matcher.fork(), self._ends_V, self._usable_V)
        state.tokens = list(self.tokens)
        return state

    @contextmanager
    def _after(self, path: Sequence[int]) -> Iterator[bool]:
        """Whether the path is allowed, with the matcher at its end; then the walk is undone."""
        num_steps, is_allowed = 0, True
        try:
            for token in path:
                steps = self._accept(token)
                if steps is None:
                    is_allowed = False
                    break
                num_steps += steps
            yield is_allowed
        finally:
            self._matcher.rollback(num_steps)

    def _accept(self, token: int) -> int | None:
        """Steps the matcher took for the token: none after the end of sequence; None: forbidden."""
        if self._matcher.is_terminated():
            return 0 if self._ends_V[token] else None
        return 1 if self._usable_V[token] and self._matcher.accept_token(token) else None

    def _next_tokens(self) -> Tensor | None:
        words = torch.full(((len(self._ends_V) + 31) // 32,), -1, dtype=torch.int32)
        if not self._matcher.fill_next_token_bitmask(words) and bool(self._usable_V.all()):
            return None
        bits = np.unpackbits(
            words.numpy().view(np.uint8), count=len(self._ends_V), bitorder="little"
        )
        return torch.from_numpy(bits.view(np.bool_)) & self._usable_V


@contextmanager
def _request_errors(what: str) -> Iterator[None]:
    """An exception inside xgrammar fails the one request, in one line."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        reason = re.sub(r"^\[[\d:]+\] \S+ ", "", " ".join(str(error).split()))  # time, C++ line
        raise RequestError(f"{what}: {reason}") from error


def _at(vocab_size: int, tokens: Sequence[int]) -> Tensor:
    is_one_V = torch.zeros(vocab_size, dtype=torch.bool)
    is_one_V[list(tokens)] = True
    return is_one_V


def _named(sampling: SamplingParams) -> str:
    """The constraint as it was asked for, cut to a line."""
    for name in ("json_schema", "regex", "grammar"):
        value = getattr(sampling, name)
        if value is not None:
            text = " ".join(str(value).split())
            return f"{name}={text[:80]!r}" + ("..." if len(text) > 80 else "")
    raise AssertionError("compile is for constrained requests")
