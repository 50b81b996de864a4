"""A draft model with another vocabulary: its drafts are translated, as tokens or as text.

Timor et al. 2025, "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for
Heterogeneous Vocabularies": token-level intersection and string-level exact
match.

Shape legend: D ids of the draft model, T ids of the target.
"""

import logging
import math
from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from torch import Tensor

from outrider.cache.table import BlockManager, BlockTable
from outrider.draft.base import ModelParts, Snapshot, Surroundings, Warmth
from outrider.draft.drawing import draft_law, draft_stream
from outrider.draft.retokenize import DraftLog, TextLog, TokenLog, common_length, whole_characters
from outrider.draft.vocabulary_map import Dialect, VocabularyMap
from outrider.draft.warm import PrefixCache
from outrider.errors import ConfigError, TokenizerError
from outrider.models.runner import Piece, Runner
from outrider.request import MAX_DRAFT_TOKENS, Option, Options
from outrider.sampling.rng import Stream
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, TargetOutput

MAX_CATCH_UP_TOKENS = 2048
FEW_COMMON_TOKENS = 100
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class DraftState:
    """One sequence as the draft model sees it.

    Attributes:
        cached: the draft ids whose KV the table holds, drafts of the last step included.
    """

    log: DraftLog
    table: BlockTable
    cached: list[int]


class Course(Protocol):
    """One row while it is being drafted; `drafted` are draft ids."""

    state: DraftState
    drafted: list[int]

    @property
    def is_done(self) -> bool: ...

    def take(self, logits_D: Tensor, argmax: int) -> None:
        """Goes one token further, or ends."""
        ...

    def tree(self, source: str) -> DraftTree: ...


class Way(Protocol):
    """How drafts get from one vocabulary into the other.

    Attributes:
        sample_methods: how the draft model may choose.
    """

    @property
    def sample_methods(self) -> tuple[str, ...]: ...

    def log(self) -> DraftLog: ...

    def num_steps(self, log: DraftLog, depth: int) -> int:
        """Most draft tokens that are drafted for `depth` of the target's."""
        ...

    def course(self, seq: Sequence, state: DraftState, depth: int) -> Course: ...


