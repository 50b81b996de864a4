"""Names to classes: drafters and verifiers, built in or from plug-ins, imported when used."""

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from outrider.errors import ConfigError, unknown

OURS = "outrider"


class Registered(NamedTuple):
    """Where a name leads: `source` is "outrider" or the distribution that brings the plug-in."""

    name: str
    target: str
    source: str


class Registry:
    """One kind of part, by name. Built-ins and entry points of `group` go through the same door.

    Args:
        kind: what the parts are called in messages ("drafter").
        group: entry-point group of plug-ins ("outrider.drafters").
        builtins: name -> "module:Class".
    """

    def __init__(self, kind: str, group: str, builtins: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtins = builtins

    def __iter__(self) -> Iterator[Registered]:
        """All parts, built-ins first; a plug-in may not take a name that is taken."""
        for name, target in self._builtins.items():
            yield Registered(name, target, OURS)
        for point in self._plugins():
            yield Registered(point.name, point.value, point.dist.name if point.dist else "?")

    def names(self) -> list[str]:
        return [part.name for part in self]

    def load(self, name: str) -> Any:
        """The class behind `name`. ConfigError for an unknown name or a broken plug-in."""
        for part in self:
            if part.name == name:
                return self._import(part)
        raise ConfigError(unknown(self.kind, name, self.names()))

    def _import(self, part: Registered) -> Any:
        module, _, attribute = part.target.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:  # whatever a stranger's module does when it is imported
            if part.source == OURS:
                raise
            raise ConfigError(
                f"{self.kind} {part.name!r} of {part.source} cannot be loaded from "
                f"{part.target!r} ({error}): repair or uninstall that package"
            ) from error

    def _plugins(self) -> list[EntryPoint]:
        found = list(entry_points(group=self.group))
        taken = dict(self._builtins)
        for point in found:
            if point.name in taken:
                owner = "the built-in" if point.name in self._builtins else "another"
                raise ConfigError(
                    f"plug-in {point.value!r} takes the name of {owner} {self.kind} "
                    f"{point.name!r} ({taken[point.name]}): uninstall it or rename its entry point"
                )
            taken[point.name] = point.value
        return found


DRAFTERS = Registry(
    "drafter",
    "outrider.drafters",
    {
        "ngram": "outrider.draft.ngram:NgramDrafter",
        "suffix": "outrider.draft.suffix:SuffixDrafter",
        "recycle": "outrider.draft.recycle:RecycleDrafter",
        "retrieval": "outrider.draft.retrieval:RetrievalDrafter",
        "rest": "outrider.draft.rest:RestDrafter",
        "draft_model": "outrider.draft.draft_model:ModelDrafter",
        "translate": "outrider.draft.translate:TranslateDrafter",
        "lookahead": "outrider.draft.lookahead:LookaheadDrafter",
        "prediction": "outrider.draft.prediction:PredictionDrafter",
        "medusa": "outrider.draft.medusa:MedusaDrafter",
        "eagle": "outrider.draft.eagle:EagleDrafter",
        "mtp": "outrider.draft.mtp:MTPDrafter",
        "block": "outrider.draft.block:BlockDrafter",
        "kv_draft": "outrider.draft.kv_draft:KVDrafter",
        "early_exit": "outrider.draft.early_exit:EarlyExitDrafter",
        "cascade": "outrider.draft.cascade:CascadeDrafter",
        "auto": "outrider.draft.auto:AutoDrafter",
    },
)

POLICIES = Registry(
    "policy",
    "outrider.policies",
    {
        "fixed": "outrider.control.fixed:FixedPolicy",
        "off": "outrider.control.fixed:OffPolicy",
        "table": "outrider.control.fixed:TablePolicy",
        "adaptive": "outrider.control.adaptive:AdaptivePolicy",
    },
)

VERIFIERS = Registry(
    "verifier",
    "outrider.verifiers",
    {
        "greedy": "outrider.verify.greedy:GreedyVerifier",
        "sampled": "outrider.verify.sampled:SampledVerifier",
        "rejection": "outrider.verify.rejection:RejectionVerifier",
        "block": "outrider.verify.block:BlockVerifier",
        "tree": "outrider.verify.tree:TreeVerifier",
        "traversal": "outrider.verify.traversal:TraversalVerifier",
        "spectr": "outrider.verify.spectr:SpectrVerifier",
        "gbv": "outrider.verify.gbv:GbvVerifier",
        "typical": "outrider.verify.typical:TypicalVerifier",
        "fly": "outrider.verify.fly:FlyVerifier",
        "synthetic": "outrider.verify.synthetic:SyntheticVerifier",
    },
)
