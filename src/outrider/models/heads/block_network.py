"""BlockNetwork: a head that drafts a block of tokens in one pass (DFlash, and DSpark's body).

Chen et al. 2026, "DFlash: block diffusion for flash speculative decoding"; checkpoints 5.4. Each
committed position s gives a row c_s, made of features of the target alone, whose keys and values
every layer has; a block of slots at positions S, S + 1, ... reads them. The first slot holds the
last committed token, the others a mask; they see one another as each layer was trained to, and
leave nothing behind.

Shape legend: N rows of a pass, B sequences, T slots of a block, K depths drafted, R = B K, A
boundaries between layers of the target, H its hidden width, C that of all features, D width of the
head, L its layers, G its key/value heads, W width of one, V vocabulary of the target, U of the
head, M width of what a finish remembers.
"""

from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.base import KVShape, ModelSpec
from outrider.models.config import DecoderConfig
from outrider.models.decoder import RMSNorm
from outrider.models.heads.block_finish import Finish
from outrider.models.heads.block_layers import BlockLayer, ContextProducts
from outrider.models.heads.block_past import Past, Sight
from outrider.models.heads.block_weights import decoder_config, plain_tensors
from outrider.models.heads.fingerprint import head_fingerprint
from outrider.models.heads.network import HeadOutput, ShownTarget
from outrider.models.heads.spec import Head
from outrider.models.rope import RopeTable, Turn
from outrider.models.runner import Blocks, upload
from outrider.models.weights import Weights
from outrider.ops.base import LayerKV, Layout, Ops, Span


class BlockOutput(NamedTuple):
    """What the slots of blocks say, K of each sequence, one for every depth from 1 on.

    Attributes:
        states_RD: normed.
        logits_RU: float32, over the head's own vocabulary.
    """

    states_RD: Tensor
    logits_RU: Tensor


class Told(NamedTuple):
    """Laws of slots, given the token before each.

    Attributes:
        logits_RV: float32, over the target's vocabulary.
        memory_RM: what the slots below these are told.
        sure_R: estimated probability that the token drafted here stands; None without an estimate.
    """

    logits_RV: Tensor
    memory_RM: Tensor
    sure_R: Tensor | None


