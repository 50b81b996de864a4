"""EAGLE-3 heads written down: in the layout of the library speculators, or that of EAGLE.

The first is what vLLM and we read without a guess; the second has the keys of SafeAILab's EAGLE,
with the layer ids where SpecForge and SGLang look for them. Every flag is written, because what
readers assume where one is absent differs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.heads.spec import HeadSpec
from outrider.train.export import write_weights
from outrider.train.heads.files import to_store, write_json, write_sidecar
from outrider.train.heads.shape import rope_values
from outrider.train.heads.teacher import Teacher

WEIGHTS = "model.safetensors"
SPECULATORS_VERSION = "0.9.0"  # whose layout this is
MIDLAYER = ("layers.0.", "midlayer.")


class Written(NamedTuple):
    """One head on its way into files.

    Attributes:
        tensors: by canonical name. ids_D: its draft vocabulary. depths: that it was trained for.
        about: facts for the sidecar. dtype: of the weights in the files.
    """

    spec: HeadSpec
    tensors: Mapping[str, Tensor]
    ids_D: Tensor | None
    depths: int
    teacher: Teacher
    about: Mapping[str, Any]
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def write_speculators(folder: Path, head: Written) -> None:
    """As `speculators` writes: a nested decoder config, boundaries at the top level."""
    spec, target = head.spec, head.teacher.target
    config = {
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": spec.widths.draft_vocab,
        "target_hidden_size": spec.widths.target_hidden,
        "eagle_aux_hidden_state_layer_ids": list(spec.conventions.feature_layers),
        **_flags(spec),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": head.dtype_name,
        "transformer_layer_config": _decoder_values(head),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": head.depths,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": target.name,
                "architectures": list(head.teacher.values.get("architectures") or []),
            },
        },
    }
    tensors = to_store(head.tensors, head.dtype) | _maps(head, always=False)
    _write(folder, config, tensors, head)


def write_eagle(folder: Path, head: Written) -> None:
    """As SpecForge writes, which SafeAILab's own code reads: `midlayer`, layer outputs nested.

    Raises:
        ConfigError: the embedding is read, which is the output of no layer.
    """
    spec = head.spec
    layers = spec.conventions.feature_layers
    if 0 in layers:
        raise ConfigError(
            f"feature_layers={list(layers)}: layout 'eagle' names outputs of layers, and 0 is the "
            "embedding; choose others, or layout 'speculators'"
        )
    config = {
        **_decoder_values(head),
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": spec.widths.draft_vocab,
        "target_hidden_size": spec.widths.target_hidden,
        "rope_theta": spec.decoder.rope.theta if spec.decoder else None,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in layers],
            "use_aux_hidden_state": True,
        },
        **_flags(spec),
        "tie_word_embeddings": False,
    }
    old, new = MIDLAYER
    tensors = {
        name.replace(old, new) if name.startswith(old) else name: tensor
        for name, tensor in to_store(head.tensors, head.dtype).items()
    }
    _write(folder, config, tensors | _maps(head, always=True), head)


LAYOUTS: dict[str, Callable[[Path, Written], None]] = {
    "speculators": write_speculators,
    "eagle": write_eagle,
}


def _write(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], head: Written
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_weights(tensors, folder / WEIGHTS)
    chosen = head.spec.conventions
    conventions = {
        "feature_layers": list(chosen.feature_layers),
        "norm_before_residual": chosen.norm_before_residual,
        "input_norm": chosen.input_norm,
        "feedback": chosen.feedback,
    }
    write_sidecar(folder, conventions, head.about)


def _flags(spec: HeadSpec) -> dict[str, bool]:
    chosen = spec.conventions
    return {
        "norm_before_residual": chosen.norm_before_residual,
        "norm_before_fc": chosen.input_norm == "all",
        "fc_norm": chosen.input_norm == "each",
        "norm_output": chosen.feedback == "post-norm",
    }


def _decoder_values(head: Written) -> dict[str, Any]:
    """The head's own layers, as the config of a Llama."""
    shape, widths = head.spec.decoder, head.spec.widths
    assert shape is not None
    return {
        "model_type": shape.family,
        "hidden_size": widths.hidden,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": widths.vocab,
        "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": shape.rope.max_positions,
        "rope_parameters": {
            **rope_values(shape.rope),
            "partial_rotary_factor": shape.rope.width / shape.head_dim,
        },
        "hidden_act": "silu",
        "attention_bias": shape.has_qkv_bias,
        "mlp_bias": False,
        "layer_types": ["full_attention"] * shape.num_layers,
        "torch_dtype": head.dtype_name,
    }


def _maps(head: Written, *, always: bool) -> dict[str, Tensor]:
    """d2t, the offset from each draft id to the target's, and t2d, which tokens it can say."""
    num_target, ids_D = head.spec.widths.vocab, head.ids_D
    if ids_D is None:
        if not always:
            return {}
        ids_D = torch.arange(num_target)
    ids_D = ids_D.cpu()
    t2d_V = torch.zeros(num_target, dtype=torch.bool)
    t2d_V[ids_D] = True
    return {"d2t": ids_D - torch.arange(len(ids_D)), "t2d": t2d_V}