class TranslateDrafter:
    """Chains from a draft model of another vocabulary; the output law is the target's all the same.

    Option "by" says how they are translated:

    - "tokens": the draft model draws from the tokens that both vocabularies have, all others
      masked before the softmax. Drafts are the target's tokens, drawn from a law over its
      vocabulary, shaped like the target's own; the methods are those of `draft_model`.
    - "strings": it drafts its most likely tokens, whose text is encoded anew with the target's
      tokenizer and proposed as it stands. Text has no law, so "greedy" is all it can do.
    - "auto": tokens where at least 100 are common and they are half of either vocabulary or more;
      else strings. A draft model of letters loses no token to a target of words, but could never
      say a word of it.

    Args:
        runner: the draft model; `manager` hands out the blocks of its pool.
        ways: by the name of the option, "auto" among them.
    """

    name = "translate"
    needs: tuple[str, ...] = ("draft model of another vocabulary",)
    warmth = Warmth.R1
    default_draft_tokens = 4
    default_width = min_width = max_width = 1
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy", "probabilistic", "coupled")  # by tokens
    options: Mapping[str, Option] = {
        "by": Option(
            "auto",
            "translate drafts token by token, or as text encoded anew",
            choices=("auto", "tokens", "strings"),
        )
    }

    def __init__(self, runner: Runner, manager: BlockManager, ways: Mapping[str, Way]) -> None:
        self.runner = runner
        self.manager = manager
        self.ways = ways
        self.num_forwards = 0

    @classmethod
    def build(cls, surroundings: Surroundings) -> "TranslateDrafter":
        """ConfigError without a draft model, or without the tokenizers of both models."""
        draft = surroundings.draft
        if draft is None:
            raise ConfigError("drafter 'translate' needs a draft model: give draft_model=...")
        target_dialect = _dialect(surroundings.target, "model")
        draft_dialect = _dialect(draft, "draft model")
        device = draft.runner.network.spec.device
        words = VocabularyMap.between(draft_dialect, target_dialect, device)
        tokens: Way = Tokens(target_dialect, draft_dialect, words)
        strings: Way = Strings(target_dialect, draft_dialect)
        usual = tokens if _is_close(words, draft_dialect, target_dialect) else strings
        ways = {"auto": usual, "tokens": tokens, "strings": strings}
        return cls(draft.runner, draft.manager, ways)

    def sample_methods_for(self, options: Options) -> tuple[str, ...]:
        return self.ways[str(options["by"])].sample_methods

    def open(self, seq: Sequence) -> None:
        """Costs nothing: text is read and blocks are taken when the first draft is asked for."""

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        planned = zip(rows, plan, strict=True)
        courses = [self._start(row.seq, min(part.depth, part.num_nodes)) for row, part in planned]
        active = [course for course in courses if course is not None and not course.is_done]
        while active:
            self._advance(active)
            active = [course for course in active if not course.is_done]
        return [course.tree(self.name) if course else EMPTY_TREE for course in courses]

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Nothing to do before the next draft, which reads the token log."""

    def close(self, seq: Sequence) -> None:
        state = seq.drafter_state.pop(self.name, None)
        if isinstance(state, DraftState):
            self.manager.free(state.table)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        """None: the draft model runs over the token log again."""
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        return 0

    def prefix_cache(self, tokens: Items[int]) -> PrefixCache:
        """By the usual way; one that a request chose otherwise has blocks of other names."""
        log = self.ways["auto"].log()
        log.follow(tokens)
        settled = log.tokens[: log.num_settled]
        return PrefixCache(self.runner, self.manager, settled, len(log.tokens) - len(settled))

    def _start(self, seq: Sequence, depth: int) -> Course | None:
        """None where the draft model has no room, or no text yet: the row is decoded plainly."""
        if depth < 1:
            return None
        way = self.ways[str(seq.speculation.options["by"])]
        state = seq.drafter_state.get(self.name) or self._open_state(seq, way)
        self._settle(state, seq.tokens)
        log = state.log
        end = len(log.tokens) + way.num_steps(log, depth) - 1
        if not log.tokens or end > self.runner.network.spec.max_positions:
            return None
        if not self.manager.reserve(state.table, end):
            return None
        return way.course(seq, state, depth)

    def _open_state(self, seq: Sequence, way: Way) -> DraftState:
        log = way.log()
        log.follow(seq.tokens)
        table, num_cached = self.manager.open(log.tokens[: log.num_settled], seq.request.tenant)
        state = DraftState(log, table, log.tokens[:num_cached])
        seq.drafter_state[self.name] = state
        return state

    def _settle(self, state: DraftState, tokens: Items[int]) -> None:
        """Reads what was committed and keeps KV up to the first draft id that differs from it.

        The last id is run again for its logits, so its KV is not counted; nor is the last settled
        one entered into the prefix tree, which may be that one.
        """
        log, cached = state.log, state.cached
        num_kept = log.follow(tokens)
        del cached[min(common_length(cached, log.tokens, num_kept), len(log.tokens) - 1) :]
        self.manager.commit(state.table, log.tokens, min(len(cached), log.num_settled - 1))

    def _advance(self, courses: list[Course]) -> None:
        """One pass: what each course has not run yet, as far as the budget goes."""
        budget, pieces = MAX_CATCH_UP_TOKENS, []
        for course in courses:
            piece = _piece(course, budget)
            budget -= len(piece.chain)
            pieces.append(piece)
            if budget < 1:
                break
        output = self.runner.run(pieces)
        self.num_forwards += 1
        for course, piece, row in zip(courses, pieces, output.first, strict=False):
            course.state.cached += piece.chain
            if row >= 0:
                course.take(output.logits_NV[row], output.argmax_N[row])


class Tokens:
    """Token-level intersection: one draft step is one token of the target."""

    sample_methods = ("greedy", "probabilistic", "coupled")

    def __init__(self, target: Dialect, draft: Dialect, words: VocabularyMap) -> None:
        self.words = words
        self._target = target
        self._draft = draft
        self._spell = cache(self._ids_of)
        self._id_of = {
            data: token for token, data in enumerate(draft.spellings) if data and len(data) == 1
        }

    def log(self) -> DraftLog:
        return TokenLog(self._draft.opening, self._spell)

    def num_steps(self, log: DraftLog, depth: int) -> int:
        return depth

    def course(self, seq: Sequence, state: DraftState, depth: int) -> Course:
        asked = seq.speculation.draft_sample_method
        stream = draft_stream(seq, asked if asked in self.sample_methods else "greedy")
        return TokenCourse(seq, state, depth, self.words, stream)

    def _ids_of(self, token: int) -> tuple[int, ...]:
        """Draft ids that stand for one target id: its equal, or else its text, or its bytes."""
        own = self.words.target_to_draft[token]
        if own >= 0:
            return (own,)
        data = self._target.bytes_of(token)
        try:
            return tuple(self._draft.go_on(data.decode())) if data else ()
        except UnicodeDecodeError:
            singles = (data[i : i + 1] for i in range(len(data)))
            return tuple(self._id_of[byte] for byte in singles if byte in self._id_of)


class Strings:
    """String-level exact match: drafted text, encoded anew."""

    sample_methods = ("greedy",)

    def __init__(self, target: Dialect, draft: Dialect) -> None:
        self.target = target
        self.draft = draft

    def log(self) -> DraftLog:
        return TextLog(self.target, self.draft)

    def num_steps(self, log: DraftLog, depth: int) -> int:
        """As many as this text took per token so far, and one to settle the last token."""
        ratio = len(log.tokens) / max(1, log.num_covered)
        return min(math.ceil(depth * ratio) + 1, 2 * MAX_DRAFT_TOKENS)

    def course(self, seq: Sequence, state: DraftState, depth: int) -> Course:
        assert isinstance(state.log, TextLog), "the way of a sequence does not change"
        return StringCourse(state, state.log, depth, self.num_steps(state.log, depth), self)


@dataclass(eq=False)
class TokenCourse:
    """Drafts target ids from the draft law over the common tokens.

    Attributes:
        stream: what tokens are drawn from; None picks the argmax.
        laws: [T] of the drafted tokens where they are recorded, else empty.
    """

    seq: Sequence
    state: DraftState
    depth: int
    words: VocabularyMap
    stream: Stream | None
    tokens: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    laws: list[Tensor | None] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.depth

    def take(self, logits_D: Tensor, argmax: int) -> None:
        token = self._next(self.words.translate(logits_D)) if argmax >= 0 else -1
        own = self.words.target_to_draft[token] if token >= 0 else -1
        if own < 0:
            self.depth = len(self.tokens)  # nothing to propose; the target's law decides
            return
        self.tokens.append(token)
        self.drafted.append(own)

    def tree(self, source: str) -> DraftTree:
        return DraftTree.chain(self.tokens, source, self.laws)

    def _next(self, logits_T: Tensor) -> int:
        """By the law that the request's settings make of the logits; -1 where they leave none."""
        seq = self.seq
        if self.stream is None and seq.shaper.is_plain_greedy:
            return int(logits_T.argmax())
        q_T = draft_law(seq, logits_T, self.tokens)
        if q_T is None:
            return -1
        if self.stream is None:
            return int(q_T.argmax())
        if seq.speculation.draft_sample_method == "probabilistic":
            self.laws.append(q_T)
        return self.stream.pick(q_T)


