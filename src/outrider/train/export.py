"""A trained decoder written as a folder that transformers and the engine load."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from outrider.train.network import Decoder, DecoderShape
from outrider.train.vocabulary import END, PAD, token_id, write_tokenizer


def export(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, bf16 weights and tokenizer into `folder`, replacing what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {
        "eos_token_id": token_id(tokenizer, END),
        "pad_token_id": token_id(tokenizer, PAD),
    }
    _write_json(folder / "config.json", {**config_of(model.shape), **ids})
    _write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    write_tokenizer(tokenizer, folder, max_positions=model.shape.max_positions)
    write_weights(_stored(model), folder / "model.safetensors")


def load_decoder(folder: Path) -> Decoder:
    """The model that `export` wrote to `folder`, in float32."""
    config = json.loads((folder / "config.json").read_text())
    shape = DecoderShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        max_positions=config["max_position_embeddings"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
    )
    model = Decoder(shape)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    return model


def config_of(shape: DecoderShape, *, dtype: str = "bfloat16") -> dict[str, object]:
    """The LlamaForCausalLM config of this shape, without token ids."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_norm_eps,
        # Readers before transformers 5 know only rope_theta.
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "torch_dtype": dtype,
    }


def _stored(model: Decoder) -> dict[str, Tensor]:
    """Weights in bf16; the tied output matrix is stored once, as the embedding."""
    return {
        name: weight.to(torch.bfloat16).contiguous().cpu()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write safetensors so that a reader sees the old file or the new one, never a part."""
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata={"format": "pt"})
    # safetensors creates files that only their owner may read.
    partial.chmod(0o644)
    partial.replace(path)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
