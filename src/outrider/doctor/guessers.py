"""What drafts say along a text, position by position, if all they drafted were the text itself.

Row t is what is drafted once token t + 1 is committed; its guess at depth d is of token t + 2 + d.

Shape legend: T tokens, N rows, K depths, A boundaries, H hidden width, V vocabulary of the target.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.doctor.evidence import run_through, slots_for
from outrider.models.base import Network
from outrider.models.heads.block_network import BlockNetwork
from outrider.models.heads.eagle_network import EagleNetwork
from outrider.models.heads.kv_network import KVNetwork, as_lean
from outrider.models.heads.medusa_network import MedusaNetwork
from outrider.models.heads.mtp_network import MTPNetwork
from outrider.models.heads.network import RowNetwork, ShownTarget
from outrider.models.heads.spec import Family, Head
from outrider.models.heads.teacher_forcing import teacher_forced, teacher_forced_in_parallel
from outrider.models.runner import upload
from outrider.ops.base import Span


class Guesser(Protocol):
    """A draft that is led along texts.

    Attributes:
        boundaries: of the target's states that it reads.
        max_depth: deepest guess; None is any.
    """

    boundaries: tuple[int, ...]
    max_depth: int | None

    def guess(
        self, tokens: Items[int], states: Mapping[int, Tensor], num_depths: int
    ) -> list[Tensor]:
        """Per depth d logits_NV of rows 0 to T - 2 - d.

        Args:
            states: by boundary, [T, H].
        """
        ...


def guesser_of(head: Head, target: ShownTarget) -> Guesser:
    """The head on its target. ConfigError where a convention cannot be run with these two."""
    return MAKERS[head.spec.family](head, target)


class RowGuesser:
    """EAGLE and MTP heads; P-EAGLE's, which draft all depths in one pass, where it has a mask."""

    max_depth: int | None = None

    def __init__(self, network: RowNetwork, mask: tuple[int, Tensor] | None = None) -> None:
        self.boundaries = network.boundaries
        self._network = network
        self._mask = mask

    def guess(
        self, tokens: Items[int], states: Mapping[int, Tensor], num_depths: int
    ) -> list[Tensor]:
        tapped_ATH = torch.stack([states[boundary] for boundary in self.boundaries])
        if self._mask is None:
            return teacher_forced(self._network, tokens, tapped_ATH, num_depths)
        token, input_1D = self._mask
        return teacher_forced_in_parallel(
            self._network,
            tokens,
            tapped_ATH,
            num_depths,
            mask_token_id=token,
            mask_input_1D=input_1D,
        )


class MedusaGuesser:
    """Head i guesses depth i from the state alone."""

    def __init__(self, network: MedusaNetwork) -> None:
        self.boundaries = network.boundaries
        self.max_depth: int | None = network.num_heads
        self._network = network

    def guess(
        self, tokens: Items[int], states: Mapping[int, Tensor], num_depths: int
    ) -> list[Tensor]:
        num_rows = len(tokens) - 1
        states_NH = states[self.boundaries[0]][:num_rows]
        logits_NKV = self._network.forward(states_NH, num_depths)
        return [logits_NKV[: num_rows - depth, depth] for depth in range(num_depths)]


class BlockGuesser:
    """A block behind every position."""

    def __init__(self, network: BlockNetwork) -> None:
        self.boundaries = network.boundaries
        self.max_depth: int | None = network.num_drafts
        self._network = network

    @torch.inference_mode()
    def guess(
        self, tokens: Items[int], states: Mapping[int, Tensor], num_depths: int
    ) -> list[Tensor]:
        network, num_rows = self._network, len(tokens) - 1
        device = network.spec.device
        pool = KVPool(network.spec.kv_shapes, num_rows, 1, network.spec.dtype, device)
        tapped_ANH = torch.stack([states[boundary][:num_rows] for boundary in self.boundaries])
        layout = network.ops.layout([Span(range(num_rows), 0, num_rows)], device)
        nobody_R = torch.empty(0, dtype=torch.long, device=device)
        rows_ND = network.read(tapped_ANH)
        network.forward(upload(list(tokens[1:]), device), rows_ND, layout, pool.layers, nobody_R)
        table = Slots(array("i", range(num_rows)))
        lengths = range(1, num_rows + 1)
        output = network.draft(tokens[1:], [table] * num_rows, lengths, num_depths, pool.layers)
        if network.finish is None:
            laws_NKV = network.scatter(output.logits_RU).unflatten(0, (num_rows, num_depths))
            return [laws_NKV[: num_rows - depth, depth] for depth in range(num_depths)]
        memory_NM = torch.zeros(
            num_rows, network.finish.memory_width, dtype=network.spec.dtype, device=device
        )
        logits = []
        for depth in range(num_depths):
            count = num_rows - depth
            slots = [row * num_depths + depth for row in range(count)]
            previous = list(tokens[1 + depth :])
            told = network.correct(output, slots, previous, memory_NM[:count])
            logits.append(told.logits_RV)
            memory_NM = told.memory_RM
        return logits


