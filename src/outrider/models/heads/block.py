"""Reader of block drafters: DFlash, and DSpark with its sequential finish and confidence."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.heads.feature_layers import block_layers
from outrider.models.heads.given import Given, Shapes, adds_one_to_gain
from outrider.models.heads.layers import hidden_size, layer_shapes, read_decoder
from outrider.models.heads.pins import lay_down
from outrider.models.heads.spec import (
    Conventions,
    DecoderShape,
    Family,
    Head,
    HeadSpec,
    MarkovShape,
    Mask,
    Widths,
)
from outrider.models.heads.vocabulary import take_map

NORMS = ("input_layernorm", "post_attention_layernorm")
NOT_SERVED = (
    ("Domino", re.compile(r"prefix_gru\.|embed_proj\.")),
    ("DFlash2", re.compile(r".*(attention_conv|mlp_conv)\.|candidate_selector\.")),
    ("XPress", re.compile(r"refiner_head\.")),
    ("DSpark of DeepSeek", re.compile(r"main_proj\.")),
    ("Laguna", re.compile(r".*(qkv_proj|g_proj)\.|aux_hidden_norms\.")),
)
# What a config calls some of them: speculators by its model type, SpecForge by a projector.
CALLED = {"domino": "Domino", "dflash2": "DFlash2", "xpress": "XPress"}
# Settings of a body that computes something else; only these values are served.
ONLY = {"attention_sink_bias": False, "attention_value_scale": 1.0}


def read_block(given: Given, mask_embedding: tuple[Tensor, int] | None) -> Head:
    """DFlash (z-lab 2025) and DSpark: a block of slots that sees projected target features."""
    settings = _settings(given)
    _refuse_others(given, settings)
    hidden, decoder = hidden_size(given), read_decoder(given)
    windows = _windows(settings, decoder.num_layers)
    decoder = replace(decoder, windows=windows, has_qk_norm=True)
    widths = _widths(given, hidden)
    markov = _markov(given, settings)
    given.check(*_shapes(given, decoder, widths, markov))
    tensors = dict(given.tensors)
    kind = given.pinned.get("vocabulary_map", "offset")
    ids_D = take_map(tensors, num_draft=widths.draft_vocab, num_target=widths.vocab, kind=kind)
    declared, assumed = _conventions(given, settings, decoder, widths)
    spec = HeadSpec(
        family=Family.BLOCK,
        widths=widths,
        conventions=replace(declared, vocabulary_map="none" if ids_D is None else kind),
        decoder=decoder,
        markov=markov,
        mask_token_id=_mask_token(given, settings, tensors, mask_embedding),
        block_size=_block_size(given, settings),
        logit_scale=float(settings.get("logit_scale") or 1.0),
        source=given.source,
        assumed=assumed,
    )
    return Head(lay_down(given, spec), tensors)


def _settings(given: Given) -> Mapping[str, Any]:
    """Keys lie at the top level or in `dflash_config`."""
    return {**given.values, **(given.config.get("dflash_config") or {})}


def _kinds(given: Given, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    return given.config.get("speculators_model_type"), settings.get("projector_type")


def _refuse_others(given: Given, settings: Mapping[str, Any]) -> None:
    called = next((CALLED[kind] for kind in _kinds(given, settings) if kind in CALLED), "")
    found = [(called, "as its config says")] if called else []
    for variant, pattern in NOT_SERVED:
        found += [(variant, given.name(name)) for name in given.tensors if pattern.match(name)]
    if found:
        variant, sign = found[0]
        raise ConfigError(
            f"the head {given.source!r} is of {variant} ({sign}), which is not served: use a "
            "DFlash or DSpark head, or another drafter"
        )
    for key, served in ONLY.items():
        if settings.get(key) not in (None, served):
            raise ConfigError(f"config.json: {key}={settings[key]!r} is not served")


def _widths(given: Given, hidden: int) -> Widths:
    feature = given.count("target_hidden_size") or hidden
    given.agree_target("target_hidden_size", feature, given.target.hidden_size)
    said = given.count("num_target_layers")
    if said is not None:
        given.agree_target("num_target_layers", said, given.target.num_layers)
    fused, vocab = given.shape("fc.weight")[1], given.target.vocab_size
    if "embed_tokens.weight" not in given.tensors:  # one of its own may hold more than the target's
        given.agree_target("vocab_size", given.count("vocab_size") or vocab, vocab)
    if fused % feature:
        raise ConfigError(
            f"{given.name('fc.weight')} reads {fused} values, no multiple of {feature}: "
            "config.json needs the target_hidden_size of its target"
        )
    if "lm_head.weight" in given.tensors:
        rows = given.agree_count(
            "draft_vocab_size", given.shape("lm_head.weight")[0], "lm_head.weight"
        )
    else:
        rows = given.count("draft_vocab_size") or vocab
        given.agree_target("width without an lm_head of its own", hidden, feature)
    return Widths(
        target_hidden=feature,
        hidden=hidden,
        vocab=vocab,
        draft_vocab=rows,
        num_features=fused // feature,
    )


def _shapes(
    given: Given, decoder: DecoderShape, widths: Widths, markov: MarkovShape | None
) -> tuple[Shapes, Shapes]:
    """Required and optional tensors."""
    hidden = widths.hidden
    shapes: Shapes = {"fc.weight": (hidden, widths.num_features * widths.target_hidden)}
    shapes |= {"hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for index in range(decoder.num_layers):
        shapes |= layer_shapes(decoder, index, hidden, reads=hidden, norms=NORMS)
    if markov:
        shapes |= _markov_shapes(markov, widths)
    if widths.draft_vocab < widths.vocab:
        shapes["lm_head.weight"] = (widths.draft_vocab, hidden)
    optional: Shapes = {"lm_head.weight": (widths.draft_vocab, hidden)}
    optional |= {name: given.shape(name) for name in ("d2t", "t2d") if name in given.tensors}
    if "embed_tokens.weight" in given.tensors:
        # Its vocabulary may be larger than the target's: the mask token lies beyond.
        rows = max(given.shape("embed_tokens.weight")[0], widths.vocab)
        optional["embed_tokens.weight"] = (rows, hidden)
    if markov:
        optional |= {"markov.gate.bias": (markov.rank,), "markov.joint.bias": (3 * markov.rank,)}
    return shapes, optional


def _markov(given: Given, settings: Mapping[str, Any]) -> MarkovShape | None:
    has_markov = "markov.w1" in given.tensors
    said = settings.get("markov_head_type")
    if not has_markov:
        if said is not None or _says_dspark(given, settings):
            given.shape("markov.w1")
        return None
    kind = _markov_kind(given)
    if said not in (None, kind):
        raise ConfigError(
            f"config.json says markov_head_type={said!r}, but the tensors are of {kind!r}"
        )
    rank = given.shape("markov.w1")[-1]
    if settings.get("markov_rank") not in (None, rank):
        raise ConfigError(
            f"config.json says markov_rank={settings['markov_rank']!r}, but "
            f"{given.name('markov.w1')} {list(given.shape('markov.w1'))} shows {rank}"
        )
    return MarkovShape(kind=kind, rank=rank, confidence=_confidence(given, settings, rank))


def _says_dspark(given: Given, settings: Mapping[str, Any]) -> bool:
    rank = settings.get("markov_rank")
    return bool(rank) or (rank is None and "dspark" in _kinds(given, settings))


def _markov_kind(given: Given) -> Literal["vanilla", "gated", "rnn"]:
    if "markov.joint.weight" in given.tensors:
        return "rnn"
    return "gated" if "markov.gate.weight" in given.tensors else "vanilla"


def _confidence(
    given: Given, settings: Mapping[str, Any], rank: int
) -> Literal["none", "state", "state-and-token"]:
    has_confidence = "confidence.weight" in given.tensors
    given.agree_flag(
        "enable_confidence_head",
        has_confidence,
        "tensor 'confidence_head.proj.weight'",
        said=settings.get("enable_confidence_head"),
    )
    if not has_confidence:
        return "none"
    with_token = given.shape("confidence.weight")[-1] == hidden_size(given) + rank
    given.agree_flag(
        "confidence_head_with_markov",
        with_token,
        "columns for the previous token in 'confidence_head.proj.weight'",
        said=settings.get("confidence_head_with_markov"),
    )
    return "state-and-token" if with_token else "state"


def _markov_shapes(markov: MarkovShape, widths: Widths) -> Shapes:
    rank, hidden = markov.rank, widths.hidden
    shapes: Shapes = {"markov.w1": (widths.vocab, rank), "markov.w2": (widths.draft_vocab, rank)}
    if markov.kind == "gated":
        shapes["markov.gate.weight"] = (rank, hidden + rank)
    if markov.kind == "rnn":
        shapes["markov.joint.weight"] = (3 * rank, 2 * rank + hidden)
    if markov.confidence != "none":
        reads = hidden + (rank if markov.confidence == "state-and-token" else 0)
        shapes |= {"confidence.weight": (1, reads), "confidence.bias": (1,)}
    return shapes


def _conventions(
    given: Given, settings: Mapping[str, Any], decoder: DecoderShape, widths: Widths
) -> tuple[Conventions, frozenset[str]]:
    layers, is_stated = block_layers(
        given.config,
        num_features=widths.num_features,
        num_draft_layers=decoder.num_layers,
        num_layers=given.target.num_layers,
    )
    masks, masks_stated = _masks(settings, decoder)
    from_anchor, anchor_stated = _from_anchor(given, settings)
    stated = {
        "feature_layers": is_stated,
        "block_masks": masks_stated,
        "sample_from_anchor": anchor_stated,
    }
    declared = Conventions(
        feature_layers=layers,
        embedding="own" if "embed_tokens.weight" in given.tensors else "target",
        lm_head="own" if "lm_head.weight" in given.tensors else "target",
        norm_gain="one-plus-weight" if adds_one_to_gain(decoder.family) else "weight",
        rope_style="interleaved" if settings.get("is_neox_style") is False else "half-split",
        block_masks=masks,
        sample_from_anchor=from_anchor,
    )
    return declared, frozenset(name for name, is_said in stated.items() if not is_said)


def _from_anchor(given: Given, settings: Mapping[str, Any]) -> tuple[bool, bool]:
    """DSpark's runtime drafts from the anchor on; a speculators file that is silent does not."""
    said = settings.get("sample_from_anchor")
    if said is None:
        return "markov.w1" in given.tensors and not given.is_speculators, False
    return bool(said), True