class BlockNetwork:
    """One head; all of its conventions are honoured.

    It is a `RowNetwork` whose rows say nothing: `forward` only writes what blocks will read.

    Attributes:
        boundaries: of the target's states that it reads, rising.
        num_drafts: tokens of a block that are drafted.
        finish: DSpark's, if it has one; then laws depend on the token before.

    Args:
        ops: kernels; they pack the weights.

    Raises:
        ConfigError: a convention asks for something of the target's that does not fit.
    """

    def __init__(self, head: Head, target: ShownTarget, ops: Ops) -> None:
        spec = head.spec
        chosen = spec.conventions
        assert spec.block_size is not None
        _check(head, target)
        config = decoder_config(spec, target)
        tensors = plain_tensors(head, target)
        self.ops = ops
        self.spec = _model_spec(head, config, target, tensors)
        self.boundaries = tuple(sorted(set(chosen.feature_layers)))
        self.block_size = spec.block_size
        self.num_drafts = spec.block_size - (not chosen.sample_from_anchor)
        self.finish = Finish(spec.markov, tensors, ops) if spec.markov else None
        self._order = [self.boundaries.index(boundary) for boundary in chosen.feature_layers]
        self._is_causal = all(mask == "causal" for mask in chosen.block_masks)
        self._first = 0 if chosen.sample_from_anchor else 1
        self._scale = spec.logit_scale
        self._target = target
        self._rope = RopeTable(config.rope, dtype=self.spec.dtype, device=self.spec.device)
        self._ids_U = tensors.get("target_ids")
        self._embedding_VD = tensors["embed_tokens.weight"] if chosen.embedding == "own" else None
        mask_D = tensors.get("mask_embedding")
        self._mask_D = self._embed_mask(spec.mask_token_id) if mask_D is None else mask_D
        self._fuse = ops.linear(tensors["fc.weight"])
        self._feature_norm = RMSNorm(tensors["hidden_norm.weight"], config.norm_eps)
        self._norm = RMSNorm(tensors["norm.weight"], config.norm_eps)
        has_head = chosen.lm_head == "own"
        self._lm_head = ops.linear(tensors["lm_head.weight"]) if has_head else None
        self._context = ContextProducts(config, tensors, ops)
        weights = Weights(dict(tensors), dtype=self.spec.dtype, device=self.spec.device)
        self._layers = [
            BlockLayer(config, weights, index, Sight(mask == "causal", layer.window.sliding), ops)
            for index, (layer, mask) in enumerate(
                zip(config.layers, chosen.block_masks, strict=True)
            )
        ]

    def read(self, tapped_ARH: Tensor) -> Tensor:
        """c_RD of positions whose states at `boundaries` are given."""
        fused_RC = torch.cat([tapped_ARH[place] for place in self._order], dim=-1)
        return self._feature_norm(self._fuse(fused_RC))

    def forward(
        self,
        tokens_N: Tensor,
        inputs_ND: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
    ) -> HeadOutput:
        """Writes keys and values of committed rows, fed with what `read` made of them.

        Tokens are not looked at, and there is nothing to say: no row may be wanted.
        """
        assert not len(wanted_R), "only blocks have logits"
        keys_NLGW, values_NLGW = self._context(inputs_ND, self._rope.at(layout))
        for index, layer_kv in enumerate(kv):
            self.ops.write_kv(layer_kv, keys_NLGW[:, index], values_NLGW[:, index], layout)
        nothing_RV = torch.empty(0, self.spec.vocab_size, device=inputs_ND.device)
        return HeadOutput(nothing_RV, inputs_ND[:, :0])

    @torch.inference_mode()
    def draft(
        self,
        roots: Items[int],
        tables: Items[Blocks],
        lengths: Items[int],
        depth: int,
        kv: list[LayerKV],
    ) -> BlockOutput:
        """Runs one block for each sequence.

        A block is run whole, for its slots were trained beside all others; only where no layer lets
        them see later ones, those beyond the last wanted depth are left out.

        Args:
            roots: the last committed token of each.
            tables, lengths: where its rows lie, and how many there are.
            depth: K, at most `num_drafts`.
        """
        num_slots = self._first + depth if self._is_causal else self.block_size
        past = Past(tables, lengths, num_slots, self.spec.device)
        hidden_ND, turn = self._enter(roots, num_slots), self._turn(past, num_slots)
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            hidden_ND = layer(hidden_ND, turn, past, layer_kv)
        hidden_BTD = hidden_ND.unflatten(0, (-1, num_slots))
        wanted_BKD = hidden_BTD[:, self._first : self._first + depth]
        states_RD = self._norm(wanted_BKD.flatten(0, 1))
        return BlockOutput(states_RD, self._logits(states_RD) * self._scale)

    @torch.inference_mode()
    def correct(
        self, output: BlockOutput, slots: list[int], previous: list[int], memory_RM: Tensor
    ) -> Told:
        """Laws of some slots, each after one token; for a head with a finish.

        Args:
            slots: which of the output's; the same may come more than once.
            previous: the token before each.
            memory_RM: of the slots above each; zeros at depth 1.
        """
        device = self.spec.device
        return self._correct(output, upload(slots, device), upload(previous, device), memory_RM)

    @torch.inference_mode()
    def follow(
        self,
        output: BlockOutput,
        firsts: list[int],
        roots: list[int],
        depth: int,
        *,
        wants_peaks: bool = False,
    ) -> Tensor:
        """The argmax chains of B blocks, each token corrected by that before it; stays here.

        Args:
            firsts: slot of depth 1 of each. roots: the last committed tokens.
            depth: K.
            wants_peaks: whether anybody asks how likely the tokens are.

        Returns:
            float64 [3, B, K]: tokens (-1 where logits are no numbers), how sure the finish is of
            them (1 without an estimate), and their probability by their law (1 if nobody asks).
        """
        assert self.finish is not None
        device = self.spec.device
        first_B, previous_B = upload(firsts, device), upload(roots, device)
        width = self.finish.memory_width
        memory_BM = torch.zeros(len(roots), width, dtype=self.spec.dtype, device=device)
        one_B = torch.ones(len(roots), dtype=torch.float64, device=device)
        steps = []
        for level in range(depth):
            logits_BV, memory_BM, sure_B = self._correct(
                output, first_B + level, previous_B, memory_BM
            )
            peak_B, previous_B = logits_BV.max(dim=1)
            token_B = torch.where(peak_B.isfinite(), previous_B, -1).double()
            likely_B = logits_BV.softmax(dim=1).amax(dim=1).double() if wants_peaks else one_B
            steps.append(
                torch.stack((token_B, one_B if sure_B is None else sure_B.double(), likely_B))
            )
        return torch.stack(steps, dim=2)

    def _correct(
        self, output: BlockOutput, slots_R: Tensor, previous_R: Tensor, memory_RM: Tensor
    ) -> Told:
        assert self.finish is not None
        states_RD = output.states_RD.index_select(0, slots_R)
        added_RU, memory_RM, sure_R = self.finish(states_RD, previous_R, memory_RM)
        logits_RU = output.logits_RU.index_select(0, slots_R) + added_RU
        return Told(self.scatter(logits_RU), memory_RM, sure_R)

    def scatter(self, logits_RU: Tensor) -> Tensor:
        """logits_RV over the target's vocabulary; -inf for tokens the head does not know."""
        if self._ids_U is None:
            return logits_RU
        shape = (len(logits_RU), self.spec.vocab_size)
        return logits_RU.new_full(shape, float("-inf")).index_copy_(1, self._ids_U, logits_RU)

    def _enter(self, roots: Items[int], num_slots: int) -> Tensor:
        """Embeddings of all slots, block after block."""
        root_BD = self._embed(upload(list(roots), self.spec.device))
        mask_BTD = self._mask_D.expand(len(roots), num_slots - 1, -1)
        return torch.cat((root_BD.unsqueeze(1), mask_BTD), dim=1).flatten(0, 1)

    def _turn(self, past: Past, num_slots: int) -> Turn:
        reach = Span((), past.longest, num_slots)
        positions_N = past.positions_N
        return self._rope.at(Layout(spans=[reach], positions_N=positions_N, slots_N=positions_N))

    def _embed(self, tokens_N: Tensor) -> Tensor:
        if self._embedding_VD is None:
            return self._target.embed(tokens_N)
        return F.embedding(tokens_N, self._embedding_VD)

    @torch.inference_mode()
    def _embed_mask(self, token: int | None) -> Tensor:
        assert token is not None, "every block drafter has a mask token"
        return self._embed(upload([token], self.spec.device))[0]

    def _logits(self, states_RD: Tensor) -> Tensor:
        if self._lm_head is not None:
            return self._lm_head(states_RD).float()
        logits_RV = self._target.head(states_RD)
        return logits_RV if self._ids_U is None else logits_RV.index_select(1, self._ids_U)


