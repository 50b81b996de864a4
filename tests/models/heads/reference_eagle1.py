"""A slow EAGLE-1 head that reads like its definition: the whole sequence in every call, no cache.

Shape legend: T rows, H width, J heads, W width of a head, V vocabulary.
"""

import torch
from torch import Tensor

from outrider.models.heads.spec import Head
from tests.models.heads.reference import ReferenceEagle3, Rows


class ReferenceEagle1(ReferenceEagle3):
    """Attention and feed-forward as of EAGLE-3; what enters and what leaves differ.

    Args:
        final_norm: of the target; needed where states are raw.
    """

    def __init__(self, head: Head, embedding_VH: Tensor, lm_head_VH: Tensor, final_norm) -> None:
        super().__init__(head, embedding_VH, lm_head_VH)
        self._final_norm = final_norm

    def fuse(self, features_TF: Tensor) -> Tensor:
        is_normed = self._spec.conventions.input_state == "normed"
        return self._final_norm(features_TF) if is_normed else features_TF

    def rows(self, inputs_TD: Tensor, tokens_T: Tensor) -> Rows:
        assert self._embedding is not None
        decoder = self._spec.decoder
        assert decoder is not None
        e, f = self._embedding[tokens_T], inputs_TD
        if "embedding_norm.weight" in self._tensors:
            e, f = self._norm(e, "embedding_norm"), self._norm(f, "feature_norm")
        pair = [e, f] if self._spec.conventions.concatenation == "embedding-first" else [f, e]
        x = torch.cat(pair, dim=-1) @ self._tensors["fc.weight"].T + self._tensors.get("fc.bias", 0)
        x = x + self._attention(x, 0, decoder)
        x = x + self._mlp(self._norm(x, "layers.0.post_attention_layernorm"), 0)
        for index in range(1, decoder.num_layers):
            x = self._later_layer(x, index, decoder)
        is_raw = self._spec.conventions.input_state == "raw"
        return Rows((self._final_norm(x) if is_raw else x) @ self._lm_head.T, x)
