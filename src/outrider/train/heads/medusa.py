"""Medusa heads (Cai et al. 2024): residual blocks on the target's last state, one head per depth.

They start as the identity under the target's own LM head, so an untrained head says what the
target says of the next token, and training only has to learn how the tokens after it differ.

Shape legend: N rows, R rows, H width of the target.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.errors import ConfigError
from outrider.models.heads.load import load_head
from outrider.models.heads.medusa_network import MedusaNetwork
from outrider.models.heads.spec import Conventions, Family, HeadSpec, MedusaShape, Widths
from outrider.train.export import write_weights
from outrider.train.heads.files import to_store, write_json, write_sidecar
from outrider.train.heads.pieces import Packed
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.student import HeadStudent
from outrider.train.heads.teacher import Taught, Teacher

NUM_HEADS = 4
WEIGHTS = "medusa_lm_head.safetensors"


class Medusa(HeadStudent):
    """Heads of one target; head i guesses the token at t + 2 + i from the state at t."""

    kind = "medusa"
    layouts = ("medusa",)
    lead = 1

    def __init__(self, spec: HeadSpec, teacher: Teacher, ids_D: Tensor | None) -> None:
        super().__init__()
        assert spec.medusa is not None
        self.spec = spec
        self.depths = self.max_depth = spec.medusa.num_heads
        self.boundaries = (teacher.spec.num_layers,)
        self._teacher = teacher
        has_lm_head = spec.conventions.lm_head == "own"
        num_said = spec.widths.draft_vocab if has_lm_head else 0
        self.heads = nn.ModuleList(
            _Head(spec.widths.hidden, spec.medusa, num_said) for _ in range(self.depths)
        )
        self.keep_ids(ids_D)

    @classmethod
    def fresh(cls, teacher: Teacher, settings: DraftTraining, ids_D: Tensor | None) -> Self:
        """Blocks that pass their input on, and copies of the target's LM head."""
        target = teacher.target
        num_said = target.vocab_size if ids_D is None else len(ids_D)
        spec = HeadSpec(
            family=Family.MEDUSA,
            widths=Widths(
                target_hidden=target.hidden_size,
                hidden=target.hidden_size,
                vocab=target.vocab_size,
                draft_vocab=num_said,
            ),
            conventions=Conventions(
                lm_head="own", vocabulary_map="none" if ids_D is None else "absolute"
            ),
            medusa=MedusaShape(
                num_heads=settings.depths or NUM_HEADS,
                num_blocks=settings.num_layers or 1,
                has_bias=True,
            ),
        )
        heads = cls(spec, teacher, ids_D)
        weight_DH = teacher.head_weight(ids_D)
        with torch.no_grad():
            for name, weight in heads.named_parameters():
                weight.copy_(weight_DH) if "lm_head" in name else weight.zero_()
        return heads

    @classmethod
    def load(cls, folder: Path, teacher: Teacher) -> Self:
        spec, tensors = load_head(folder, teacher.target)
        if spec.family is not Family.MEDUSA:
            raise ConfigError(f"{str(folder)!r} is of the family {spec.family}, not Medusa")
        heads = cls(spec, teacher, tensors.pop("target_ids", None))
        heads.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return heads

    def states(self, batch: Packed, taught: Taught, num_depths: int) -> Iterator[Tensor]:
        is_raw = self.spec.conventions.input_state == "raw"
        state_NH = taught.tapped[self.boundaries[0]] if is_raw else taught.final_NH
        for head in self.heads[:num_depths]:
            yield head(state_NH.float())

    def logits(self, depth: int, states_RD: Tensor) -> Tensor:
        if self.spec.conventions.lm_head == "target":
            return self._teacher.logits(states_RD)
        weight_DH = self.get_parameter(f"heads.{depth}.lm_head.weight")
        return F.linear(states_RD, weight_DH).float()

    def num_passes(self, depth: int) -> int:
        return 1

    def serving_pass(self, num_sequences: int) -> Callable[[], object]:
        spec = self._teacher.spec
        network = MedusaNetwork(self.head(), self._teacher.shown, self._teacher.network.ops)
        states_NH = torch.ones(
            num_sequences, spec.hidden_size, dtype=spec.dtype, device=spec.device
        )
        return lambda: network.forward(states_NH, self.depths)

    def write(
        self, folder: Path, layout: str, about: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        """In Medusa's own layout; with a draft vocabulary `token_map` says which tokens it has."""
        shape, widths = self.spec.medusa, self.spec.widths
        assert shape is not None
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "medusa_num_heads": shape.num_heads,
            "medusa_num_layers": shape.num_blocks,
            "hidden_size": widths.hidden,
            "vocab_size": widths.vocab,
            "base_model_name_or_path": self._teacher.target.name,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        tensors = {
            _own_name(name, shape.num_blocks): tensor
            for name, tensor in to_store(self.state_dict(), dtype).items()
        }
        if self.ids_D is not None:
            config["truncated_vocab_size"] = widths.draft_vocab
            tensors["token_map"] = self.ids_D.cpu()
        write_json(folder / "config.json", config)
        write_weights(tensors, folder / WEIGHTS)
        write_sidecar(folder, {"input_state": self.spec.conventions.input_state}, about)


class _Head(nn.Module):
    """x + silu(W x + b) for each block, then an LM head of its own (0 tokens: the target's)."""

    def __init__(self, hidden: int, shape: MedusaShape, num_said: int) -> None:
        super().__init__()
        blocks = (nn.Linear(hidden, hidden, bias=shape.has_bias) for _ in range(shape.num_blocks))
        self.blocks = nn.ModuleList(blocks)
        if num_said:
            self.lm_head = nn.Linear(hidden, num_said, bias=False)

    def forward(self, state_NH: Tensor) -> Tensor:
        for block in self.blocks:
            state_NH = state_NH + F.silu(block(state_NH))
        return state_NH


def _own_name(name: str, num_blocks: int) -> str:
    """`{head}.{block}.linear.*`, and `{head}.{number of blocks}.weight` for the LM head."""
    _, head, kind, *rest = name.split(".")
    if kind == "lm_head":
        return f"{head}.{num_blocks}.weight"
    return f"{head}.{rest[0]}.linear.{rest[1]}"
