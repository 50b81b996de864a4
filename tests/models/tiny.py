"""Tiny random checkpoints in Hugging Face layout, and passes of a network over a small KV pool."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from outrider.models.base import Network
from outrider.ops.base import LayerKV, Span

VOCAB = 96
MAX_POSITIONS = 128
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def tiny_model(config_class: str, **options: Any) -> Any:
    """A random model of `transformers` whose biases and norms are random too."""
    config = getattr(transformers, config_class)(**{**BASE, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def write_tiny(folder: Path, config_class: str = "LlamaConfig", **options: Any) -> Any:
    """Writes a tiny random checkpoint into `folder` and returns the model."""
    model = tiny_model(config_class, **options)
    model.save_pretrained(folder)
    return model


def reference_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """What `transformers` says of every position of one sequence, logits_TV."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest deviation, relative to the scale of the logits."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


class Passes:
    """Passes of a network over a KV pool that starts full of noise, as a used one is."""

    def __init__(self, network: Network, num_slots: int = 256) -> None:
        self.network = network
        spec = network.spec
        self.kv = [
            LayerKV(
                torch.randn(num_slots, shape.num_heads, shape.key_width).to(
                    spec.device, spec.dtype
                ),
                torch.randn(num_slots, shape.num_heads, shape.value_width).to(
                    spec.device, spec.dtype
                ),
            )
            for shape in spec.kv_shapes
        ]

    def __call__(self, *rows: tuple[Span, Sequence[int]]) -> list[Tensor]:
        """One pass over spans with their new tokens; logits of all rows, span by span."""
        spans = [span for span, _ in rows]
        tokens = [token for _, span_tokens in rows for token in span_tokens]
        device = self.network.spec.device
        layout = self.network.ops.layout(spans, device)
        wanted_R = torch.arange(len(tokens), device=device)
        tokens_N = torch.tensor(tokens, device=device)
        logits_NV = self.network.forward(tokens_N, layout, self.kv, wanted_R)
        return list(logits_NV.cpu().split([span.num_rows for span in spans]))

    def move(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Copies KV from slots to slots."""
        for layer in self.kv:
            layer.keys[list(new)] = layer.keys[list(old)]
            layer.values[list(new)] = layer.values[list(old)]
