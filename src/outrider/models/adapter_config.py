"""What a `transformers` configuration tells before weights are read: whether the model runs."""

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from outrider.errors import ModelError

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class AutoModelForCausalLM picks; None for code that comes with the checkpoint."""
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type!r} is an encoder-decoder: only causal LMs can run")
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        found = mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    raise ModelError(f"{config.model_type!r} is no causal LM in this version of transformers")


def refuse(config: PretrainedConfig, network: type[PreTrainedModel] | None) -> None:
    """ModelError for what can be known before any weight is read."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    states = sorted(set(kinds) - ATTENTION_LAYERS)
    is_recurrent = network is not None and network._is_stateful and not kinds
    if states or is_recurrent:
        raise ModelError(
            f"{config.model_type!r} has layers that keep more than keys and values "
            f"({', '.join(states) or 'recurrent'}): their state could not be rolled back"
        )
    if network is not None and not network._supports_attention_backend:
        raise ModelError(
            f"{network.__name__} does not use the attention interface of transformers: logits "
            "over our KV would be silently wrong"
        )


def max_positions(config: PretrainedConfig) -> int:
    """Longest context on which the model is a function of a token's own path alone.

    With "longrope" the rotation of all tokens changes once any of them passes the original
    length, so contexts end there.
    """
    text = config.get_text_config(decoder=True)
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"{config.model_type!r} states no max_position_embeddings in config.json")
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type") == "longrope":
            length = min(length, rope.get("original_max_position_embeddings", length))
    return length
