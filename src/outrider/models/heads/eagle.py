"""Readers of EAGLE-1/2, EAGLE-3 and P-EAGLE heads, whoever wrote them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from outrider.errors import ConfigError
from outrider.models.heads.feature_layers import eagle_layers
from outrider.models.heads.given import Given, Shapes, adds_one_to_gain
from outrider.models.heads.layers import hidden_size, layer_shapes, read_decoder
from outrider.models.heads.pins import lay_down
from outrider.models.heads.spec import (
    Conventions,
    DecoderShape,
    Family,
    Head,
    HeadSpec,
    Widths,
)
from outrider.models.heads.vocabulary import take_map

NORMS_1 = ("post_attention_layernorm",)
NORMS_LATER = ("input_layernorm", "post_attention_layernorm")
NORMS_3 = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
MASK_KEYS = ("mask_token_id", "pard_token", "ptd_token_id")
# What ModelOpt may write in eagle_config, and the only value that is served.
MODELOPT = {
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}


def read_eagle(given: Given) -> Head:
    """EAGLE-1 and 2 (Li et al. 2024): `fc` over embedding and the target's last state."""
    hidden = given.agree_target("width", hidden_size(given), given.target.hidden_size)
    decoder = read_decoder(given)
    vocab = _vocabulary(given)
    has_norms = _input_norms(given)
    shapes: Shapes = {"fc.weight": (hidden, 2 * hidden)} | _bias(given, hidden)
    for index in range(decoder.num_layers):
        norms = NORMS_LATER if index else NORMS_1
        shapes |= layer_shapes(decoder, index, hidden, reads=hidden, norms=norms)
    if has_norms:
        shapes |= {"embedding_norm.weight": (hidden,), "feature_norm.weight": (hidden,)}
    optional: Shapes = {"embed_tokens.weight": (vocab, hidden)}
    if given.is_speculators:
        optional["lm_head.weight"] = (vocab, hidden)
    given.check(shapes, optional)
    spec = HeadSpec(
        family=Family.EAGLE,
        widths=Widths(target_hidden=hidden, hidden=hidden, vocab=vocab, draft_vocab=vocab),
        conventions=_shared(given, decoder),
        decoder=decoder,
        source=given.source,
    )
    return Head(lay_down(given, spec), dict(given.tensors))


def read_eagle3(given: Given) -> Head:
    """EAGLE-3 (Li et al. 2025): fused layers of the target, feedback, a vocabulary of its own."""
    return _read(given, Family.EAGLE3)


def read_peagle(given: Given) -> Head:
    """P-EAGLE: EAGLE-3 and the feature that stands where none is known yet."""
    head = _read(given, Family.PEAGLE)
    key = next((key for key in MASK_KEYS if given.values.get(key) is not None), None)
    if key is None:
        raise ConfigError(f"the head has 'mask_hidden', but config.json no {MASK_KEYS[0]}")
    token, num_tokens = given.values[key], head.spec.widths.vocab
    if not isinstance(token, int) or not 0 <= token < num_tokens:
        raise ConfigError(f"config.json: {key}={token!r} must be a token id below {num_tokens}")
    head.tensors["mask_feature"] = head.tensors["mask_feature"].flatten()
    return Head(replace(head.spec, mask_token_id=token), head.tensors)


def _read(given: Given, family: Family) -> Head:
    """What EAGLE-3 and P-EAGLE share."""
    _refuse_modelopt(given)
    hidden, decoder = hidden_size(given), read_decoder(given)
    widths = _widths(given, hidden)
    given.check(*_eagle3_shapes(given, decoder, widths))
    declared, assumed = _eagle3_conventions(given, decoder, widths)
    tensors = dict(given.tensors)
    kind = given.pinned.get("vocabulary_map", "offset")
    ids_D = take_map(tensors, num_draft=widths.draft_vocab, num_target=widths.vocab, kind=kind)
    spec = HeadSpec(
        family=family,
        widths=widths,
        conventions=replace(declared, vocabulary_map="none" if ids_D is None else kind),
        decoder=decoder,
        source=given.source,
        assumed=assumed,
    )
    return Head(lay_down(given, spec), tensors)


def _eagle3_shapes(given: Given, decoder: DecoderShape, widths: Widths) -> tuple[Shapes, Shapes]:
    """Required and optional tensors."""
    hidden, fused = widths.hidden, widths.num_features * widths.target_hidden
    shapes = layer_shapes(decoder, 0, hidden, reads=2 * hidden, norms=NORMS_3)
    for index in range(1, decoder.num_layers):
        shapes |= layer_shapes(decoder, index, hidden, reads=hidden, norms=NORMS_LATER)
    shapes["norm.weight"] = (hidden,)
    if widths.num_features:
        shapes["fc.weight"] = (hidden, fused)
        shapes |= _input_norm_shapes(given, widths)
    if "mask_feature" in given.tensors:
        shapes["mask_feature"] = (1, 1, fused)
    optional: Shapes = {"embed_tokens.weight": (widths.vocab, hidden), "fc.bias": (hidden,)}
    optional["lm_head.weight"] = (widths.draft_vocab, hidden)
    # Their own reader says more about these two than that a shape is wrong.
    maps = {name: given.shape(name) for name in ("d2t", "t2d") if name in given.tensors}
    if "lm_head.weight" not in given.tensors:
        given.agree_target("width without an lm_head of its own", hidden, widths.target_hidden)
    if "embed_tokens.weight" not in given.tensors:
        given.agree_target("width without an embedding of its own", hidden, widths.target_hidden)
    return shapes, optional | maps


