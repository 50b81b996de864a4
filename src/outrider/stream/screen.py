"""Screen: what one client sees of a completion; text that stays, and behind it a tail that may not.

Tails and their gate are described in docs/concepts/streams.md.
"""

from outrider.request import Request
from outrider.step import Commit, DraftTree
from outrider.stream.detokenize import Detokenizer
from outrider.stream.events import Committed, Event, Tail
from outrider.stream.stability import Stability, num_shown
from outrider.stream.units import Units

DEFERRED = "deferred"
# What a tail says of where its drafts come from, for drafters that have no model.
SOURCES = {
    "lookahead": "retrieval",
    "ngram": "retrieval",
    "prediction": "prediction",
    "recycle": "retrieval",
    "rest": "retrieval",
    "retrieval": "retrieval",
    "suffix": "retrieval",
}


class Screen:
    """Makes the tails of one completion, and holds its commits back to whole units.

    Constrained output has no tails.

    Args:
        text: what its tokens read; None without a tokenizer, then there is nothing to hold back.
        hidden: tokens before which a tail ends: they end the output, or open what is no text.
        stability: what the drafts of all completions have taught.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        text: Detokenizer | None,
        hidden: frozenset[int],
        stability: Stability,
    ) -> None:
        params = request.stream
        self.takes_tails = params.is_provisional and not request.sampling.is_constrained
        self._request_id = request.id
        self._index = index
        self._params = params
        self._text = text
        self._hidden = hidden
        self._stability = Stability(stability)
        self._units = Units(params.commit_unit if text is not None else "token")
        self._path: tuple[int, ...] = ()  # of the draft on its way, shown or not
        self._num_chars = 0  # released
        self._shown = ""  # the last tail since text was released
        self._version = 0

    def drafted(self, tree: DraftTree) -> Tail | None:
        """The tail that this draft is worth, if it is worth one and not on show already."""
        self._path = tuple(tree.tokens[node] for node in likeliest_path(tree))
        survival = self._stability.survival(tree.source, len(self._path))
        path = self._path[: num_shown(survival, self._params)]
        path = path[: next((i for i, t in enumerate(path) if t in self._hidden), len(path))]
        count, new = self._text.preview(path) if self._text else (len(path), "")
        text = self._units.text + new
        if not count or (self._text and text == self._shown):
            return None
        tokens = self._units.token_ids + path[:count]
        return self._tail(tokens, text, survival[count - 1], _source(tree))

    def committed(self, commit: Commit, event: Committed) -> list[Event]:
        """What the client is told of a commit: released text, and a tail of what is held back.

        That tail also clears one that no released text has made void.
        """
        self._learn(commit)
        released, held = self._units.take(event), self._units
        events: list[Event] = [] if released is None else [released]
        if released is not None and released.text:
            self._num_chars += len(released.text)
            self._shown = ""
        if self.takes_tails and event.finish_reason is None and held.text != self._shown:
            events.append(self._tail(held.token_ids, held.text, 1.0, DEFERRED))
        return events

    def _learn(self, commit: Commit) -> None:
        """Every draft teaches, also what was not shown of it: else a closed gate stays closed."""
        path, self._path = self._path, ()
        if not path or not commit.tokens:
            return
        stood = _num_equal(path, commit.tokens)
        is_cut = commit.finish_reason is not None and stood == len(commit.tokens)
        num_tried = stood if is_cut else min(stood + 1, len(path))
        self._stability.observe(commit.tree.source, stood, num_tried)

    def _tail(self, tokens: tuple[int, ...], text: str, stability: float, source: str) -> Tail:
        self._shown = text
        self._version += 1
        return Tail(
            request_id=self._request_id,
            index=self._index,
            token_ids=tokens,
            text=text,
            committed_chars=self._num_chars,
            stability=stability,
            source=source,
            version=self._version,
        )


def likeliest_path(tree: DraftTree) -> list[int]:
    """Nodes from the root down: the child its drafter thinks likeliest, else the first."""
    if tree.is_chain:
        return list(range(len(tree)))
    path: list[int] = []
    node = -1
    while children := tree.children(node):
        node = _likeliest(children, tree)
        path.append(node)
    return path


def _likeliest(children: list[int], tree: DraftTree) -> int:
    """By the law that the first was drawn from: those of its siblings lack what was drawn."""
    law = tree.law(children[0])
    if law is None or len(children) == 1:
        return children[0]
    return max(children, key=lambda child: float(law[tree.tokens[child]]))


def _source(tree: DraftTree) -> str:
    return SOURCES.get(tree.source, "draft" if tree.is_chain else "tree")


def _num_equal(path: tuple[int, ...], tokens: tuple[int, ...]) -> int:
    """How many leading tokens are the same."""
    pairs = enumerate(zip(path, tokens, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(path), len(tokens)))
