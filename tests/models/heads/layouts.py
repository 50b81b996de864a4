"""Small random heads, written in every published layout with its own names and config keys."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from outrider.models.heads.spec import TargetSpec

H, V, L = 16, 40, 8
HEADS, KV_HEADS, HEAD_DIM, INNER = 4, 2, 4, 24
DRAFT_IDS = (1, 2, 3, 7, 8, 12, 20, 21, 33, 39)
VD = len(DRAFT_IDS)
BOUNDARIES = (2, L // 2, L - 3)
TARGET = TargetSpec(name="tiny", family="llama", hidden_size=H, vocab_size=V, num_layers=L)
DECODER: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}
ROPE = {"rope_theta": 5000.0}
NORMS_3 = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
NORMS = ("input_layernorm", "post_attention_layernorm")


class Random:
    """Tensors from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * 0.3

    def gain(self, width: int) -> Tensor:
        return 1 + self(width)


def layer(
    random: Random,
    *,
    reads: int = H,
    hidden: int = H,
    norms: tuple[str, ...] = NORMS,
    has_qk_norm: bool = False,
    has_bias: bool = False,
) -> dict[str, Tensor]:
    """One Llama-like layer."""
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {f"{name}.weight": random.gain(hidden) for name in norms}
    for name, rows in (("q", query), ("k", key), ("v", key)):
        tensors[f"self_attn.{name}_proj.weight"] = random(rows, reads)
        if has_bias:
            tensors[f"self_attn.{name}_proj.bias"] = random(rows)
    tensors["self_attn.o_proj.weight"] = random(hidden, query)
    if has_qk_norm:
        tensors |= {f"self_attn.{name}_norm.weight": random.gain(HEAD_DIM) for name in "qk"}
    tensors["mlp.gate_proj.weight"] = random(INNER, hidden)
    tensors["mlp.up_proj.weight"] = random(INNER, hidden)
    tensors["mlp.down_proj.weight"] = random(hidden, INNER)
    return tensors


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def renamed(tensors: Mapping[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    """With the first rule that fits a name's beginning applied to it."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in rules:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        result[name] = tensor
    return result


def without(tensors: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def maps(ids: tuple[int, ...] = DRAFT_IDS, vocab: int = V) -> dict[str, Tensor]:
    """d2t as offsets, and t2d."""
    ids_D = torch.tensor(ids)
    t2d_V = torch.zeros(vocab, dtype=torch.bool)
    t2d_V[ids_D] = True
    return {"d2t": ids_D - torch.arange(len(ids)), "t2d": t2d_V}


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    file: str = "model.safetensors",
) -> Path:
    """A folder with `config.json` and one file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / file, tensors)
    return folder


def save(path: Path, tensors: Mapping[str, Any]) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)


@dataclass(frozen=True, kw_only=True)
class Eagle3:
    """One EAGLE-3 head, before anybody has written it down.

    Attributes:
        tensors: by our canonical names, without vocabulary maps.
        flags: as every layout calls them.
    """

    tensors: dict[str, Tensor]
    ids: tuple[int, ...] = DRAFT_IDS
    boundaries: tuple[int, ...] = BOUNDARIES
    flags: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        return {**DECODER, **ROPE, **self.decoder}


def random_eagle3(
    seed: int = 0,
    *,
    num_features: int = 3,
    num_layers: int = 1,
    ids: tuple[int, ...] = DRAFT_IDS,
    boundaries: tuple[int, ...] = BOUNDARIES,
    hidden: int = H,
    input_norm: str = "none",
    is_qwen: bool = False,
    own_embedding: bool = True,
    flags: Mapping[str, Any] | None = None,
) -> Eagle3:
    """A head with random norms; `input_norm` as `Conventions` has it."""
    random = Random(seed)
    decoder: dict[str, Any] = {"num_hidden_layers": num_layers, "hidden_size": hidden}
    if is_qwen:
        decoder["model_type"] = "qwen3"
    tensors = {"fc.weight": random(hidden, num_features * H)}
    for index in range(num_layers):
        reads, norms = (hidden, NORMS) if index else (2 * hidden, NORMS_3)
        made = layer(random, reads=reads, hidden=hidden, norms=norms, has_qk_norm=is_qwen)
        tensors |= prefixed(f"layers.{index}.", made)
    tensors |= {"norm.weight": random.gain(hidden), "lm_head.weight": random(len(ids), hidden)}
    own_flags = dict(flags or {})
    if own_embedding:
        tensors["embed_tokens.weight"] = random(V, hidden)
    if input_norm == "all":
        tensors["input_norm.weight"] = random.gain(num_features * H)
        own_flags["norm_before_fc"] = True
    if input_norm == "each":
        norm_names = [f"fc_norm.{index}.weight" for index in range(num_features)]
        tensors |= {name: random.gain(H) for name in norm_names}
        own_flags["fc_norm"] = True
    if hidden != H:
        decoder["target_hidden_size"] = H
    return Eagle3(tensors=tensors, ids=ids, boundaries=boundaries, flags=own_flags, decoder=decoder)


