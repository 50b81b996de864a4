"""What tests of heads that read rows share: a target that fits the layouts, heads, rows by rows.

Shape legend: T tokens, A boundaries, H hidden width, F all features, V vocabulary, U draft's.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.models.decoder import Decoder
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Head
from outrider.ops.base import Span
from outrider.testing import tiny_decoder
from tests.models.heads.layouts import (
    TARGET,
    Eagle3,
    H,
    L,
    V,
    random_eagle1,
    random_eagle3,
    write_eagle,
    write_eagle1,
    write_speculators,
)


@cache
def target_decoder(kernels: str = "auto", seed: int = 3) -> Decoder:
    """Of the sizes that `layouts` makes heads for; its LM head is not its embedding."""
    return tiny_decoder(
        seed,
        kernels=kernels,
        hidden_size=H,
        intermediate_size=24,
        vocab_size=V,
        num_hidden_layers=L,
        tie_word_embeddings=False,
    )


def eagle3(folder: Path, *, pins: dict[str, Any] | None = None, **options: Any) -> Head:
    made: Eagle3 = random_eagle3(**options)
    write_head = write_eagle if len(made.boundaries) == 3 else write_speculators
    return load_head(write_head(folder, made), TARGET, pins=pins)


def peagle(folder: Path, **options: Any) -> Head:
    made = random_eagle3(**options)
    generator = torch.Generator().manual_seed(9)
    made.tensors["mask_hidden"] = torch.randn(1, 1, 3 * H, generator=generator)
    return load_head(write_speculators(folder, made, "peagle", mask_token_id=39), TARGET)


def eagle1(folder: Path, *, pins: dict[str, Any] | None = None, **options: Any) -> Head:
    """With a small `fc`, for without norms what a row hands on would grow from row to row."""
    layers = {"num_hidden_layers": options.get("num_layers", 1)}
    tensors = random_eagle1(**options)
    tensors["fc.weight"] *= 0.2
    return load_head(write_eagle1(folder, tensors, **layers), TARGET, pins=pins)


def states_of(target: Decoder, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """logits_TV and tapped_ATH at all boundaries, of one pass over a text."""
    spec = target.spec
    pool = KVPool(spec.kv_shapes, len(tokens), 1, spec.dtype, spec.device)
    layout = target.ops.layout([Span(range(len(tokens)), 0, len(tokens))], spec.device)
    with torch.inference_mode():
        return target.forward_tapped(
            torch.tensor(tokens), layout, pool.layers, torch.arange(len(tokens)), range(L + 1)
        )
