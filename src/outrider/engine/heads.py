"""Which draft heads an engine runs: from the names that were given to heads that fit its target."""

from collections.abc import Sequence
from pathlib import Path

from outrider.errors import ConfigError
from outrider.models.base import Network
from outrider.models.checkpoint import read_config
from outrider.models.heads.detect import detect
from outrider.models.heads.files import HeadFiles
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Family, Head, TargetSpec
from outrider.models.hub import resolve

NATIVE = "native"  # modules in the target's own files
RUN_BY = {
    Family.EAGLE: "eagle",
    Family.EAGLE3: "eagle",
    Family.PEAGLE: "eagle",
    Family.BLOCK: "block",
    Family.MEDUSA: "medusa",
    Family.MTP: "mtp",
    Family.KV: "kv_draft",
}
NO_HEADS = (Family.DRAFT_MODEL, Family.PARD)


def is_head(name: str) -> bool:
    """Whether a name given as draft model is that of a head, or of the target's own modules.

    Raises:
        ModelError: it cannot be found or read.
        ConfigError: its config and tensors contradict each other.
    """
    if name == NATIVE:
        return True
    folder = resolve(name)
    config = read_config(folder)
    return detect(config, HeadFiles(folder).shapes) not in NO_HEADS


def load_heads(
    names: Sequence[str], model: str, target: Network, revision: str | None = None
) -> dict[str, Head]:
    """The heads, by the name of the drafter that runs each.

    Args:
        names: folders or hub ids; "native" for modules in the target's own files.
        model: the target as it was named, `revision` of its hub id.

    Raises:
        ConfigError: two heads of one drafter, or the target hands out no hidden states.
        PairError, ModelError: see `load_head`.
    """
    if not names:
        return {}
    folder = resolve(model, revision)
    spec = TargetSpec.from_config(read_config(folder), name=model, folder=folder)
    _check_target(target, names)
    heads: dict[str, Head] = {}
    for name in names:
        head = load_head(folder if name == NATIVE else _folder(name), spec)
        drafter = RUN_BY.get(head.spec.family)
        if drafter is None:
            raise ConfigError(
                f"heads: {name!r} is of the family {head.spec.family}, which is a model of its "
                "own: give it as draft_model"
            )
        if drafter in heads:
            raise ConfigError(
                f"heads: {heads[drafter].spec.source!r} and {name!r} are both run by {drafter!r}, "
                "and an engine has one of each: leave one out"
            )
        heads[drafter] = head
    return heads


def _folder(name: str) -> Path | str:
    local = Path(name).expanduser()
    return local if local.is_dir() else name


def _check_target(target: Network, names: Sequence[str]) -> None:
    if not target.spec.hidden_size:
        raise ConfigError(
            f"heads={list(names)!r}: {target.spec.name!r} runs in a network that hands out no "
            "hidden states, which heads read; use a draft model or a token drafter"
        )
