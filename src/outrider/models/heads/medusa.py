"""Reader of Medusa heads in every naming: Medusa's own, TGI's, ModelOpt's, vLLM's older one."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from outrider.errors import ModelError, PairError
from outrider.models.heads.given import Given, Shapes
from outrider.models.heads.pins import lay_down
from outrider.models.heads.spec import (
    Conventions,
    Family,
    Head,
    HeadSpec,
    MedusaShape,
    TargetSpec,
    Widths,
)
from outrider.models.heads.vocabulary import check_token_map

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"

_HEAD = re.compile(r"heads\.(\d+)\.(?:blocks\.(\d+)\.|lm_head\.)(\w+)$")


def read_medusa(given: Given) -> Head:
    """Medusa (Cai et al. 2024): residual blocks per head on the target's last state.

    Heads and blocks are counted from the tensors: published configs are known to be wrong there.
    """
    shape = _shape(given)
    given = _with_shared_blocks(given, shape)
    has_lm_heads = any(".lm_head." in name for name in given.tensors)
    draft_vocab = _draft_vocabulary(given, has_lm_heads)
    given.check(_shapes(given, shape, draft_vocab if has_lm_heads else 0))
    tensors = dict(given.tensors)
    if "target_ids" in tensors:
        tensors["target_ids"] = check_token_map(
            tensors["target_ids"], num_draft=draft_vocab, num_target=given.target.vocab_size
        )
    spec = HeadSpec(
        family=Family.MEDUSA,
        widths=_widths(given, draft_vocab),
        conventions=Conventions(
            lm_head="own" if has_lm_heads else "target",
            vocabulary_map="absolute" if "target_ids" in tensors else "none",
        ),
        medusa=shape,
        source=given.source,
    )
    return Head(lay_down(given, spec), tensors)


def heads_in_target(
    written: Mapping[str, str], folder: Path, target: TargetSpec
) -> Mapping[str, str]:
    """The names of the heads alone, where they lie among the target's own (Medusa-1.0).

    Raises:
        PairError: they do, and the target is another model.
    """
    if EMBEDDING not in written:
        return written
    if target.folder is None or not target.folder.samefile(folder):
        raise PairError(
            f"the heads in {str(folder)!r} belong to the model in the same files: "
            f"use that as the target, not {target.name!r}"
        )
    return {name: theirs for name, theirs in written.items() if _is_head(name)}


def _is_head(name: str) -> bool:
    return name.startswith("heads.") or name == "target_ids"


def _shape(given: Given) -> MedusaShape:
    found = [match for name in given.tensors if (match := _HEAD.match(name))]
    num_heads = max(int(match[1]) for match in found) + 1
    num_blocks = max((int(match[2]) for match in found if match[2]), default=0) + 1
    # In Medusa's own naming the lm_head's number counts the blocks before it.
    numbers = {int(match[3]) for match in found if match[3].isdigit()}
    if len(numbers) > 1 or any(number < num_blocks for number in numbers):
        raise ModelError(
            f"{given.source!r}: the lm_heads stand at places {sorted(numbers)} behind {num_blocks} "
            "blocks; every head must have its own behind all blocks"
        )
    for key, count in (("medusa_num_heads", num_heads), ("num_heads", num_heads)):
        if given.config.get(key) not in (None, count):
            logger.warning("config.json says %s=%s, the files hold %d heads: all are used",
                           key, given.config[key], count)  # fmt: skip
    return MedusaShape(
        num_heads=num_heads,
        num_blocks=max([num_blocks, *numbers]),
        has_bias=any(match[2] and match[3] == "bias" for match in found),
    )


def _with_shared_blocks(given: Given, shape: MedusaShape) -> Given:
    """Fills in blocks after the first that the files hold once, and names lm_heads alike."""
    tensors: dict[str, Tensor] = {}
    written: dict[str, str] = {}
    for name, tensor in given.tensors.items():
        ours = re.sub(r"\.lm_head\.\d+$", ".lm_head.weight", name)
        tensors[ours] = tensor
        written[ours] = given.name(name)
    for name in list(tensors):
        match = re.match(r"(heads\.\d+\.blocks\.)0\.(\w+)$", name)
        for block in range(1, shape.num_blocks if match else 1):
            assert match
            tensors.setdefault(f"{match[1]}{block}.{match[2]}", tensors[name])
    return _with_tensors(given, tensors, written)


def _with_tensors(
    given: Given, tensors: dict[str, Tensor], written: dict[str, str] | None = None
) -> Given:
    return Given(
        source=given.source,
        config=given.config,
        tensors=tensors,
        written={**given.written, **(written or {})},
        target=given.target,
        pinned=given.pinned,
    )


def _draft_vocabulary(given: Given, has_lm_heads: bool) -> int:
    if not has_lm_heads:
        return given.target.vocab_size
    rows = given.shape("heads.0.lm_head.weight")[0]
    given.agree_count("truncated_vocab_size", rows, "heads.0.lm_head.weight")
    if "target_ids" not in given.tensors:
        given.agree_target("rows in its lm_heads", rows, given.target.vocab_size)
    return rows


def _widths(given: Given, draft_vocab: int) -> Widths:
    hidden = given.target.hidden_size
    return Widths(
        target_hidden=hidden,
        hidden=given.agree_target("width", given.shape("heads.0.blocks.0.weight")[0], hidden),
        vocab=given.target.vocab_size,
        draft_vocab=draft_vocab,
    )


def _shapes(given: Given, shape: MedusaShape, num_rows: int) -> Shapes:
    hidden = given.agree_target(
        "width", given.shape("heads.0.blocks.0.weight")[0], given.target.hidden_size
    )
    shapes: Shapes = {}
    for head in range(shape.num_heads):
        for block in range(shape.num_blocks):
            shapes[f"heads.{head}.blocks.{block}.weight"] = (hidden, hidden)
            if shape.has_bias:
                shapes[f"heads.{head}.blocks.{block}.bias"] = (hidden,)
        if num_rows:
            shapes[f"heads.{head}.lm_head.weight"] = (num_rows, hidden)
    if "target_ids" in given.tensors:
        shapes["target_ids"] = given.shape("target_ids")
    return shapes
