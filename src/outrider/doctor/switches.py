"""What may be other than a head's files say: one change of its conventions each."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

from outrider.models.heads.pins import CHOICES, MASKS
from outrider.models.heads.spec import Conventions, Family, HeadSpec

ORDER, BOUNDARY = "order of features", "boundary of features"
# Conventions with two values or more that a family's forward honours.
BY_FAMILY: dict[str, tuple[str, ...]] = {
    Family.EAGLE: ("input_state", "concatenation"),
    Family.EAGLE3: ("norm_before_residual", "input_norm", "feedback"),
    Family.PEAGLE: ("norm_before_residual", "input_norm"),
    Family.MEDUSA: ("input_state",),
    Family.MTP: ("feedback", "input_state", "concatenation", "is_first_embedding_zero"),
    Family.BLOCK: ("block_masks", "sample_from_anchor"),
    Family.KV: ("feedback", "input_state", "concatenation"),
}
WITH_FEATURES = (Family.EAGLE3, Family.PEAGLE, Family.BLOCK)
WITH_ROPE = (Family.EAGLE, Family.EAGLE3, Family.PEAGLE, Family.BLOCK, Family.MTP)
OWN_ROPE = (Family.EAGLE, Family.EAGLE3, Family.PEAGLE, Family.BLOCK)
WITH_NORMS = WITH_ROPE


class Switch(NamedTuple):
    """One change.

    Attributes:
        kind: two of one kind exclude each other.
        turn: the conventions with it; None where it changes nothing, or cannot be.
    """

    kind: str
    turn: Callable[[Conventions], Conventions | None]


def switches_of(spec: HeadSpec, num_layers: int) -> list[Switch]:
    """Every change that this head could be run with.

    Args:
        num_layers: of the target.
    """
    return [*_of_features(spec, num_layers), *_of_choices(spec)]


def boundaries_of(spec: HeadSpec, num_layers: int) -> set[int]:
    """All that any of the changes, or several together, make the head read."""
    found = {num_layers, *spec.conventions.feature_layers}
    for switch in switches_of(spec, num_layers):
        turned = switch.turn(spec.conventions)
        found |= set(turned.feature_layers) if turned else set()
    return found


def changes(of: Conventions, since: Conventions) -> dict[str, Any]:
    """Conventions that differ, by name, as pins."""
    pairs = ((field.name, getattr(of, field.name)) for field in fields(Conventions))
    return {name: value for name, value in pairs if value != getattr(since, name)}


def _of_features(spec: HeadSpec, num_layers: int) -> Iterator[Switch]:
    if spec.family not in WITH_FEATURES or not spec.conventions.feature_layers:
        return
    yield Switch(BOUNDARY, lambda now: _moved(now, -1, num_layers))
    yield Switch(BOUNDARY, lambda now: _moved(now, 1, num_layers))
    yield Switch(ORDER, _reversed)
    if spec.family is not Family.BLOCK and spec.widths.num_features == 3:
        usual = (2, num_layers // 2, num_layers - 3)
        if usual == tuple(sorted(set(usual))) and usual[0] >= 0:
            yield Switch(BOUNDARY, lambda now: replace(now, feature_layers=usual))


def _of_choices(spec: HeadSpec) -> Iterator[Switch]:
    now, family = spec.conventions, spec.family
    for name in BY_FAMILY[family]:
        if name == "block_masks":
            yield from (
                Switch(name, _setter(name, (mask,) * len(now.block_masks))) for mask in MASKS
            )
        elif name == "input_norm":
            yield from _others(now, name, ("none", now.input_norm))
        else:
            yield from _others(now, name, CHOICES[name])
    if family is Family.EAGLE3 and not spec.widths.num_features:  # it reads the last state alone
        yield from _others(now, "input_state", CHOICES["input_state"])
    if family in WITH_ROPE:
        yield from _others(now, "rope_style", CHOICES["rope_style"])
    if family in OWN_ROPE:
        yield from _others(now, "rope_origin", CHOICES["rope_origin"])
    if family in WITH_NORMS:
        yield from _others(now, "norm_gain", CHOICES["norm_gain"])
    for name in ("lm_head", "embedding"):
        if getattr(now, name) == "own":  # the other way round there is nothing to take
            yield from _others(now, name, CHOICES[name])
    if now.vocabulary_map != "none" and family in WITH_FEATURES:
        yield from _others(now, "vocabulary_map", CHOICES["vocabulary_map"])


def _others(now: Conventions, name: str, choices: tuple[Any, ...]) -> Iterator[Switch]:
    for value in choices:
        if value != getattr(now, name):
            yield Switch(name, _setter(name, value))


def _setter(name: str, value: Any) -> Callable[[Conventions], Conventions | None]:
    def turn(now: Conventions) -> Conventions | None:
        changed: dict[str, Any] = {name: value}
        return None if getattr(now, name) == value else replace(now, **changed)

    return turn


def _moved(now: Conventions, by: int, num_layers: int) -> Conventions | None:
    layers = tuple(layer + by for layer in now.feature_layers)
    if not all(0 <= layer <= num_layers for layer in layers):
        return None
    return replace(now, feature_layers=layers)


def _reversed(now: Conventions) -> Conventions | None:
    layers = now.feature_layers[::-1]
    return None if layers == now.feature_layers else replace(now, feature_layers=layers)
