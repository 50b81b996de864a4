"""MTPNetwork: multi-token-prediction modules, each one decoder layer of the target's own kind.

DeepSeek-V3 (2024, section 2.2); checkpoints 5.8. Row t of module 0 reads the target's feature of
position t and the token at t + 1, and its law is that of the token at t + 2.

Shape legend: N rows of a pass, R rows that are wanted, V vocabulary, H hidden width, A boundaries
between layers of the target.
"""

import re
from collections.abc import Sequence as Items
from copy import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.errors import ConfigError
from outrider.models.base import KVShape
from outrider.models.heads.fingerprint import head_fingerprint
from outrider.models.heads.mtp_module import ModuleRows, ModuleStates, MTPModule
from outrider.models.heads.mtp_turns import own_rows, parent_slots, steps_of
from outrider.models.heads.network import HeadOutput, HeadPiece, HeadRunner, ShownTarget
from outrider.models.heads.spec import Conventions, Head
from outrider.models.runner import upload
from outrider.ops.base import LayerKV, Layout, Ops

_PART = re.compile(r"modules\.(\d+)\.(.+)$")


class MTPNetwork:
    """Modules that take turns: the draft's step k is that of module k mod D, D modules in all.

    One module alone runs step after step, fed with its own state.

    Of several, module m reads in row r what module m - 1 handed on in row r - 1, so all of them
    pair row r with the token at r + 1 and speak of the token at r + 2; its first row is row m, at
    position 0. This is how they are trained: the paper counts rows of module m from there. Every
    module runs over all committed rows; so the keys and values it sees at its turn are true ones
    up to the last committed row, and those of the draft's own rows after it. Module 0 reads the
    target's feature there, and in a drafted row what the last module handed on.

    That a state is found again in a later pass, the pool keeps it, as further layers: it is shared,
    saved and rolled back with keys and values.

    Attributes:
        target: whose states it reads, and whose embedding, norm and head it shares.

    Raises:
        ConfigError: a layer of this target, or a convention, cannot be run.
    """

    def __init__(self, head: Head, target: ShownTarget, ops: Ops) -> None:
        spec = head.spec
        assert spec.mtp is not None
        _check(spec.conventions)
        self.ops = ops
        self.target = target
        self._is_normed = spec.conventions.input_state == "normed"
        self.boundaries: tuple[int, ...] = (target.spec.num_layers,)
        self._modules = [
            MTPModule(spec.conventions, spec.mtp, _tensors_of(head, number), target, ops)
            for number in range(spec.mtp.num_modules)
        ]
        num_modules, hidden = len(self._modules), target.spec.hidden_size
        kept = (KVShape(1, hidden, 0),) * (num_modules - 1)
        self.spec = replace(
            target.spec,
            name=spec.source or "mtp",
            family="mtp",
            kv_shapes=tuple(module.kv_shape for module in self._modules) + kept,
            num_parameters=sum(tensor.numel() for tensor in head.tensors.values()),
            fingerprint=head_fingerprint(head),
            hidden_size=0,
            num_layers=0,
        )

    def read(self, tapped_ARH: Tensor) -> Tensor:
        """See `RowNetwork`; with several modules, a column for the step, 0, beside the feature."""
        (feature_RH,) = tapped_ARH
        if self._is_normed:
            feature_RH = self.target.final_norm(feature_RH)
        return feature_RH if len(self._modules) == 1 else F.pad(feature_RH, (0, 1))

    def forward(
        self,
        tokens_N: Tensor,
        inputs_ND: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
        steps: Items[int] | None = None,
        is_behind_gap_N: Tensor | None = None,
    ) -> HeadOutput:
        """See `RowNetwork`.

        Args:
            steps: of the wanted rows, where the host knows; else it is asked of the device.
            is_behind_gap_N: rows of sequences whose place 0 is not position 0; None for none.
        """
        if len(self._modules) > 1:
            rows = ModuleRows(tokens_N, layout, is_behind_gap_N)
            return self._in_turns(rows, inputs_ND, kv, wanted_R, steps)
        (module,) = self._modules
        states = module(ModuleRows(tokens_N, layout, is_behind_gap_N), inputs_ND, kv[0])
        return HeadOutput(module.logits(states.normed_NH[wanted_R]), states.handed_NH)

    def by_layer(self) -> "MTPNetwork":
        """The same modules, one operation at a time: the twin of fused layers."""
        slow = copy(self)
        slow._modules = [module.by_layer() for module in self._modules]
        return slow

    def _in_turns(
        self,
        rows: "ModuleRows",
        inputs_ND: Tensor,
        kv: list[LayerKV],
        wanted_R: Tensor,
        steps: Items[int] | None,
    ) -> HeadOutput:
        num_modules, layout = len(self._modules), rows.layout
        parents_N = upload(parent_slots(layout.spans), layout.slots_N.device)
        feature_NH, step_N1 = inputs_ND[:, :-1], inputs_ND[:, -1:]
        states, all_states = ModuleStates(feature_NH, feature_NH), []
        for number, module in enumerate(self._modules):
            if number:
                kept = kv[num_modules + number - 1].keys
                kept.index_copy_(0, layout.slots_N, states.handed_NH.unsqueeze(1))
                feature_NH = kept.index_select(0, parents_N).squeeze(1)
            states = self._in_own_rows(module, number, states, rows, feature_NH, kv[number])
            all_states.append(states)
        if steps is None:
            steps = step_N1[wanted_R, 0].long().tolist()
        turns = [step % num_modules for step in steps]
        feedback_ND = torch.cat((states.handed_NH, step_N1 + 1), dim=1)
        return HeadOutput(self._logits(all_states, wanted_R, turns), feedback_ND)

    def _in_own_rows(
        self,
        module: "MTPModule",
        number: int,
        before: "ModuleStates",
        rows: "ModuleRows",
        feature_NH: Tensor,
        kv: LayerKV,
    ) -> "ModuleStates":
        """What a module says; in rows before its first one, what the module before it said."""
        device = rows.layout.slots_N.device
        own, spans = own_rows(rows.layout.spans, number)
        if own is None:
            layout = self.ops.layout(spans, device) if number else rows.layout
            return module(rows._replace(layout=layout), feature_NH, kv)
        if not own:
            return before
        own_n = upload(own, device)
        ran = module(rows.picked(own_n, self.ops.layout(spans, device)), feature_NH[own_n], kv)
        pairs = zip(before, ran, strict=True)
        return ModuleStates(*(old.index_copy(0, own_n, new) for old, new in pairs))

    def _logits(self, said: "list[ModuleStates]", wanted_R: Tensor, turns: list[int]) -> Tensor:
        """logits_RV, each row's by the module whose turn it is."""
        device = wanted_R.device
        logits_RV = torch.empty(len(turns), self.spec.vocab_size, device=device)
        for number, (module, states) in enumerate(zip(self._modules, said, strict=True)):
            own = [row for row, turn in enumerate(turns) if turn == number]
            if own:
                own_r = upload(own, device)
                logits_RV[own_r] = module.logits(states.normed_NH[wanted_R[own_r]])
        return logits_RV