def _check(head: Head, target: ShownTarget) -> None:
    """ConfigError where the target's embedding or head cannot stand in for the head's own."""
    spec, chosen = head.spec, head.spec.conventions
    hidden = spec.widths.hidden
    for part, origin in (("embedding", chosen.embedding), ("lm_head", chosen.lm_head)):
        if origin == "target" and hidden != target.spec.hidden_size:
            raise ConfigError(
                f"convention {part}='target': the head is {hidden} wide, its target "
                f"{target.spec.hidden_size}; use 'own'"
            )
    token, vocab = spec.mask_token_id, target.spec.vocab_size
    is_beyond = token is not None and token >= vocab and "mask_embedding" not in head.tensors
    if chosen.embedding == "target" and is_beyond:
        raise ConfigError(
            f"convention embedding='target': mask_token_id={token} is beyond the {vocab} tokens of "
            f"{target.spec.name!r}; use 'own'"
        )


def _model_spec(
    head: Head, config: DecoderConfig, target: ShownTarget, tensors: dict[str, Tensor]
) -> ModelSpec:
    shape = KVShape(config.num_kv_heads, config.head_dim, config.head_dim)
    return ModelSpec(
        name=head.spec.source,
        family=config.family,
        vocab_size=target.spec.vocab_size,
        max_positions=config.max_positions,
        eos_token_ids=target.spec.eos_token_ids,
        kv_shapes=(shape,) * len(config.layers),
        dtype=target.spec.dtype,
        device=target.spec.device,
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        fingerprint=head_fingerprint(head),
        mask_token_id=head.spec.mask_token_id,
    )
