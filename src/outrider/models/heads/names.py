"""The names under which layouts keep the same tensor, brought to one."""

import re
from collections.abc import Iterable

from outrider.errors import ModelError
from outrider.models.heads.spec import Family
from outrider.models.weights import IGNORED_ENDINGS

_ALIASES = (
    (r"model\.", ""),
    (r"midlayer\.", "layers.0."),
    (r"transformer\.", "layers.0."),  # speculators' EAGLE-1
    (r"encoder\.fc\.", "fc."),
    (r"encoder\.output_norm_enc\.", "hidden_norm."),
    (r"fusion_fc\.", "fc."),
    (r"pre_lm_head_layernorm\.", "hidden_states_layernorm."),
    (r"aux_norm_low\.", "fc_norm.0."),
    (r"aux_norm_mid\.", "fc_norm.1."),
    (r"aux_norm_high\.", "fc_norm.2."),
)
_EAGLE = (
    (r"embedding_layernorm\.", "embedding_norm."),
    (r"hidden_states_layernorm\.", "feature_norm."),
    (r"mask_hidden$", "mask_feature"),
    # SGLang's name in the layers after the first, which have one input only.
    (r"(layers\.[1-9]\d*\.)hidden_norm\.", r"\1input_layernorm."),
)
_BLOCK = (
    (r"markov_head\.markov_w1(\.weight)?$", "markov.w1"),
    (r"markov_head\.markov_w2(\.weight)?$", "markov.w2"),
    (r"markov_head\.gate_proj\.", "markov.gate."),
    (r"markov_head\.joint_proj\.", "markov.joint."),
    (r"confidence_head\.proj\.", "confidence."),
)
_MEDUSA = (
    (r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.linear\.(weight|bias)$", r"heads.\1.blocks.\2.\3"),
    (r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.weight$", r"heads.\1.lm_head.\2"),
    (
        r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)$",
        r"heads.\1.blocks.\2.\3",
    ),
    (r"(?:medusa_heads\.)?lm_heads\.(\d+)\.weight$", r"heads.\1.lm_head.weight"),
    (r"(?:medusa_heads\.)?token_map$", "target_ids"),
)
_OF_FAMILY = {
    Family.EAGLE: _ALIASES + _EAGLE,
    Family.EAGLE3: _ALIASES + _EAGLE,
    Family.PEAGLE: _ALIASES + _EAGLE,
    Family.BLOCK: _ALIASES + _BLOCK,
    Family.MEDUSA: _MEDUSA,
}


def plain(name: str) -> str:
    """A name without what only tells who wrote it: what detection compares."""
    return _replace(name, _ALIASES)


def canonical(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Canonical name to name in the files; unknown names stay as they are.

    Raises:
        ModelError: two names in the files mean the same tensor.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        if name.endswith(IGNORED_ENDINGS):
            continue
        ours = _replace(name, _OF_FAMILY.get(family, ()))
        if ours in found:
            raise ModelError(
                f"the tensors {found[ours]!r} and {name!r} mean the same: remove one of them"
            )
        found[ours] = name
    return found


def _replace(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub("^" + pattern, replacement, name)
    return name
