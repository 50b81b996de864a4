"""The draft vocabulary: the tokens that come most often where something is learned."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from outrider.errors import ConfigError
from outrider.train.heads.pieces import Piece


def draft_vocabulary(
    pieces: Sequence[Piece], *, size: int, num_target: int, always: Iterable[int] = ()
) -> Tensor | None:
    """ids_D, rising: the `size` most frequent of the learned tokens; None is the whole vocabulary.

    Args:
        always: special tokens of the chat template and ends of answers, which are in it however
            rare they are here. Ties, and tokens that never came, go by the lower id.

    Raises:
        ConfigError: it has no room for `always`.
    """
    if size >= num_target:
        return None
    counts_V = torch.zeros(num_target, dtype=torch.long)
    for piece in pieces:
        tokens = torch.tensor(piece.text.tokens)[torch.tensor(piece.text.is_learned)]
        counts_V += torch.bincount(tokens, minlength=num_target)
    special = sorted({token for token in always if 0 <= token < num_target})
    if len(special) > size:
        raise ConfigError(
            f"draft_vocab={size}: the {len(special)} special tokens alone need more room"
        )
    counts_V[special] = counts_V.max() + 1
    by_count_V = counts_V.sort(descending=True, stable=True).indices
    return by_count_V[:size].sort().values
