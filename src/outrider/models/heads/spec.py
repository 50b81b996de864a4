"""What a draft head is, whatever layout it was published in: widths, conventions, parts.

Letters of `checkpoints`: H hidden width of the target, h of the head, V vocabulary of the target,
Vd of the head, a feature layers, L layers of the target; r_j is the residual stream before layer j.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.rope_scaling import RopeConfig

Origin = Literal["own", "target"]
Mask = Literal["bidirectional", "causal"]


class Family(StrEnum):
    """What is computed, not how it is stored."""

    EAGLE = "eagle"  # 1 and 2 share their weights
    EAGLE3 = "eagle3"
    PEAGLE = "peagle"
    BLOCK = "block"  # DFlash, DSpark and their kin
    MEDUSA = "medusa"
    MTP = "mtp"
    KV = "kv"  # reads the target's keys and values
    PARD = "pard"
    PARD2 = "pard2"
    HYDRA = "hydra"
    MLP_SPECULATOR = "mlp_speculator"
    DRAFT_MODEL = "draft_model"


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """What must be known of a target to fit a head to it.

    Attributes:
        name: as the user gave it, for messages.
        family: `model_type`; it decides the gain of norms in modules shipped with the target.
        folder: its files, where MTP modules and some Medusa heads lie.
    """

    name: str
    family: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    folder: Path | None = None

    @classmethod
    def from_config(
        cls, values: Mapping[str, Any], *, name: str, folder: Path | None = None
    ) -> Self:
        """From the target's `config.json`. ConfigError if it lacks a width."""
        inner = {**values, **(values.get("text_config") or {})}
        keys = ("hidden_size", "vocab_size", "num_hidden_layers")
        absent = [key for key in keys if not isinstance(inner.get(key), int)]
        if absent:
            raise ConfigError(f"config.json of target {name!r} lacks {absent[0]}: no head fits it")
        hidden, vocab, layers = (inner[key] for key in keys)
        return cls(
            name=name,
            family=str(inner.get("model_type")),
            hidden_size=hidden,
            vocab_size=vocab,
            num_layers=layers,
            folder=folder,
        )


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What files leave unsaid and programs read differently; a wrong one only lowers acceptance.

    Attributes:
        feature_layers: boundaries j of the features r_j, 0 (embedding) to L (before the final
            norm), in the order of their concatenation.
        norm_before_residual: the residual of EAGLE-3's first layer starts from the normed feature.
        input_norm: before `fc`: none, one over the concatenation, or one per feature.
        feedback: what an EAGLE-3 or MTP row hands the next: its output before or after the norm.
        input_state: feature of the last layer: after the final norm, or before.
        concatenation: order of the two inputs of EAGLE-1 and MTP.
        rope_style: pairs are the two halves of a head, or neighbours.
        rope_origin: whose frequencies.
        norm_gain: RMSNorm multiplies by w or by 1 + w.
        vocabulary_map: none if the draft vocabulary is the target's; how the files wrote it.
        block_masks: per layer, what a block's slots see of each other.
        sample_from_anchor: slot j of a block predicts position j + 1 rather than its own.
        is_first_embedding_zero: MTP sees zeros for the embedding in row 0.
    """

    feature_layers: tuple[int, ...] = ()
    norm_before_residual: bool = False
    input_norm: Literal["none", "all", "each"] = "none"
    feedback: Literal["pre-norm", "post-norm"] = "pre-norm"
    input_state: Literal["normed", "raw"] = "normed"
    concatenation: Literal["embedding-first", "feature-first"] = "embedding-first"
    rope_style: Literal["half-split", "interleaved"] = "half-split"
    rope_origin: Origin = "own"
    norm_gain: Literal["weight", "one-plus-weight"] = "weight"
    lm_head: Origin = "target"
    embedding: Origin = "target"
    vocabulary_map: Literal["none", "offset", "absolute"] = "none"
    block_masks: tuple[Mask, ...] = ()
    sample_from_anchor: bool = False
    is_first_embedding_zero: bool = False


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes as the tensors have them.

    Attributes:
        target_hidden: H; hidden: h; vocab: V; draft_vocab: Vd; num_features: a (0: only the last
            state of the target).
    """

    target_hidden: int
    hidden: int
    vocab: int
    draft_vocab: int
    num_features: int = 0


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The Llama-like layers of a head.

    Attributes:
        family: `model_type` of the head.
        windows: sliding window per layer; 0 is none.
    """

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    has_qkv_bias: bool
    has_output_bias: bool
    has_qk_norm: bool
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MedusaShape:
    """Heads of residual blocks, `num_blocks` each."""

    num_heads: int
    num_blocks: int
    has_bias: bool


@dataclass(frozen=True, kw_only=True)
class MTPShape:
    """Modules that take turns: step k runs module k mod `num_modules`.

    Attributes:
        layer: the layer of the target whose tensors each module's layer has, by name and shape.
    """

    num_modules: int
    layer: int


@dataclass(frozen=True, kw_only=True)
class MarkovShape:
    """DSpark's sequential finish: how the previous token corrects a slot's logits.

    Attributes:
        kind: of the correction.
        confidence: what the acceptance estimate reads: nothing (there is none), the slot's state,
            or that and the previous token.
    """

    kind: Literal["vanilla", "gated", "rnn"]
    rank: int
    confidence: Literal["none", "state", "state-and-token"]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """One head.

    Attributes:
        source: folder or hub id.
        decoder: of EAGLE and block families.
        mask_token_id: stands for unknown tokens in P-EAGLE, PARD and block families.
        block_size: slots of a block, the anchor's included.
        logit_scale: multiplies a block drafter's logits.
        assumed: conventions that the files do not state: a doctor's first suspects.
        pinned: conventions that `outrider.json` or the caller laid down.
    """

    family: Family
    widths: Widths
    conventions: Conventions
    decoder: DecoderShape | None = None
    medusa: MedusaShape | None = None
    mtp: MTPShape | None = None
    markov: MarkovShape | None = None
    mask_token_id: int | None = None
    block_size: int | None = None
    logit_scale: float = 1.0
    source: str = field(default="", compare=False)
    assumed: frozenset[str] = field(default=frozenset(), compare=False)
    pinned: frozenset[str] = field(default=frozenset(), compare=False)


class Head(NamedTuple):
    """A head and its tensors by their canonical names (see `load`)."""

    spec: HeadSpec
    tensors: dict[str, Tensor]
