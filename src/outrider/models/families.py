"""The families of the lean decoder, each as its departures from Llama."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` departs from Llama; a bias of None is as the config says.

    Attributes:
        sliding: which layers have the sliding window: "none", "all", "late" (from
            `max_window_layers` on), or "no-rope" (those without rotary embedding).
        is_sliding_optional: the window counts only where `use_sliding_window` is true.
        is_fused: the files hold one matrix for q, k, v and one for gate and up.
        rope_kinds: the family's own names of rope types.
    """

    head_dim: int | None = None
    has_qkv_bias: bool | None = None
    has_output_bias: bool | None = None
    has_mlp_bias: bool | None = None
    has_qk_norm: bool = False
    is_tied: bool = False
    is_fused: bool = False
    is_partial_rotary: bool = False
    has_no_rope_layers: bool = False
    sliding: str = "none"
    is_sliding_optional: bool = False
    default_window: int | None = None
    default_theta: float = 10000.0
    default_original: int | None = None
    rope_kinds: Mapping[str, str] = field(default_factory=dict)


QWEN2 = Family(
    has_qkv_bias=True,
    has_output_bias=False,
    has_mlp_bias=False,
    sliding="late",
    is_sliding_optional=True,
    default_window=4096,
)
FAMILIES = {
    "llama": Family(),
    "mistral": Family(
        has_qkv_bias=False,
        has_output_bias=False,
        has_mlp_bias=False,
        sliding="all",
        default_window=4096,
    ),
    "qwen2": QWEN2,
    "mimo": QWEN2,
    "qwen3": Family(
        head_dim=128,
        has_mlp_bias=False,
        has_qk_norm=True,
        sliding="late",
        is_sliding_optional=True,
        default_window=4096,
    ),
    "smollm3": Family(
        is_tied=True,
        has_no_rope_layers=True,
        sliding="no-rope",
        is_sliding_optional=True,
        default_theta=2000000.0,
    ),
    "phi3": Family(
        has_qkv_bias=False,
        has_output_bias=False,
        has_mlp_bias=False,
        is_fused=True,
        is_partial_rotary=True,
        sliding="all",
        default_original=4096,
        rope_kinds={"su": "longrope", "yarn": "longrope"},
    ),
}