class KVGuesser:
    """A head over the target's own keys and values, which one more pass of the target gives."""

    max_depth: int | None = None

    def __init__(self, network: KVNetwork) -> None:
        self.boundaries: tuple[int, ...] = network.boundaries
        self._network = network

    @torch.inference_mode()
    def guess(
        self, tokens: Items[int], states: Mapping[int, Tensor], num_depths: int
    ) -> list[Tensor]:
        network, num_rows = self._network, len(tokens) - 1
        device = network.spec.device
        pool = slots_for(network.target, len(tokens) + num_rows * num_depths)
        run_through(network.target, tokens, (), pool.layers)
        inputs_NH = network.read(states[self.boundaries[0]][:num_rows])
        logits = []
        for depth in range(num_depths):
            count = num_rows - depth
            spans = [
                Span([*range(t + 1), *_own(len(tokens), num_rows, t, depth + 1)], t + 1 + depth, 1)
                for t in range(count)
            ]
            output = network.forward(
                upload(list(tokens[1 + depth :]), device),
                inputs_NH[:count],
                network.rows(spans, range(1, count + 1)),
                pool.layers,
                torch.arange(count, device=device),
            )
            inputs_NH = output.feedback_ND
            logits.append(output.logits_RV)
        return logits


class ModelGuesser:
    """A whole decoder of the target's vocabulary; one that has a mask token drafts in parallel.

    Args:
        vocab_size: of the target; where the two differ by padding, laws are cut or filled up.
    """

    boundaries: tuple[int, ...] = ()
    max_depth: int | None = None

    def __init__(self, network: Network, vocab_size: int) -> None:
        self._network = network
        self._vocab_size = vocab_size
        self._mask = network.spec.mask_token_id

    @torch.inference_mode()
    def guess(
        self, tokens: Items[int], states: Mapping[int, Tensor], num_depths: int
    ) -> list[Tensor]:
        last = self._network.spec.vocab_size - 1
        tokens = [min(token, last) for token in tokens]
        num_masks = 0 if self._mask is None else num_depths - 1
        pool = slots_for(self._network, len(tokens) * (1 + num_masks))
        logits_NV, _ = run_through(self._network, tokens, range(1, len(tokens)), pool.layers)
        logits_NV = self._fitted(logits_NV)
        if self._mask is None:
            return [logits_NV[depth:] for depth in range(num_depths)]
        if not num_masks:
            return [logits_NV]
        masked_NKV = self._behind(self._mask, len(tokens), num_masks, pool)
        num_rows = len(tokens) - 1
        later = [masked_NKV[: num_rows - depth, depth - 1] for depth in range(1, num_depths)]
        return [logits_NV, *later]

    def _behind(self, mask: int, num_tokens: int, num_masks: int, pool: KVPool) -> Tensor:
        """logits_NKV of masks behind tokens 1, 2, ..."""
        network, num_rows = self._network, num_tokens - 1
        device = network.spec.device
        spans = [
            Span([*range(t + 2), *_own(num_tokens, num_tokens, t, num_masks)], t + 2, num_masks)
            for t in range(num_rows)
        ]
        count = num_rows * num_masks
        logits_RV = network.forward(
            upload([mask] * count, device),
            network.ops.layout(spans, device),
            pool.layers,
            torch.arange(count, device=device),
        )
        laws_NKV: Tensor = self._fitted(logits_RV).unflatten(0, (num_rows, num_masks))
        return laws_NKV

    def _fitted(self, logits_RV: Tensor) -> Tensor:
        missing = self._vocab_size - logits_RV.shape[1]
        if missing <= 0:
            return logits_RV[:, : self._vocab_size]
        return F.pad(logits_RV, (0, missing), value=float("-inf"))


@dataclass
class Slots:
    """A block table of single slots."""

    blocks: "array[int]"
    block_size: int = 1


def _own(first: int, num_rows: int, t: int, count: int) -> list[int]:
    """Slots of the first `count` drafted rows behind row t; `first` is where such slots begin."""
    return [first + num_rows * index + t for index in range(count)]


def _eagle(head: Head, target: ShownTarget) -> Guesser:
    network = EagleNetwork(head, target)
    if network.mask_token_id is None or network.mask_input_1D is None:
        return RowGuesser(network)
    return RowGuesser(network, (network.mask_token_id, network.mask_input_1D))


MAKERS: Mapping[str, Callable[[Head, ShownTarget], Guesser]] = {
    Family.EAGLE: _eagle,
    Family.EAGLE3: _eagle,
    Family.PEAGLE: _eagle,
    Family.MEDUSA: lambda head, target: MedusaGuesser(MedusaNetwork(head, target, target.ops)),
    Family.MTP: lambda head, target: RowGuesser(MTPNetwork(head, target, target.ops)),
    Family.BLOCK: lambda head, target: BlockGuesser(BlockNetwork(head, target, target.ops)),
    Family.KV: lambda head, target: KVGuesser(KVNetwork(head, as_lean(target, "kv_draft"))),
}
