"""Warmth: keeps what was computed for a token log outside the engine, and brings it back."""

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from outrider.cache.table import BlockManager
from outrider.cache.transfer import PrefixKV, export_prefix, import_runs, prefix_hashes
from outrider.draft.base import Drafter, Warmth as WarmthClass
from outrider.draft.warm import CachesPrefixes, PrefixCache, Remembers, SharesTensors
from outrider.engine.engine import Engine
from outrider.errors import ConfigError, RequestError, unknown
from outrider.models.runner import Runner
from outrider.ops.base import LayerKV
from outrider.session.bundle import Bundle, BundleStore, Found
from outrider.session.files import DiskFiles, MemoryFiles
from outrider.session.fingerprint import Fingerprint
from outrider.session.snapshot import Kept, Manifest, Snapshots, head_of
from outrider.tokenizer import Tokenizer

TARGET = "target"
INCLUDE = ("kv", "spec", "stats")
MAX_BYTES = 8 << 30
RUN_BLOCKS = 64  # blocks per bundle: what is read, checked and evicted at once
NOT_KEPT = "nothing is kept of this text"
TOO_SHORT = "the text is shorter than one block"
DAMAGED = "a bundle is lost or damaged"
NO_ROOM = "no KV block is free"
NO_CACHE = "enable_prefix_caching is off"
NO_SPACE = "the bundles have no room, or cannot be written"
logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, kw_only=True)
class State:
    """How warm a token log is now.

    Attributes:
        kv_tokens: leading tokens with KV of the target in the engine.
        drafters: by name; those that only compose others are left out.
        tiers: leading tokens whose target KV is at hand, by where: "device", and "disk" or "host".
    """

    kv_tokens: int
    drafters: Mapping[str, Readiness]
    tiers: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a restore brought back.

    Attributes:
        kv_tokens: leading tokens with KV of the target now; `kv_restored` of them came from
            bundles, the others were there.
        drafters: as in `State`.
        restored_from: "disk" or "host"; "" if nothing was brought back.
        cold_reason: why not all of the target's KV that was kept is there; "" if it is.
        is_half_warm: the target is warm, and a drafter whose state is not made of tokens is not.
        statistics: of class S, as the last snapshot along this log has them, if they were made
            with the models that are here.
    """

    kv_tokens: int
    kv_restored: int
    drafters: Mapping[str, Readiness]
    restored_from: str = ""
    cold_reason: str = ""
    is_half_warm: bool = False
    statistics: Mapping[str, Any] = field(default_factory=dict)


class _Part(NamedTuple):
    """One pool whose blocks are kept, the log as it is hashed there, and its blocks' names."""

    runner: Runner
    manager: BlockManager
    tokens: Items[int]
    tenant: str
    fingerprint: Fingerprint
    hashes: list[str]

    @property
    def num_resident(self) -> int:
        """Leading blocks that are in the pool."""
        tree = self.manager.tree
        absent = (i for i, name in enumerate(self.hashes) if tree.find(bytes.fromhex(name)) is None)
        return next(absent, len(self.hashes))

    @property
    def ready_upto(self) -> int:
        return self.num_resident * self.manager.block_size


