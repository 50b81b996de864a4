"""What every verifier offers the engine: which proposals it takes, which promise it keeps."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict


class Exactness(StrEnum):
    """What a verifier promises about the output, whatever the drafter does.

    EXACT: its law is the target's. EXACT_GREEDY: token ids equal greedy decoding; for greedy
    requests only. LOSSY: neither; said in every response and every metric.
    """

    EXACT = "exact"
    EXACT_GREEDY = "exact-greedy"
    LOSSY = "lossy"


@dataclass(frozen=True, kw_only=True)
class Accepts:
    """Kinds of proposal a verifier is lossless for; the engine refuses others when it starts.

    Attributes:
        branches: trees, not only chains.
        point_mass: tokens picked deterministically (their law is None).
        drawn: tokens drawn from the law recorded with them.
    """

    branches: bool
    point_mass: bool
    drawn: bool


class Verifier(Protocol):
    """Walks a draft tree and says which guesses stand.

    Attributes:
        keyed_by: the stream the engine hands over: "position" is `PositionStream` (tokens are a
            function of the seed), "root" is `RootStream` with purpose "verify".
        greedy_only: serves requests of temperature 0 only.
    """

    name: str
    exactness: Exactness
    keyed_by: Literal["position", "root"]
    accepts: Accepts
    greedy_only: bool

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        """Pure: the same tree, laws and stream give the same verdict."""
        ...