@dataclass(eq=False)
class StringCourse:
    """Drafts draft ids greedily; the proposal is their text in the target's tokens.

    Attributes:
        depth: most tokens of the target. num_steps: most draft tokens.
        is_ended: the draft model would end the text here.
    """

    state: DraftState
    log: TextLog
    depth: int
    num_steps: int
    way: Strings
    drafted: list[int] = field(default_factory=list)
    is_ended: bool = False

    @property
    def is_done(self) -> bool:
        return self.is_ended or len(self.drafted) >= self.num_steps

    def take(self, logits_D: Tensor, argmax: int) -> None:
        if self.way.draft.bytes_of(argmax):
            self.drafted.append(argmax)
        else:
            self.is_ended = True

    def tree(self, source: str) -> DraftTree:
        return DraftTree.chain(self._proposal(), source)

    def _proposal(self) -> list[int]:
        """Target ids of the drafted text; the last could still merge with what would follow."""
        data = b"".join(map(self.way.draft.bytes_of, self.drafted))
        text = whole_characters(data)
        ids = self._behind_the_log(text)
        if len(ids) > 1 and not self.is_ended:
            ids.pop()
        return self._usable(ids)[: self.depth]

    def _behind_the_log(self, text: str) -> list[int]:
        """Encoded behind the end of the log; by itself where its start would merge with that.

        The log stands: only ids that begin where it ends can be proposed.
        """
        target = self.way.target
        tail = target.go_on(self.log.text)
        ids = target.go_on(self.log.text + text)
        return ids[len(tail) :] if ids[: len(tail)] == tail else target.go_on(text)

    def _usable(self, ids: list[int]) -> list[int]:
        """Without the begun character that the log ends with, and up to the first special id."""
        begun, spellings = self.log.partial, self.way.target.spellings
        usable: list[int] = []
        for token in ids:
            spelling = spellings[token]
            if spelling is None:
                break
            if not begun:
                usable.append(token)
            elif not begun.startswith(spelling):
                break
            else:
                begun = begun.removeprefix(spelling)
        return usable


def _piece(course: Course, budget: int) -> Piece:
    state = course.state
    start = len(state.cached)
    log, drafted = state.log.tokens, course.drafted
    behind = log[start : start + budget]
    chain = behind + drafted[max(0, start - len(log)) :][: budget - len(behind)]
    reaches_end = start + len(chain) == len(log) + len(drafted)
    return Piece(state.table, start, chain, EMPTY_TREE, reaches_end)


def _dialect(parts: ModelParts, which: str) -> Dialect:
    if parts.tokenizer is None:
        raise ConfigError(
            f"drafter 'translate' needs the tokenizer of the {which}: put its tokenizer.json into "
            "the folder of the weights, and leave load_tokenizer on"
        )
    try:
        return Dialect(parts.tokenizer, parts.runner.network.spec.vocab_size)
    except TokenizerError as error:
        raise ConfigError(f"drafter 'translate', {which}: {error}") from error


def _is_close(words: VocabularyMap, draft: Dialect, target: Dialect) -> bool:
    """Whether the common tokens carry enough of both laws; a warning where they are few."""
    if words.num_common < FEW_COMMON_TOKENS:
        logger.warning(
            "the two vocabularies have only %d tokens in common: drafts are translated as text",
            words.num_common,
        )
    is_half = 2 * words.num_common >= max(draft.num_tokens, target.num_tokens)
    return is_half and words.num_common >= FEW_COMMON_TOKENS