class Warmth:
    """Snapshots and restores of target KV and of drafters' state; for the engine's thread.

    What is kept is a cache of the token log: it enters the pools as ordinary prefixes that anyone
    may evict, under the hashes it left with, and if it is lost, damaged, or made by another model,
    the log is cold and that is all.

    Args:
        folder: of the bundles; None keeps them in memory until exit.
        max_bytes: of all bundles together; the least recently used go first.
        tokenizer: enters the fingerprint.

    Attributes:
        num_restores, num_cold, num_half_warm: restores; those that left the target without KV;
            those that left it with KV and a drafter without.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path | None = None,
        max_bytes: int = MAX_BYTES,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes}: must be at least 1")
        self.engine = engine
        files = MemoryFiles() if folder is None else DiskFiles(folder)
        self.tier = files.tier
        self.bundles = BundleStore(files, max_bytes)
        self.snapshots = Snapshots(files)
        self.num_restores = self.num_cold = self.num_half_warm = 0
        self._tokenizer = tokenizer.fingerprint() if tokenizer is not None else ""
        self._unnamed = secrets.token_hex(8)

    @property
    def fingerprint(self) -> str:
        """Changes when anything does that warm state depends on."""
        parts = [part.fingerprint for part in self._parts((), "").values()]
        parts += [self._shared_fingerprint(name) for name, _ in self._sharing()]
        return Fingerprint(part="engine", fields={p.part: p.digest for p in parts}).digest

    def snapshot(
        self,
        tokens: Items[int],
        tenant: str = "",
        include: Items[str] = INCLUDE,
        *,
        statistics: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Keeps what is warm for a token log; blocks that are kept already are not written again.

        Args:
            include: "kv" (the target's), "spec" (drafters'), "stats".
            statistics: class S as JSON, for "stats".

        Raises:
            RequestError: `include` names something else.
        """
        for name in include:
            if name not in INCLUDE:
                raise RequestError(unknown("part of a snapshot", name, INCLUDE))
        parts = self._parts(tokens, tenant)
        kept = {
            name: self._keep(part)
            for name, part in parts.items()
            if ("kv" if name == TARGET else "spec") in include
        }
        if "spec" in include:
            self._keep_shared(tenant)
        drafters = self._drafters(parts, len(tokens))
        manifest = Manifest(
            head=head_of(tokens, tenant),
            num_tokens=len(tokens),
            parts=kept,
            watermarks={name: ready.ready_upto for name, ready in drafters.items()},
            statistics=dict(statistics or {}) if "stats" in include else {},
        )
        try:
            self.snapshots.put(manifest)
        except OSError as error:
            logger.warning("the manifest of a snapshot was not written: %s", error)
        return manifest

    def restore(
        self, tokens: Items[int], tenant: str = "", answers: Items[tuple[int, int]] = ()
    ) -> Report:
        """Brings back what is kept of a token log and is not here.

        Args:
            answers: ranges of `tokens` that were generated, for drafters that look up a tenant's
                other answers.
        """
        manifests = self.snapshots.along(tokens, tenant)
        parts = self._parts(tokens, tenant)
        before = parts[TARGET].ready_upto
        reasons = {name: self._bring(part, manifests) for name, part in parts.items()}
        self._bring_shared(tenant)
        self._remember(tokens, tenant, answers)
        kv_tokens = parts[TARGET].ready_upto
        drafters = {
            name: ready._replace(reason=reasons.get(name, ""))
            for name, ready in self._drafters(parts, len(tokens)).items()
        }
        report = Report(
            kv_tokens=kv_tokens,
            kv_restored=kv_tokens - before,
            drafters=drafters,
            restored_from=self.tier if kv_tokens > before else "",
            cold_reason=reasons[TARGET],
            is_half_warm=self._is_half_warm(kv_tokens, drafters),
            statistics=_statistics(manifests, parts),
        )
        self._count(report)
        return report

    def state(self, tokens: Items[int], tenant: str = "") -> State:
        """What is warm for a token log; changes nothing."""
        parts = self._parts(tokens, tenant)
        target = parts[TARGET]
        kept = sum(
            place.num_blocks for place in self.bundles.find(target.fingerprint, target.hashes)
        )
        return State(
            kv_tokens=target.ready_upto,
            drafters=self._drafters(parts, len(tokens)),
            tiers={"device": target.ready_upto, self.tier: kept * target.manager.block_size},
        )

    def forget(self, tokens: Items[int], tenant: str = "") -> int:
        """Deletes the snapshots along a log, and bundles that no other one names.

        Returns how many bundles went. What is in the engine stays until it is evicted.
        """
        names: set[str] = set()
        for manifest in self.snapshots.along(tokens, tenant):
            names |= manifest.bundles
            self.snapshots.drop(manifest.head)
        return self.bundles.drop_leaves(names - self.snapshots.bundles())

    def _parts(self, tokens: Items[int], tenant: str) -> dict[str, _Part]:
        """The target, and drafters with KV of their own."""
        engine = self.engine
        caches = {TARGET: PrefixCache(engine.runner, engine.manager, tokens)}
        for name, drafter in self._each():
            if isinstance(drafter, CachesPrefixes):
                caches[name] = drafter.prefix_cache(tokens)
        return {name: self._part(name, cache, tenant) for name, cache in caches.items()}

    def _part(self, name: str, cache: PrefixCache, tenant: str) -> _Part:
        runner, manager, tokens = cache
        spec, network = runner.network.spec, runner.network
        fields = {
            **self._model(runner),
            "dtype": str(spec.dtype).removeprefix("torch."),
            "block_size": str(manager.block_size),
            "kv_shapes": str([tuple(shape) for shape in spec.kv_shapes]),
            # Kernels round differently; a restored text must continue bit by bit.
            "kernels": f"{type(network).__name__}/{type(network.ops).__name__}/{spec.device.type}",
        }
        hashes = [name.hex() for name in prefix_hashes(tokens, manager.block_size, tenant)]
        fingerprint = Fingerprint(part=name, fields=fields)
        return _Part(runner, manager, tokens, tenant, fingerprint, hashes)

    def _model(self, runner: Runner) -> dict[str, str]:
        """A network made in memory has no name that another process could know it by."""
        weights = runner.network.spec.fingerprint or f"of this process ({self._unnamed})"
        return {"weights": weights, "tokenizer": self._tokenizer}

    def _shared_fingerprint(self, name: str) -> Fingerprint:
        return Fingerprint(part=f"{name}/shared", fields=self._model(self.engine.runner))

    def _each(self) -> Iterator[tuple[str, Drafter]]:
        for name in self.engine.drafters.names():
            yield name, self.engine.drafters[name]

    def _sharing(self) -> Iterator[tuple[str, SharesTensors]]:
        for name, drafter in self._each():
            if isinstance(drafter, SharesTensors):
                yield name, drafter

    def _drafters(self, parts: Mapping[str, _Part], num_tokens: int) -> dict[str, Readiness]:
        return {
            name: Readiness(str(drafter.warmth), _ready_upto(drafter, parts, num_tokens))
            for name, drafter in self._each()
            if "drafters" not in drafter.needs
        }

    def _is_half_warm(self, kv_tokens: int, drafters: Mapping[str, Readiness]) -> bool:
        # A drafter may be a block behind: it has no KV of the last tokens that it drafted.
        enough = kv_tokens - self.engine.manager.block_size
        return kv_tokens > 0 and any(ready.ready_upto < enough for ready in drafters.values())

    def _count(self, report: Report) -> None:
        self.num_restores += 1
        self.num_cold += report.kv_tokens == 0
        self.num_half_warm += report.is_half_warm

    def _keep(self, part: _Part) -> Kept:
        """Bundles of the blocks that are resident and not kept yet."""
        num_there = part.num_resident
        found = self.bundles.find(part.fingerprint, part.hashes[:num_there])
        names = [place.bundle.name for place in found]
        num_kept, num_bytes = sum(place.num_blocks for place in found), 0
        while num_kept < num_there:
            stop = min(num_kept + RUN_BLOCKS, num_there)
            bundle = self._keep_run(part, num_kept, stop)
            if bundle is None:
                break
            names.append(bundle.name)
            num_kept, num_bytes = stop, num_bytes + bundle.num_bytes
        return Kept(
            fingerprint=part.fingerprint,
            num_tokens=num_kept * part.manager.block_size,
            bundles=tuple(names),
            num_bytes=num_bytes,
            reason="" if num_kept == num_there else NO_SPACE,
        )

    def _keep_run(self, part: _Part, first: int, stop: int) -> Bundle | None:
        """Blocks [first, stop) as one bundle; None where it cannot be stored."""
        size = part.manager.block_size
        tokens = part.tokens[: stop * size]
        run = export_prefix(part.runner.pool, part.manager, tokens, part.tenant, start=first * size)
        return self.bundles.put(
            part.fingerprint,
            part.hashes[first:stop],
            _named(run),
            start=first * size,
            stop=stop * size,
            parent=part.hashes[first - 1] if first else "",
        )

    def _bring(self, part: _Part, manifests: list[Manifest]) -> str:
        """Imports what is kept and missing; returns why not all of it is there now."""
        found = self.bundles.find(part.fingerprint, part.hashes)
        num_kept = sum(place.num_blocks for place in found)
        num_damaged = self.bundles.num_damaged
        missing = self._runs(found, part.num_resident, part.manager.block_size)
        import_runs(part.runner.pool, part.manager, part.tokens, part.tenant, missing)
        if not part.manager.enable_prefix_caching:
            return NO_CACHE
        if not part.hashes:
            return TOO_SHORT
        if self.bundles.num_damaged > num_damaged:
            return DAMAGED
        if part.num_resident < num_kept:
            return NO_ROOM
        return "" if part.num_resident else _why_not_kept(part.fingerprint, manifests)

    def _runs(self, found: list[Found], num_there: int, block_size: int) -> Iterator[PrefixKV]:
        """What is kept behind the first blocks, bundle by bundle, as far as it is whole."""
        for bundle, at, num_blocks in found:
            first = bundle.start // block_size
            if first + at + num_blocks <= num_there:
                continue
            tensors = self.bundles.read(bundle)
            if tensors is None:
                return
            hashes = tuple(map(bytes.fromhex, bundle.hashes))
            yield PrefixKV(
                block_size=block_size, first=first, hashes=hashes, layers=_layers(tensors)
            )

    def _keep_shared(self, tenant: str) -> None:
        for name, drafter in self._sharing():
            tensors = drafter.shared(tenant)
            if tensors:
                self.bundles.put(self._shared_fingerprint(name), [head_of((), tenant)], tensors)

    def _bring_shared(self, tenant: str) -> None:
        for name, drafter in self._sharing():
            fingerprint = self._shared_fingerprint(name)
            for place in self.bundles.find(fingerprint, [head_of((), tenant)]):
                drafter.take_shared(tenant, self.bundles.read(place.bundle) or {})

    def _remember(self, tokens: Items[int], tenant: str, answers: Items[tuple[int, int]]) -> None:
        for _, drafter in self._each():
            if isinstance(drafter, Remembers):
                for start, stop in answers:
                    drafter.remember(tenant, tokens[start:stop])


