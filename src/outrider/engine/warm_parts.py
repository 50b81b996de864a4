"""Parts: which pools of an engine hold KV of a token log, and how far each of them is."""

import secrets
from collections.abc import Iterator, Mapping, Sequence as Items
from typing import NamedTuple

from outrider.cache.table import BlockManager
from outrider.cache.transfer import prefix_hashes
from outrider.draft.base import Drafter, Warmth as WarmthClass
from outrider.draft.warm import CachesPrefixes, HasPool, PrefixCache, SharesTensors
from outrider.engine.engine import Engine
from outrider.session.fingerprint import Fingerprint
from outrider.tokenizer import Tokenizer

TARGET = "target"


class Readiness(NamedTuple):
    """How far a drafter is for a token log.

    Attributes:
        warmth: its class ("R0", "R1", "R2").
        ready_upto: leading tokens it need not compute anything for.
        reason: why a restore did not bring back more; "" if nothing is missing.
    """

    warmth: str
    ready_upto: int
    reason: str = ""


class Part(NamedTuple):
    """One pool whose blocks are kept, the log as it is hashed there, and its blocks' names.

    Attributes:
        salt: tenant, and what else the names begin with.
        num_unsettled: ids behind `tokens` that the end of the log is for now.
    """

    runner: HasPool
    manager: BlockManager
    tokens: Items[int]
    salt: str
    fingerprint: Fingerprint
    hashes: list[str]
    num_unsettled: int = 0

    @property
    def num_resident(self) -> int:
        """Leading blocks that are in the pool."""
        tree = self.manager.tree
        absent = (i for i, name in enumerate(self.hashes) if tree.find(bytes.fromhex(name)) is None)
        return next(absent, len(self.hashes))

    @property
    def num_ids(self) -> int:
        """What the whole log is there."""
        return len(self.tokens) + self.num_unsettled

    @property
    def ready_upto(self) -> int:
        """Leading tokens of `tokens` with KV in the pool."""
        return self.num_resident * self.manager.block_size


class Parts:
    """The target of an engine and its drafters, as far as state of theirs can be kept.

    Args:
        tokenizer: enters the fingerprints.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer.fingerprint() if tokenizer is not None else ""
        self._unnamed = secrets.token_hex(8)

    def of(self, tokens: Items[int], tenant: str) -> dict[str, Part]:
        """The target, and drafters with KV of their own, by name."""
        engine = self._engine
        caches = {TARGET: PrefixCache(engine.runner, engine.manager, tokens)}
        for name, drafter in self.drafters():
            if isinstance(drafter, CachesPrefixes):
                caches[name] = drafter.prefix_cache(tokens)
        return {name: self._part(name, cache, tenant) for name, cache in caches.items()}

    def drafters(self) -> Iterator[tuple[str, Drafter]]:
        for name in self._engine.drafters.names():
            yield name, self._engine.drafters[name]

    def owners(self, drafter: str) -> tuple[str, ...]:
        """Drafters whose own KV one drafts from: itself, or any that it may ask."""
        names = [name for name, each in self.drafters() if isinstance(each, CachesPrefixes)]
        if "drafters" in self._engine.drafters[drafter].needs:
            return tuple(names)
        return (drafter,) if drafter in names else ()

    def sharing(self) -> Iterator[tuple[SharesTensors, Fingerprint]]:
        """Drafters with a small state per tenant, and what it depends on."""
        fields = self._model(self._engine.runner)
        for name, drafter in self.drafters():
            if isinstance(drafter, SharesTensors):
                yield drafter, Fingerprint(part=f"{name}/shared", fields=fields)

    def fingerprint(self) -> str:
        """Changes when anything does that warm state depends on."""
        found = [part.fingerprint for part in self.of((), "").values()]
        found += [fingerprint for _, fingerprint in self.sharing()]
        return Fingerprint(part="engine", fields={p.part: p.digest for p in found}).digest

    def readiness(self, parts: Mapping[str, Part], num_tokens: int) -> dict[str, Readiness]:
        """How far each drafter is for a log; those that only compose others are left out."""
        return {
            name: Readiness(str(drafter.warmth), _ready_upto(drafter, parts, num_tokens))
            for name, drafter in self.drafters()
            if "drafters" not in drafter.needs
        }

    def _part(self, name: str, cache: PrefixCache, tenant: str) -> Part:
        runner, manager, tokens, num_unsettled, own_salt = cache
        spec, network, salt = runner.network.spec, runner.network, tenant + own_salt
        fields = {
            **self._model(runner),
            **self._read(name),
            "dtype": str(spec.dtype).removeprefix("torch."),
            "block_size": str(manager.block_size),
            "kv_shapes": str([tuple(shape) for shape in spec.kv_shapes]),
            # Kernels round differently; a restored text must continue bit by bit.
            "kernels": f"{type(network).__name__}/{type(network.ops).__name__}/{spec.device.type}",
        }
        hashes = [name.hex() for name in prefix_hashes(tokens, manager.block_size, salt)]
        fingerprint = Fingerprint(part=name, fields=fields)
        return Part(runner, manager, tokens, salt, fingerprint, hashes, num_unsettled)

    def _read(self, name: str) -> dict[str, str]:
        """The target, where KV is made of its states."""
        if name == TARGET or self._engine.drafters[name].warmth is not WarmthClass.R2:
            return {}
        return {"target": self._model(self._engine.runner)["weights"]}

    def _model(self, runner: HasPool) -> dict[str, str]:
        """A network made in memory has no name that another process could know it by."""
        weights = runner.network.spec.fingerprint or f"of this process ({self._unnamed})"
        return {"weights": weights, "tokenizer": self._tokenizer}


def is_half_warm(
    parts: Mapping[str, Part], drafters: Mapping[str, Readiness], num_tokens: int
) -> bool:
    """Whether the target is warm for a log, and a drafter has more than its last blocks to run."""
    kv_tokens = parts[TARGET].ready_upto
    return kv_tokens > 0 and any(
        ready.ready_upto + _usual_lag(parts.get(name, parts[TARGET]), num_tokens) < kv_tokens
        for name, ready in drafters.items()
    )


def _usual_lag(part: Part, num_tokens: int) -> int:
    """Two blocks: a drafter has no KV of the last tokens it drafted, nor enters its last one.

    And twice what is not settled, for as much may have settled since it drafted last.
    """
    num_own = 2 * (part.manager.block_size + part.num_unsettled)
    return -(-num_own * num_tokens // max(1, part.num_ids))


def _ready_upto(drafter: Drafter, parts: Mapping[str, Part], num_tokens: int) -> int:
    """Tokens alone suffice, or KV of its own, or the target's; of others nothing is known.

    Who reads the target and keeps no KV is ready with it: the states it wants are those of the
    last position, which every request runs.
    """
    if drafter.warmth is WarmthClass.R0:
        return num_tokens
    is_reader = not {"target layers", "target states"}.isdisjoint(drafter.needs)
    owner = TARGET if is_reader and drafter.name not in parts else drafter.name
    return _in_tokens(parts[owner], num_tokens) if owner in parts else 0


def _in_tokens(part: Part, num_tokens: int) -> int:
    """What a part is ready for in tokens of the log, by share where it reads the log otherwise."""
    return part.ready_upto * num_tokens // max(1, part.num_ids)