def _masks(settings: Mapping[str, Any], decoder: DecoderShape) -> tuple[tuple[Mask, ...], bool]:
    """Full layers are trained to see the whole block, sliding ones only what came before."""
    for key in ("is_causal", "causal"):
        if settings.get(key) is not None:
            mask: Mask = "causal" if settings[key] else "bidirectional"
            return (mask,) * decoder.num_layers, True
    is_free = bool(settings.get("sliding_window_non_causal"))
    masks: tuple[Mask, ...] = tuple(
        "causal" if window and not is_free else "bidirectional" for window in decoder.windows
    )
    return masks, settings.get("sliding_window_non_causal") is not None


def _windows(settings: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    width = settings.get("swa_window_size") or settings.get("sliding_window") or 0
    kinds = settings.get("layer_types") or ()
    if kinds and len(kinds) != num_layers:
        raise ConfigError(f"layer_types names {len(kinds)} layers, the files hold {num_layers}")
    if not kinds:
        return (int(width) if settings.get("use_swa") else 0,) * num_layers
    if "sliding_attention" in kinds and not width:
        raise ConfigError("layer_types names sliding attention, but config.json gives no window")
    return tuple(int(width) if kind == "sliding_attention" else 0 for kind in kinds)


def _block_size(given: Given, settings: Mapping[str, Any]) -> int:
    size = given.count("block_size", settings)
    if size is None or size < 2:
        raise ConfigError(f"config.json: block_size={size!r} must be a number of slots from 2 on")
    return size


def _mask_token(
    given: Given,
    settings: Mapping[str, Any],
    tensors: dict[str, Tensor],
    mask_embedding: tuple[Tensor, int] | None,
) -> int:
    """The mask token, whose embedding may come in a file of its own."""
    token, hidden = settings.get("mask_token_id"), hidden_size(given)
    if mask_embedding is not None:
        embedding_D, of_file = mask_embedding
        if token not in (None, of_file) or tuple(embedding_D.shape) != (hidden,):
            raise ConfigError(
                f"mask_embedding.pt holds {list(embedding_D.shape)} values for token {of_file}, "
                f"but config.json says mask_token_id={token!r} and the head is {hidden} wide"
            )
        tensors["mask_embedding"] = embedding_D
        return of_file
    embedding = tensors.get("embed_tokens.weight")
    rows = given.target.vocab_size if embedding is None else embedding.shape[0]
    if not isinstance(token, int) or not 0 <= token < rows:
        raise ConfigError(
            f"config.json: mask_token_id={token!r} must be a token id below {rows}, the rows of "
            f"the embedding"
        )
    return token
