"""Which family a checkpoint is of: what its config says and what its tensors show must agree."""

import fnmatch
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from outrider.errors import ConfigError, unknown
from outrider.models.heads.names import plain
from outrider.models.heads.spec import Family

Shapes = Mapping[str, tuple[int, ...]]

SPECULATORS = {
    "eagle": Family.EAGLE,
    "eagle3": Family.EAGLE3,
    "peagle": Family.PEAGLE,
    "dflash": Family.BLOCK,
    "dspark": Family.BLOCK,
    "dflash2": Family.BLOCK,
    "xpress": Family.BLOCK,
    "mtp": Family.MTP,
}
BLOCK_ARCHITECTURES = ("*DFlash*", "*DSpark*", "*Domino*")
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
# Families whose tensors alone do not say how they run, and where their config says it.
SAID_BY = {
    Family.BLOCK: "dflash_config or speculators_model_type",
    Family.MEDUSA: "medusa_num_heads or model_type 'medusa'",
    Family.HYDRA: "hydra_num_heads",
    Family.MLP_SPECULATOR: "model_type 'mlp_speculator'",
    Family.MTP: "num_nextn_predict_layers",
    Family.PARD2: "pard2",
    Family.KV: "model_type 'outrider_kv_head'",
}
_MEDUSA = re.compile(
    r"(medusa_heads?\.)?\d+\.\d+\.(linear\.)?(weight|bias)$"
    r"|(medusa_heads\.)?blocks\.\d+\.layers\.\d+\.(weight|bias)$"
)
_MTP = re.compile(r"mtp\.|.*\.eh_proj\.weight$|(model\.)?mtp_layers\.")
_EMBEDDING = re.compile(r".*(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HYDRA, _MLP = re.compile(r"hydra_mlp\."), re.compile(r"speculator\.emb\.0\.weight$")
_KV = re.compile(r"feature_norm\.weight$")
_WARP = re.compile(r"target_proj\.weight$")


class Evidence(NamedTuple):
    """A family, and what speaks for it."""

    family: Family
    reason: str


def detect(config: Mapping[str, Any], tensors: Shapes) -> Family:
    """The family of a checkpoint; never LayerSkip, which only the user can name.

    Args:
        config: the mapping in `config.json`.
        tensors: shape of every tensor in the folder's weight files, by its name there.

    Raises:
        ConfigError: config and tensors name different families, or neither names one.
    """
    shown = _show(tensors)
    claimed = _claim(config, shown)
    if claimed and claimed.family is Family.PARD and shown and shown.family is Family.DRAFT_MODEL:
        return Family.PARD
    if shown and (claimed is None or claimed.family is shown.family):
        return _agreed(shown, claimed)
    if claimed is None:
        raise ConfigError(_nothing(tensors))
    raise ConfigError(
        f"config.json says {claimed.reason}, so {claimed.family}, but the tensors show "
        f"{f'{shown.reason}, so {shown.family}' if shown else _strange(tensors)}: "
        "take config.json and weights from one checkpoint, and do not rename its keys"
    )


def _agreed(shown: Evidence, claimed: Evidence | None) -> Family:
    if claimed is None and shown.family in SAID_BY:
        raise ConfigError(
            f"the tensors show {shown.reason}, so {shown.family}, but config.json says nothing of "
            f"it: take the config.json published with these weights, with {SAID_BY[shown.family]}"
        )
    return shown.family


def _claim(config: Mapping[str, Any], shown: Evidence | None) -> Evidence | None:
    """What the config says; the first of its keys that says anything."""
    return (
        _claim_speculators(config)
        or _claim_block(config)
        or _claim_parallel(config, shown)
        or _claim_heads(config)
        or _claim_mtp(config, shown)
    )


def _claim_speculators(config: Mapping[str, Any]) -> Evidence | None:
    kind = config.get("speculators_model_type")
    if kind is None:
        return None
    if kind not in SPECULATORS:
        raise ConfigError(unknown("speculators_model_type", str(kind), list(SPECULATORS)))
    return Evidence(SPECULATORS[kind], f"speculators_model_type={kind!r}")


def _claim_block(config: Mapping[str, Any]) -> Evidence | None:
    if config.get("dflash_config"):
        return Evidence(Family.BLOCK, "dflash_config")
    for architecture in config.get("architectures") or ():
        if any(fnmatch.fnmatchcase(architecture, pattern) for pattern in BLOCK_ARCHITECTURES):
            return Evidence(Family.BLOCK, f"architecture {architecture!r}")
    return None


def _claim_parallel(config: Mapping[str, Any], shown: Evidence | None) -> Evidence | None:
    if config.get("pard2") is True or config.get("spd_type") == "pard2":
        return Evidence(Family.PARD2, "pard2")
    is_peagle = shown is not None and shown.family is Family.PEAGLE
    if config.get("pard_token") is not None and not is_peagle:
        return Evidence(Family.PARD, f"pard_token={config['pard_token']!r}")
    return None


def _claim_heads(config: Mapping[str, Any]) -> Evidence | None:
    kind = config.get("model_type")
    if config.get("medusa_num_heads") or kind == "medusa":
        return Evidence(Family.MEDUSA, "medusa_num_heads or model_type 'medusa'")
    if kind == "outrider_kv_head":
        return Evidence(Family.KV, "model_type 'outrider_kv_head'")
    if config.get("hydra_num_heads"):
        return Evidence(Family.HYDRA, f"hydra_num_heads={config['hydra_num_heads']!r}")
    if config.get("n_predict") or kind == "mlp_speculator":
        return Evidence(Family.MLP_SPECULATOR, "n_predict or model_type 'mlp_speculator'")
    return None


def _claim_mtp(config: Mapping[str, Any], shown: Evidence | None) -> Evidence | None:
    """A head's config is often a copy of its target's, so tensors of a head come first."""
    if shown and shown.family not in (Family.MTP, Family.DRAFT_MODEL):
        return None
    inner = {**config, **(config.get("text_config") or {})}
    key = next((key for key in MTP_KEYS if inner.get(key)), None)
    return Evidence(Family.MTP, f"{key}={inner[key]!r}") if key else None


def _show(tensors: Shapes) -> Evidence | None:
    """What the tensors look like, in the order of the table of formats."""
    named = _show_names(tensors)
    if named:
        return named
    head = {plain(name): shape for name, shape in tensors.items()}
    if "mask_hidden" in head:
        return Evidence(Family.PEAGLE, "a tensor 'mask_hidden'")
    body = _show_body(head)
    if body:
        return body
    if any(_MTP.match(name) for name in tensors):
        return Evidence(Family.MTP, "modules named mtp, mtp_layers or eh_proj")
    if any(_EMBEDDING.match(name) for name in tensors) and "fc.weight" not in head:
        return Evidence(Family.DRAFT_MODEL, "a full decoder")
    return None


def _show_names(names: Collection[str]) -> Evidence | None:
    for family, pattern, reason in (
        (Family.PARD2, _WARP, "a tensor 'target_proj.weight' (warp_model.bin)"),
        (Family.MEDUSA, _MEDUSA, "residual blocks per head"),
        (Family.HYDRA, _HYDRA, "tensors 'hydra_mlp.*'"),
        (Family.KV, _KV, "a tensor 'feature_norm.weight'"),
        (Family.MLP_SPECULATOR, _MLP, "a tensor 'speculator.emb.0.weight'"),
    ):
        if any(pattern.match(name) for name in names):
            return Evidence(family, reason)
    return None


def _show_body(head: Shapes) -> Evidence | None:
    """By what the first attention reads: twice its width, or its width."""
    hidden = (head.get("layers.0.self_attn.o_proj.weight") or (0,))[0]
    read = _first_attention_width(head)
    fc = head.get("fc.weight", ())
    if not hidden:
        return None
    if read == 2 * hidden:
        return Evidence(Family.EAGLE3, f"attention that reads {read} = 2 x {hidden} values")
    if not fc or read != hidden:
        return None
    if "hidden_norm.weight" in head and "layers.0.input_layernorm.weight" in head:
        return Evidence(Family.BLOCK, "fc and hidden_norm beside ordinary layers")
    if tuple(fc) == (hidden, 2 * hidden) and "layers.0.input_layernorm.weight" not in head:
        return Evidence(Family.EAGLE, f"fc {list(fc)} and a first layer without input norm")
    return None


def _first_attention_width(head: Shapes) -> int:
    for name in ("q_proj", "q_a_proj", "qkv_proj"):
        shape = head.get(f"layers.0.self_attn.{name}.weight")
        if shape:
            return shape[-1]
    return 0


def _nothing(tensors: Shapes) -> str:
    return f"no known draft head: config.json names none, and the tensors are {_strange(tensors)}"


def _strange(tensors: Shapes) -> str:
    head = {plain(name): shape for name, shape in tensors.items()}
    names = ", ".join(sorted(tensors)[:3]) or "none at all"
    read, output = _first_attention_width(head), head.get("layers.0.self_attn.o_proj.weight")
    if read and output:
        return (
            f"no known family ({names}, ...; the first attention reads {read} values and writes "
            f"{output[0]}, where EAGLE-1 and block drafters read as many as they write and "
            "EAGLE-3 reads twice as many)"
        )
    return f"no known family ({names}{', ...' if len(tensors) > 3 else ''})"
