"""A Llama checkpoint in float32 as GGUF, f32 or q8_0: `to_gguf.py FOLDER FILE.gguf`.

Runs in llama.cpp's environment. No tokenizer goes in: the comparison feeds token ids.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Q8_0 = GGMLQuantizationType.Q8_0
BLOCK = 32  # values that share a scale


def convert(folder: Path, out: Path, *, is_q8: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(out, "llama")
    _write_shape(writer, config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        for kind, num_heads in heads.items():
            if stem.endswith(kind):
                weight = _interleaved(weight, num_heads)
        if is_q8 and weight.ndim == 2 and weight.shape[1] % BLOCK == 0:
            writer.add_tensor(_name(stem), quants.quantize(weight, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(_name(stem), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: GGUFWriter, config: dict[str, int]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head reordered: llama.cpp rotates neighbours, transformers the two halves."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _name(stem: str) -> str:
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.weight"


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    convert(source, target, is_q8=target.stem.endswith("q8_0"))
