"""One head as it was found, and the questions a reader asks of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from outrider.errors import ConfigError, ModelError, PairError
from outrider.models.heads.spec import TargetSpec

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WHOLE = ("target_ids", "d2t", "t2d")
NUM_NAMED = 3
GAINS_PLUS_ONE = (
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "recurrent_gemma",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
)


@dataclass(frozen=True, kw_only=True)
class Given:
    """Config, tensors and target of a head that is being read.

    Attributes:
        config: the mapping in `config.json`.
        tensors: by canonical name.
        written: canonical name to name in the files.
        pinned: conventions laid down from outside, over what the files say.
    """

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    written: Mapping[str, str]
    target: TargetSpec
    pinned: Mapping[str, Any]

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The config with its nested decoder part on top."""
        nested = self.config.get("transformer_layer_config") or self.config.get("text_config")
        return {**self.config, **(nested or {})}

    @property
    def is_speculators(self) -> bool:
        """Whether the layout is that of the library speculators, with defaults of its own."""
        return "speculators_model_type" in self.config

    def shape(self, name: str) -> Shape:
        """Shape of a tensor that every head of this family has. ModelError if it is missing."""
        if name not in self.tensors:
            raise ModelError(f"{self.source!r} has 1 missing tensors: {name}; download it again")
        return tuple(self.tensors[name].shape)

    def name(self, name: str) -> str:
        """The name in the files of a canonical name."""
        return self.written.get(name, name)

    def count(self, key: str, values: Mapping[str, Any] | None = None) -> int | None:
        """A positive whole number of the config, None if it is silent."""
        value = (self.values if values is None else values).get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"config.json: {key}={value!r} must be a positive integer")
        return value

    def agree_count(self, key: str, shown: int, where: str) -> int:
        """The number that the tensors show. ConfigError if the config says another one."""
        said = self.count(key)
        if said is not None and said != shown:
            raise ConfigError(
                f"config.json says {key}={said}, but {self.name(where)} "
                f"{list(self.shape(where))} shows {shown}: config and weights must be of one head"
            )
        return shown

    def agree_flag(self, key: str, is_there: bool, what: str, said: Any = None) -> bool:
        """Whether the files hold `what`. ConfigError if the config says otherwise."""
        said = self.values.get(key) if said is None else said
        if said is not None and bool(said) != is_there:
            raise ConfigError(
                f"config.json says {key}={said!r}, but the files hold "
                f"{'' if is_there else 'no '}{what}: set {key} to what the head was trained with"
            )
        return is_there

    def agree_target(self, what: str, shown: int, wanted: int) -> int:
        """PairError unless a width of the head is the target's."""
        if shown != wanted:
            raise PairError(
                f"the head {self.source!r} has {what} {shown}, target {self.target.name!r} has "
                f"{wanted}: it was made for another model"
            )
        return shown

    def check(self, required: Shapes, optional: Shapes | None = None) -> None:
        """ModelError unless the tensors are these, by name, shape and kind."""
        known = {**required, **(optional or {})}
        found = {name: t for name, t in self.tensors.items() if name in known}
        self._refuse("missing", [name for name in required if name not in found])
        self._refuse("unknown", [self.name(name) for name in self.tensors if name not in known])
        self._refuse(
            "misshapen",
            [
                f"{self.name(name)} is {list(tensor.shape)}, expected {list(known[name])}"
                for name, tensor in found.items()
                if tuple(tensor.shape) != known[name]
            ],
        )
        self._refuse(
            "quantised",
            [
                f"{self.name(name)} is {t.dtype}"
                for name, t in found.items()
                if _is_quantised(name, t)
            ],
        )

    def _refuse(self, what: str, names: list[str]) -> None:
        if names:
            more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
            raise ModelError(
                f"{self.source!r} has {len(names)} {what} tensors: "
                f"{'; '.join(names[:NUM_NAMED])}{more}"
            )


def adds_one_to_gain(family: str) -> bool:
    """Whether RMSNorm of this `model_type` multiplies by 1 + w."""
    return family in GAINS_PLUS_ONE


def _is_quantised(name: str, tensor: Tensor) -> bool:
    return name not in WHOLE and tensor.dtype not in FLOATS
