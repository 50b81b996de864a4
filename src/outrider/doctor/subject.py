"""A head on its target, to be run with other conventions than its files declare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from outrider.doctor.guessers import Guesser, guesser_of
from outrider.doctor.switches import changes
from outrider.errors import ConfigError, ModelError
from outrider.models.base import Network
from outrider.models.checkpoint import read_config
from outrider.models.heads.load import load_head
from outrider.models.heads.network import ShownTarget
from outrider.models.heads.pins import CHOICES, read_pins
from outrider.models.heads.spec import Conventions, HeadSpec, TargetSpec
from outrider.models.hub import resolve

NATIVE = "native"  # modules in the target's own files


class Subject(NamedTuple):
    """A head as its files declare it.

    Attributes:
        pins: that were laid down in the folder before.
        spec: as declared; if `refusal` says why that cannot be read, with `vocabulary_map` turned.
    """

    folder: Path
    target: TargetSpec
    pins: Mapping[str, Any]
    spec: HeadSpec
    refusal: str = ""

    @property
    def declared(self) -> Conventions:
        return self.spec.conventions

    def pins_for(self, conventions: Conventions) -> dict[str, Any]:
        """What `outrider.json` must say to have the head run so."""
        turned = {"vocabulary_map": self.declared.vocabulary_map} if self.refusal else {}
        return {**self.pins, **turned, **changes(conventions, self.declared)}

    def guesser(self, conventions: Conventions, network: Network) -> Guesser:
        """The head with these conventions.

        Raises:
            ConfigError, ModelError: its tensors cannot be run so.
        """
        head = load_head(self.folder, self.target, pins=self.pins_for(conventions))
        return guesser_of(head, shown(network))


def read_subject(draft: str, target: str) -> Subject:
    """The head of a name.

    Args:
        draft: folder, hub id, or "native" for modules in the target's own files.

    Raises:
        ConfigError, PairError, ModelError: see `load_head`.
    """
    folder = resolve(target)
    about = TargetSpec.from_config(read_config(folder), name=target, folder=folder)
    source = folder if draft == NATIVE else resolve(draft)
    pins = read_pins(source)
    try:
        return Subject(source, about, pins, load_head(source, about).spec)
    except ModelError as error:
        spec = _with_other_map(source, about, pins)
        if spec is None:
            raise
        return Subject(source, about, pins, spec, str(error))


def shown(network: Network) -> ShownTarget:
    """The target as one that heads can read. ConfigError if it is not."""
    if not network.spec.hidden_size or not isinstance(network, ShownTarget):
        raise ConfigError(
            f"{network.spec.name!r} runs in a network that hands out no hidden states, which heads "
            "read: nothing can be said of a head on it"
        )
    return network


def _with_other_map(folder: Path, target: TargetSpec, pins: Mapping[str, Any]) -> HeadSpec | None:
    """With its vocabulary map read another way; None if that is not what ails it."""
    for kind in CHOICES["vocabulary_map"]:
        try:
            return load_head(folder, target, pins={**pins, "vocabulary_map": kind}).spec
        except (ConfigError, ModelError):
            continue
    return None
