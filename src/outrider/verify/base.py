"""What every verifier offers the engine: which proposals it takes, which promise it keeps."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal, Protocol

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Kind, Verdict

ALL_KINDS = frozenset(Kind)
CHAINS = frozenset({Kind.PICKED_CHAIN, Kind.DRAWN_CHAIN})


class Exactness(StrEnum):
    """What a verifier promises about the output, whatever the drafter does.

    EXACT: its law is the target's. EXACT_GREEDY: token ids equal greedy decoding; for greedy
    requests only. LOSSY: neither; said in every response and every metric. SYNTHETIC: the tokens
    are no text at all; for benchmarks.
    """

    EXACT = "exact"
    EXACT_GREEDY = "exact-greedy"
    LOSSY = "lossy"
    SYNTHETIC = "synthetic"


class Verifier(Protocol):
    """Walks a draft tree and says which guesses stand.

    It is made with its options as keyword arguments, once per set of values, and keeps no state.

    Attributes:
        keyed_by: the stream the engine hands over: "position" is `PositionStream` (tokens are a
            function of the seed), "root" is `RootStream` with purpose "verify".
        accepts: kinds of proposal the rule keeps its promise for; the engine refuses others when a
            request comes in.
        greedy_only: serves requests of temperature 0 only.
        options: what a request may set with `verifier_options`.
    """

    name: str
    exactness: Exactness
    keyed_by: Literal["position", "root"]
    accepts: frozenset[Kind]
    greedy_only: bool
    options: Mapping[str, Option]

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        """Pure: the same tree, laws and stream give the same verdict."""
        ...
