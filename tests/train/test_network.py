"""The training network is transformers' Llama, weight for weight and logit for logit."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from outrider.train.export import config_of
from outrider.train.network import Decoder, DecoderShape
from tests.train.conftest import TINY, make_decoder


@pytest.fixture
def llama(tiny_decoder: Decoder) -> LlamaForCausalLM:
    fields = {**config_of(TINY, dtype="float32"), "eos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    model.load_state_dict(tiny_decoder.state_dict())
    return model


def test_state_dict_has_the_keys_of_llama(tiny_decoder: Decoder, llama: LlamaForCausalLM) -> None:
    assert tiny_decoder.state_dict().keys() == llama.state_dict().keys()


def test_logits_equal_transformers(tiny_decoder: Decoder, llama: LlamaForCausalLM) -> None:
    tokens_BT = torch.randint(0, TINY.vocab_size, (2, 40))
    with torch.no_grad():
        assert (tiny_decoder(tokens_BT) - llama(tokens_BT).logits).abs().max() < 1e-5


def test_weights_follow_the_seed() -> None:
    first, again, other = (make_decoder(seed=seed).lm_head.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("field", "value"), [("num_kv_heads", 3), ("head_dim", 7)])
def test_impossible_shape_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=str(value)):
        DecoderShape(**{**vars(TINY), field: value})