def write_eagle(folder: Path, head: Eagle3) -> Path:
    """As SafeAILab publishes: `midlayer`, a pickle, maps always, no layer ids."""
    config = {
        **head.values,
        "architectures": ["LlamaForCausalLM"],
        "draft_vocab_size": len(head.ids),
        **head.flags,
    }
    tensors = renamed(head.tensors, ("layers.0.", "midlayer.")) | maps(head.ids)
    return write(folder, config, tensors, "pytorch_model.bin")


def write_specforge(folder: Path, head: Eagle3) -> Path:
    """As SpecForge writes: `midlayer`, layer outputs in a nested key."""
    config = {
        **head.values,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(head.ids),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in head.boundaries],
            "use_aux_hidden_state": True,
        },
        **head.flags,
    }
    tensors = renamed(head.tensors, ("layers.0.", "midlayer.")) | maps(head.ids)
    return write(folder, config, tensors)


def write_modelopt(folder: Path, head: Eagle3) -> Path:
    """As NVIDIA ModelOpt exports: `layers.0`, nested layer outputs and flags, d2t alone."""
    flags = dict(head.flags)
    nested = {key: flags.pop(key) for key in ("norm_before_fc",) if key in flags}
    config = {
        **head.values,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(head.ids),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in head.boundaries],
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
            "use_aux_hidden_state": True,
            **nested,
        },
        **flags,
    }
    return write(folder, config, head.tensors | {"d2t": maps(head.ids)["d2t"]})


def write_speculators(folder: Path, head: Eagle3, kind: str = "eagle3", **extra: Any) -> Path:
    """As the library speculators writes: nested decoder config, boundaries, every flag."""
    values = {key: value for key, value in head.values.items() if key not in ROPE}
    config = {
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": {
            **values,
            "rope_parameters": {"rope_type": "default", **ROPE},
        },
        "draft_vocab_size": len(head.ids),
        "eagle_aux_hidden_state_layer_ids": list(head.boundaries),
        "target_hidden_size": head.decoder.get("target_hidden_size"),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        **head.flags,
        **extra,
    }
    return write(folder, config, head.tensors | maps(head.ids))


EAGLE3_WRITERS = {
    "eagle": write_eagle,
    "specforge": write_specforge,
    "modelopt": write_modelopt,
    "speculators": write_speculators,
}


def random_eagle1(seed: int = 0, *, num_layers: int = 1, **options: bool) -> dict[str, Tensor]:
    """EAGLE-1 by canonical names. Options: has_bias, has_norms, has_qkv_bias, own_embedding."""
    random = Random(seed)
    tensors = {"fc.weight": random(H, 2 * H)}
    if options.get("has_bias"):
        tensors["fc.bias"] = random(H)
    for index in range(num_layers):
        norms = NORMS if index else ("post_attention_layernorm",)
        made = layer(random, norms=norms, has_bias=options.get("has_qkv_bias", False))
        tensors |= prefixed(f"layers.{index}.", made)
    if options.get("has_norms"):
        tensors |= {f"{name}_norm.weight": random.gain(H) for name in ("embedding", "feature")}
    if options.get("own_embedding"):
        tensors["embed_tokens.weight"] = random(V, H)
    return tensors


HASS_NORMS = (
    ("embedding_norm.", "embedding_layernorm."),
    ("feature_norm.", "hidden_states_layernorm."),
)


