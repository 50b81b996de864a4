"""What drafters that run a model share: where drafts are drawn from, and by which law.

Shape legend: V vocabulary of the target.
"""

from collections.abc import Sequence as Items

from torch import Tensor

from outrider.errors import RequestError
from outrider.sampling.rng import PositionStream, RootStream, Stream
from outrider.sampling.shaper import Shaper
from outrider.sequence import Sequence


def draft_stream(seq: Sequence, method: str) -> Stream | None:
    """Where the tokens of a chain are drawn from under a sample method; None picks the argmax."""
    if seq.shaper.is_greedy or method == "greedy":
        return None
    if method == "coupled":
        return PositionStream(seq.seed, len(seq.tokens))
    return RootStream(seq.seed, len(seq.tokens) - 1, "draft")


def draft_law(
    seq: Sequence, logits_V: Tensor, path: Items[int], shaper: Shaper | None = None
) -> Tensor | None:
    """The draft's law after drafted tokens, shaped as the target's is by the request's settings.

    `shaper` stands in for the request's own. None where the settings leave no token, or the logits
    are no numbers: nothing to propose.
    """
    try:
        mask_V = seq.grammar.mask(path) if seq.grammar is not None else None
        shaped_V: Tensor = (shaper or seq.shaper).shape(logits_V, seq.tokens, path, mask_V)
    except RequestError:
        return None
    return shaped_V.softmax(dim=0)
