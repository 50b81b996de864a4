"""Small `transformers` targets with MTP modules in their files, and the layers to compare with.

Shape legend: T rows, H hidden width.
"""

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from outrider.models.adapter import Adapter, load_adapter
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Head, TargetSpec
from outrider.ops.base import Ops
from tests.models.heads.layouts import Random, write
from tests.models.heads.mtp_reference import ReferenceMTP

WINDOW = 5
BASE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "tie_word_embeddings": False,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**MOE, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
MLA = {
    **BASE,
    **ROUTED,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
MIXED = ["full_attention", "sliding_attention"]
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": ("DeepseekV3Config", MLA),
    "glm4-moe": ("Glm4MoeConfig", {**BASE, **ROUTED, "head_dim": 8, "first_k_dense_replace": 1}),
    "glm4-moe-lite": ("Glm4MoeLiteConfig", MLA),
    "qwen3-moe": ("Qwen3MoeConfig", {**BASE, **MOE, "head_dim": 8, "num_experts": 12}),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {**BASE, "head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            **BASE,
            **MOE,
            "head_dim": 8,
            "num_local_experts": 4,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
    ),
    "mimo-v2-flash": (
        "MiMoV2FlashConfig",
        {
            **BASE,
            **MOE,
            "head_dim": 8,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
    ),
}
PARTS = ("embedding_norm", "feature_norm", "norm")
NAMES = {
    "deepseek": ("enorm", "hnorm", "shared_head.norm", "eh_proj"),
    "speculators": ("token_layernorm", "hidden_layernorm", "final_layernorm", "input_proj"),
}
QWEN_NAMES = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm", "mtp.fc")


class Target(NamedTuple):
    """A target in our adapter, its modules, and a model of `transformers` that has them as layers.

    Attributes:
        donor: under eager attention; layer 2 + m is that of module m.
    """

    adapter: Adapter
    head: Head
    donor: Any

    def reference(self) -> ReferenceMTP:
        """Tables as they are used: Gemma scales embeddings, and its norms multiply by 1 + w."""
        tensors = dict(self.donor.state_dict())
        if self.donor.config.model_type.startswith("gemma"):
            tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 32**0.5
            tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
        return ReferenceMTP(self.head, tensors, self._layer, self.donor.config.rms_norm_eps)

    def _layer(self, number: int, hidden_TH: Tensor) -> Tensor:
        """One of the donor's layers over a whole sequence."""
        decoder, config = self.donor.model, self.donor.config
        position_1T = torch.arange(len(hidden_TH))[None]
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * 9
        assert self.head.spec.mtp is not None
        later = torch.ones(len(hidden_TH), len(hidden_TH)).triu(1).bool()
        if kinds[2 + number] == "sliding_attention":
            later |= torch.ones_like(later).tril(-WINDOW)
        mask = torch.zeros(later.shape).masked_fill(later, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            kind = {"layer_type": kinds[2 + number]} if _has_kinds(decoder.rotary_emb) else {}
            turning = decoder.rotary_emb(hidden_TH[None], position_1T, **kind)
            output = decoder.layers[2 + number](
                hidden_TH[None],
                attention_mask=mask[None, None],
                position_ids=position_1T,
                position_embeddings=turning,
            )
        return (output[0] if isinstance(output, tuple) else output)[0]


def make(
    folder: Path, name: str, ops: Ops, layout: str = "deepseek", num_modules: int = 1
) -> Target:
    """A random target of two layers whose modules are like its second one."""
    kind, options = TARGETS[name]
    if "layer_types" in options:
        options = {**options, "layer_types": [*MIXED, *MIXED[1:] * num_modules]}
    donor = _donor(kind, {**options, "num_hidden_layers": 2 + num_modules})
    donor.save_pretrained(folder / "donor")
    tensors = load_file(folder / "donor" / "model.safetensors")
    own = {n: t for n, t in tensors.items() if not _is_module(n, num_modules)}
    config = donor.config.to_dict() | {
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": num_modules,
    }
    for key in ("layer_types", "mlp_layer_types"):
        if config.get(key):
            config[key] = config[key][:2]
    modules = _modules(tensors, layout, num_modules)
    plain = write(folder / "plain", config, own)
    spec = TargetSpec.from_config(config, name=name, folder=plain)
    if layout == "speculators":
        said = {"speculators_model_type": "mtp", "transformer_layer_config": config}
        head = load_head(write(folder / "head", said, modules), spec)
    else:
        head = load_head(write(folder / "native", config, {**own, **modules}), spec)
    adapter = load_adapter(plain, dtype=torch.float32, device=torch.device("cpu"), ops=ops)
    return Target(adapter, head, donor)


def _donor(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _modules(tensors: dict[str, Tensor], layout: str, num_modules: int) -> dict[str, Tensor]:
    random, hidden, found = Random(4), BASE["hidden_size"], {}
    for number in range(num_modules):
        theirs = f"model.layers.{2 + number}."
        ours = {"deepseek": theirs, "speculators": f"mtp_layers.{number}."}.get(
            layout, "mtp.layers.0."
        )
        for name, tensor in tensors.items():
            if name.startswith(theirs):
                found[ours + name.removeprefix(theirs)] = tensor
        names = NAMES.get(layout)
        names = QWEN_NAMES if names is None else tuple(ours + name for name in names)
        found |= {f"{name}.weight": random.gain(hidden) for name in names[:3]}
        found[f"{names[3]}.weight"] = random(hidden, 2 * hidden)
    return found


def _is_module(name: str, num_modules: int) -> bool:
    return any(name.startswith(f"model.layers.{2 + n}.") for n in range(num_modules))


def _has_kinds(rotary: Any) -> bool:
    return "layer_type" in inspect.signature(rotary.forward).parameters