class MTPRunner(HeadRunner):
    """Tells the modules which step each row is, and who begins behind a gap."""

    def __init__(self, network: MTPNetwork, pool: KVPool) -> None:
        super().__init__(network, pool)
        self._modules = network

    def forward(
        self,
        pieces: list[HeadPiece],
        tokens_N: Tensor,
        inputs_ND: Tensor,
        layout: Layout,
        wanted_R: Tensor,
    ) -> HeadOutput:
        is_behind_gap_N = None
        if any(piece.is_behind_gap for piece in pieces):
            is_behind = [
                int(piece.is_behind_gap)
                for piece in pieces
                for _ in range(len(piece.chain) + len(piece.tree))
            ]
            is_behind_gap_N = upload(is_behind, tokens_N.device).bool()
        return self._modules.forward(
            tokens_N,
            inputs_ND,
            layout,
            self.pool.layers,
            wanted_R,
            list(steps_of(pieces)),
            is_behind_gap_N,
        )


def _check(conventions: Conventions) -> None:
    if conventions.rope_origin != "target":
        raise ConfigError(
            f"convention rope_origin={conventions.rope_origin!r}: an MTP module is a layer of its "
            "target and has no frequencies of its own; use 'target'"
        )


def _tensors_of(head: Head, number: int) -> dict[str, Tensor]:
    found = ((_PART.match(name), tensor) for name, tensor in head.tensors.items())
    return {m[2]: tensor for m, tensor in found if m is not None and int(m[1]) == number}