def _widths(given: Given, hidden: int) -> Widths:
    feature = given.count("target_hidden_size") or hidden
    given.agree_target("target_hidden_size", feature, given.target.hidden_size)
    vocab = _vocabulary(given)
    return Widths(
        target_hidden=feature,
        hidden=hidden,
        vocab=vocab,
        draft_vocab=_draft_vocabulary(given, vocab),
        num_features=_num_features(given, feature),
    )


def _num_features(given: Given, feature: int) -> int:
    """a; 0 for a head without `fc`, which reads the target's last state."""
    says_none = _eagle_config(given).get("use_aux_hidden_state") is False
    given.agree_flag(
        "use_aux_hidden_state",
        "fc.weight" in given.tensors,
        "tensor 'fc.weight'",
        said=not says_none,
    )
    if says_none:
        return 0
    fused = given.shape("fc.weight")[1]
    if fused % feature:
        raise ConfigError(
            f"{given.name('fc.weight')} reads {fused} values, which is no multiple of the "
            f"{feature} of a feature: config.json needs the target_hidden_size of its target"
        )
    return fused // feature


def _draft_vocabulary(given: Given, vocab: int) -> int:
    for name in ("lm_head.weight", "d2t"):
        if name in given.tensors:
            return given.agree_count("draft_vocab_size", given.shape(name)[0], name)
    said = given.count("draft_vocab_size")
    return vocab if said is None else said


def _eagle3_conventions(
    given: Given, decoder: DecoderShape, widths: Widths
) -> tuple[Conventions, frozenset[str]]:
    """What the files say, and which of it they leave unsaid."""
    values, assumed = given.values, set()
    layers: tuple[int, ...] = ()
    if widths.num_features:
        layers, is_stated = eagle_layers(
            given.config, num_features=widths.num_features, num_layers=given.target.num_layers
        )
        assumed |= set() if is_stated else {"feature_layers"}
    residual = values.get("norm_before_residual")
    if residual is None:
        assumed.add("norm_before_residual")
        # What vLLM takes for such files, so what their authors measured.
        residual = values.get("speculators_model_type") == "eagle3"
    if values.get("norm_output") is None:
        assumed.add("feedback")
    declared = replace(
        _shared(given, decoder),
        feature_layers=layers,
        norm_before_residual=bool(residual),
        input_norm=_input_norm(given),
        feedback="post-norm" if values.get("norm_output") else "pre-norm",
        lm_head="own" if "lm_head.weight" in given.tensors else "target",
    )
    return declared, frozenset(assumed)


def _input_norm(given: Given) -> Literal["none", "all", "each"]:
    """Which norm stands before `fc`; flags and tensors must agree, and there is one at most."""
    has_all = "input_norm.weight" in given.tensors
    has_each = any(name.startswith("fc_norm.") for name in given.tensors)
    said = _eagle_config(given).get("norm_before_fc")
    given.agree_flag("norm_before_fc", has_all, "tensor 'input_norm.weight'")
    given.agree_flag("norm_before_fc", has_all, "tensor 'input_norm.weight'", said=said)
    given.agree_flag("fc_norm", has_each, "tensors 'fc_norm.*'")
    if has_all and has_each:
        raise ConfigError("the head has both input_norm and fc_norm: at most one can be meant")
    if has_all:
        return "all"
    return "each" if has_each else "none"


def _input_norm_shapes(given: Given, widths: Widths) -> Shapes:
    kind, feature = _input_norm(given), widths.target_hidden
    if kind == "all":
        return {"input_norm.weight": (widths.num_features * feature,)}
    if kind == "each":
        return {f"fc_norm.{index}.weight": (feature,) for index in range(widths.num_features)}
    return {}


def _shared(given: Given, decoder: DecoderShape) -> Conventions:
    return Conventions(
        embedding="own" if "embed_tokens.weight" in given.tensors else "target",
        lm_head="own" if "lm_head.weight" in given.tensors else "target",
        norm_gain="one-plus-weight" if adds_one_to_gain(decoder.family) else "weight",
        rope_style="interleaved" if given.values.get("is_neox_style") is False else "half-split",
    )


def _vocabulary(given: Given) -> int:
    said = given.count("vocab_size")
    vocab = given.target.vocab_size
    return vocab if said is None else given.agree_target("vocab_size", said, vocab)


def _bias(given: Given, hidden: int) -> Shapes:
    has_bias = "fc.bias" in given.tensors
    key = "fusion_bias" if given.is_speculators else "bias"
    given.agree_flag(key, has_bias, "tensor 'fc.bias'")
    return {"fc.bias": (hidden,)} if has_bias else {}


def _input_norms(given: Given) -> bool:
    has_norms = "embedding_norm.weight" in given.tensors
    key = "layernorms" if given.is_speculators else "add_para_norm"
    return given.agree_flag(key, has_norms, "tensor 'embedding_layernorm.weight'")


def _eagle_config(given: Given) -> Mapping[str, Any]:
    return given.config.get("eagle_config") or {}


def _refuse_modelopt(given: Given) -> None:
    for key, served in MODELOPT.items():
        said = _eagle_config(given).get(key)
        if said is not None and said is not served:
            raise ConfigError(
                f"config.json: eagle_config.{key}={said!r} is not served ({served!r} is): export "
                "the head with that setting"
            )