def write_eagle1(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """As SafeAILab publishes: it calls itself an ordinary Llama, in a pickle."""
    config = {**DECODER, **ROPE, "architectures": ["LlamaForCausalLM"], **config}
    return write(folder, config, renamed(tensors, *HASS_NORMS), "pytorch_model.bin")


def write_speculators_eagle1(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """As older versions of speculators converted it."""
    names = renamed(
        tensors,
        ("fc.", "fusion_fc."),
        ("embedding_norm.", "embedding_layernorm."),
        ("feature_norm.", "pre_lm_head_layernorm."),
        ("layers.0.", "transformer."),
    )
    config = {
        "speculators_model_type": "eagle",
        "transformer_layer_config": {**DECODER, **ROPE},
        "fusion_bias": "fc.bias" in tensors,
        "layernorms": "embedding_norm.weight" in tensors,
        **config,
    }
    return write(folder, config, names)


def random_medusa(
    seed: int = 0, *, num_heads: int = 3, num_blocks: int = 1, rows: int = V
) -> dict[str, Tensor]:
    """Medusa by canonical names; `rows` 0 is without lm_heads."""
    random = Random(seed)
    tensors = {}
    for head in range(num_heads):
        for block in range(num_blocks):
            tensors[f"heads.{head}.blocks.{block}.weight"] = random(H, H)
            tensors[f"heads.{head}.blocks.{block}.bias"] = random(H)
        if rows:
            tensors[f"heads.{head}.lm_head.weight"] = random(rows, H)
    return tensors


def medusa_names(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Medusa's own names (also TGI's and, with a prefix, ModelOpt's and Medusa-1.0's)."""
    num_blocks = 1 + max(int(name.split(".")[3]) for name in tensors if ".blocks." in name)
    result = {}
    for name, tensor in tensors.items():
        _, head, kind, *rest = name.split(".")
        middle = f"{rest[0]}.linear.{rest[1]}" if kind == "blocks" else f"{num_blocks}.weight"
        result[f"{prefix}{head}.{middle}"] = tensor
    return result


def vllm_medusa_names(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The names of older vLLM."""
    result = {}
    for name, tensor in tensors.items():
        if name == "target_ids":
            result[f"{prefix}token_map"] = tensor
            continue
        _, head, kind, *rest = name.split(".")
        blocks = f"blocks.{head}.layers.{'.'.join(rest)}"
        result[prefix + (blocks if kind == "blocks" else f"lm_heads.{head}.weight")] = tensor
    return result


MEDUSA_CONFIG = {"medusa_num_heads": 3, "medusa_num_layers": 1}


def random_block(seed: int = 0, *, num_layers: int = 2, num_features: int = 2) -> dict[str, Tensor]:
    """DFlash by canonical names."""
    random = Random(seed)
    tensors = {"fc.weight": random(H, num_features * H), "hidden_norm.weight": random.gain(H)}
    for index in range(num_layers):
        tensors |= prefixed(f"layers.{index}.", layer(random, has_qk_norm=True))
    return tensors | {"norm.weight": random.gain(H)}


BLOCK_DECODER = {**DECODER, **ROPE, "model_type": "qwen3", "num_hidden_layers": 2}


def zlab_config(**dflash: Any) -> dict[str, Any]:
    """z-lab's config: layer outputs under `dflash_config`."""
    return {
        **BLOCK_DECODER,
        "architectures": ["DFlashDraftModel"],
        "block_size": 8,
        "num_target_layers": L,
        "layer_types": ["full_attention"] * 2,
        "dflash_config": {"mask_token_id": 39, "target_layer_ids": [1, 5], **dflash},
    }


def speculators_block_config(kind: str = "dflash", **extra: Any) -> dict[str, Any]:
    """speculators' config: boundaries at the top level."""
    return {
        "speculators_model_type": kind,
        "transformer_layer_config": BLOCK_DECODER,
        "aux_hidden_state_layer_ids": [2, 6],
        "block_size": 8,
        "mask_token_id": 39,
        "sample_from_anchor": False,
        **extra,
    }


def random_dspark(seed: int = 0, *, kind: str = "vanilla", rank: int = 6) -> dict[str, Tensor]:
    """DSpark's finish by canonical names, with a confidence head that reads the token too."""
    random = Random(seed + 100)
    tensors = {"markov.w1": random(V, rank), "markov.w2": random(V, rank)}
    if kind == "gated":
        tensors["markov.gate.weight"] = random(rank, H + rank)
    if kind == "rnn":
        tensors["markov.joint.weight"] = random(3 * rank, 2 * rank + H)
    return tensors | {"confidence.weight": random(1, H + rank), "confidence.bias": random(1)}


DSPARK_NAMES = (
    ("markov.w1", "markov_head.markov_w1.weight"),
    ("markov.w2", "markov_head.markov_w2.weight"),
    ("markov.gate.", "markov_head.gate_proj."),
    ("markov.joint.", "markov_head.joint_proj."),
    ("confidence.", "confidence_head.proj."),
)


def random_target(seed: int = 7, *, num_experts: int = 0, **options: bool) -> dict[str, Tensor]:
    """A target's own tensors, with layers of experts if there are any."""
    random = Random(seed)
    tensors = {"model.embed_tokens.weight": random(V, H), "lm_head.weight": random(V, H)}
    tensors["model.norm.weight"] = random.gain(H)
    for index in range(L):
        made = target_layer(random, num_experts=num_experts, **options)
        tensors |= prefixed(f"model.layers.{index}.", made)
    return tensors


def target_layer(random: Random, *, num_experts: int = 0, **options: bool) -> dict[str, Tensor]:
    made = layer(random, **options)
    if not num_experts:
        return made
    dense = {name: made.pop(name) for name in list(made) if name.startswith("mlp.")}
    made["mlp.gate.weight"] = random(num_experts, H)
    for expert in range(num_experts):
        own = {name.replace("mlp.", f"mlp.experts.{expert}."): t for name, t in dense.items()}
        made |= own
    return made


def random_mtp(
    seed: int = 0,
    *,
    num_modules: int = 1,
    own_vocabulary: bool = False,
    num_experts: int = 0,
    **options: bool,
) -> dict[str, Tensor]:
    """MTP modules by canonical names."""
    random = Random(seed)
    tensors: dict[str, Tensor] = {}
    for index in range(num_modules):
        names = ("embedding_norm", "feature_norm", "norm")
        made = {f"{name}.weight": random.gain(H) for name in names}
        made["fc.weight"] = random(H, 2 * H)
        made |= prefixed("layer.", target_layer(random, num_experts=num_experts, **options))
        if own_vocabulary:
            made |= {name: random(V, H) for name in ("embed_tokens.weight", "lm_head.weight")}
        tensors |= prefixed(f"modules.{index}.", made)
    return tensors


def mtp_names(
    tensors: Mapping[str, Tensor], prefix: str, parts: Mapping[str, str], first: int = 0
) -> dict[str, Tensor]:
    """With `prefix` formatted by a module's number, and its parts called as `parts` says."""
    result = {}
    for name, tensor in tensors.items():
        _, index, *rest = name.split(".")
        part = ".".join(rest)
        for ours, theirs in (*parts.items(), ("layer.", "")):
            if part.startswith(ours):
                part = theirs + part.removeprefix(ours)
                break
        result[prefix.format(int(index) + first) + part] = tensor
    return result


DEEPSEEK_PARTS = {
    "embedding_norm.": "enorm.",
    "feature_norm.": "hnorm.",
    "fc.": "eh_proj.",
    "norm.": "shared_head.norm.",
    "lm_head.": "shared_head.head.",
}
PROJECTED_PARTS = {
    "embedding_norm.": "token_layernorm.",
    "feature_norm.": "hidden_layernorm.",
    "fc.": "input_proj.",
    "norm.": "final_layernorm.",
}
QWEN_NAMES = (
    ("modules.0.embedding_norm.", "mtp.pre_fc_norm_embedding."),
    ("modules.0.feature_norm.", "mtp.pre_fc_norm_hidden."),
    ("modules.0.layer.", "mtp.layers.0."),
    ("modules.0.", "mtp."),
)
TARGET_CONFIG = {**DECODER, **ROPE, "num_hidden_layers": L}