def _ready_upto(drafter: Drafter, parts: Mapping[str, _Part], num_tokens: int) -> int:
    """Tokens alone suffice, or KV of its own, or the target's; of others nothing is known."""
    if drafter.warmth is WarmthClass.R0:
        return num_tokens
    owner = TARGET if "target layers" in drafter.needs else drafter.name
    return parts[owner].ready_upto if owner in parts else 0


def _statistics(manifests: list[Manifest], parts: Mapping[str, _Part]) -> Mapping[str, Any]:
    """Of the longest log that has any; those of other models say nothing here."""
    now = [part.fingerprint for part in parts.values()]
    return next((m.statistics for m in manifests if m.statistics and m.agrees(now)), {})


def _named(run: PrefixKV) -> dict[str, torch.Tensor]:
    named = {f"keys.{index}": layer.keys for index, layer in enumerate(run.layers)}
    return named | {f"values.{index}": layer.values for index, layer in enumerate(run.layers)}


def _layers(tensors: Mapping[str, torch.Tensor]) -> list[LayerKV]:
    """Of the names that `_named` gives; others belong to drafters that share the bundle."""
    count = sum(name.startswith("keys.") for name in tensors)
    return [LayerKV(tensors[f"keys.{i}"], tensors[f"values.{i}"]) for i in range(count)]


def _why_not_kept(fingerprint: Fingerprint, manifests: list[Manifest]) -> str:
    """The difference to whoever took the longest snapshot of this text, if somebody did."""
    for manifest in manifests:
        kept = manifest.parts.get(fingerprint.part)
        if kept is not None and kept.fingerprint.digest != fingerprint.digest:
            return fingerprint.difference(kept.fingerprint)
    return NOT_KEPT
