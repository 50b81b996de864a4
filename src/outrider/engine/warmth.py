"""Warmth: keeps what was computed for a token log outside the engine, and brings it back.

Shape legend: A boundaries between layers of the target, R positions, H its hidden width.
"""

import logging
from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from outrider.cache.table import BlockTable
from outrider.cache.transfer import hold_prefix
from outrider.draft.warm import MadeOfStates, Remembers
from outrider.engine.engine import Engine
from outrider.engine.warm_bundles import PartBundles
from outrider.engine.warm_parts import TARGET, Part, Parts, Readiness, is_half_warm
from outrider.errors import ConfigError, RequestError, unknown
from outrider.models.runner import Piece, Runner
from outrider.session.bundle import BundleStore
from outrider.session.files import DiskFiles, MemoryFiles
from outrider.session.snapshot import Manifest, Snapshots, head_of
from outrider.step import EMPTY_TREE
from outrider.tokenizer import Tokenizer

INCLUDE = ("kv", "spec", "stats")
MAX_BYTES = 8 << 30
MAX_REBUILD_TOKENS = 2048  # of one pass, so that requests wait for no more than that
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class State:
    """How warm a token log is now.

    Attributes:
        kv_tokens: leading tokens with KV of the target in the engine.
        drafters: by name; those that only compose others are left out.
        tiers: leading tokens whose target KV is at hand, by where: "device", and "disk" or "host".
        has_more: whether more is kept than is in the engine, of the target or a drafter.
    """

    kv_tokens: int
    drafters: Mapping[str, Readiness]
    tiers: Mapping[str, int]
    has_more: bool = False


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
        self._parts = Parts(engine, tokenizer)
        self._kept = PartBundles(self.bundles)

    @property
    def fingerprint(self) -> str:
        """Changes when anything does that warm state depends on."""
        return self._parts.fingerprint()

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
        parts = self._parts.of(tokens, tenant)
        kept = {
            name: self._kept.keep(part)
            for name, part in parts.items()
            if ("kv" if name == TARGET else "spec") in include
        }
        if "spec" in include:
            self._keep_shared(tenant)
        drafters = self._parts.readiness(parts, len(tokens))
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
        parts = self._parts.of(tokens, tenant)
        before = parts[TARGET].ready_upto
        reasons = {name: self._kept.bring(part, manifests) for name, part in parts.items()}
        self._bring_shared(tenant)
        self._remember(tokens, tenant, answers)
        kv_tokens = parts[TARGET].ready_upto
        drafters = {
            name: ready._replace(reason=reasons.get(name, ""))
            for name, ready in self._parts.readiness(parts, len(tokens)).items()
        }
        report = Report(
            kv_tokens=kv_tokens,
            kv_restored=kv_tokens - before,
            drafters=drafters,
            restored_from=self.tier if kv_tokens > before else "",
            cold_reason=reasons[TARGET],
            is_half_warm=is_half_warm(parts, drafters, len(tokens)),
            statistics=_statistics(manifests, parts),
        )
        self._count(report)
        return report

    def state(self, tokens: Items[int], tenant: str = "") -> State:
        """What is warm for a token log; changes nothing."""
        parts = self._parts.of(tokens, tenant)
        target = parts[TARGET]
        return State(
            kv_tokens=target.ready_upto,
            drafters=self._parts.readiness(parts, len(tokens)),
            tiers={"device": target.ready_upto, self.tier: self._kept.num_kept(target)},
            has_more=any(self._kept.num_kept(part) > part.ready_upto for part in parts.values()),
        )

    def forget(self, tokens: Items[int], tenant: str = "", num_shared: int = 0) -> int:
        """Deletes the snapshots along a log, and bundles that no other one names.

        Returns how many bundles went. What is in the engine stays until it is evicted.

        Args:
            num_shared: leading tokens that other logs have too; what is of these alone stays.
        """
        names = self._names(tokens, tenant)
        for manifest in self.snapshots.along(tokens, tenant):
            if manifest.num_tokens > num_shared or not num_shared:
                names |= manifest.bundles
                self.snapshots.drop(manifest.head)
        needed = self.snapshots.bundles() | self._names(tokens[:num_shared], tenant, whole=True)
        return self.bundles.drop_leaves(names - needed)

    def owners(self, drafter: str) -> tuple[str, ...]:
        """Whose KV a drafter of this engine drafts from: its own, or that of any it may ask."""
        return self._parts.owners(drafter)

    def distrust(self, owner: str, tokens: Items[int], tenant: str = "") -> int:
        """Sets the watermark of a drafter to 0: the bundles with its KV of a log are forgotten.

        Returns how many tokens `rebuild` has to run before what is resident is right again.
        """
        part = self._parts.of(tokens, tenant)[owner]
        self._kept.drop(part)
        return part.ready_upto

    def rebuild(self, owner: str, tokens: Items[int], tenant: str = "", start: int = 0) -> int:
        """Runs a drafter's model over a log from `start` on; returns where the next call begins.

        One pass, and one of the target for a head that reads its states. Blocks keep their places
        and their names: what is written is what they are named after, so whoever shares them gains
        by it. What was evicted meanwhile is left out, and the return is then `start`.
        """
        parts = self._parts.of(tokens, tenant)
        part = parts[owner]
        table = hold_prefix(part.manager, part.tokens, part.salt)
        try:
            num_there = len(table.blocks) * part.manager.block_size
            stop = min(start + MAX_REBUILD_TOKENS, num_there)
            is_run = stop > start and self._rerun(owner, parts, table, start, stop)
            return stop if is_run else start
        finally:
            part.manager.free(table)

    def _rerun(
        self, owner: str, parts: Mapping[str, Part], table: BlockTable, start: int, stop: int
    ) -> bool:
        """Positions [start, stop); False where that would take more than a pass."""
        drafter, part = self.engine.drafters[owner], parts[owner]
        if isinstance(drafter, MadeOfStates):
            tapped_ARH = self._states(parts[TARGET], drafter.boundaries, start, stop)
            if tapped_ARH is not None:
                drafter.rerun(table, part.tokens, start, tapped_ARH)
            return tapped_ARH is not None
        assert isinstance(part.runner, Runner)
        last_id = part.runner.network.spec.vocab_size - 1
        chain = [min(token, last_id) for token in part.tokens[start:stop]]
        part.runner.run([Piece(table, start, chain, EMPTY_TREE, False)])
        return True

    def _states(
        self, target: Part, boundaries: tuple[int, ...], start: int, stop: int
    ) -> Tensor | None:
        """tapped_ARH of positions [start, stop), from a pass that leaves nothing behind.

        None where too little of the log before them, or no block, is there.
        """
        runner, manager = self.engine.runner, target.manager
        table = hold_prefix(manager, target.tokens[:start], target.salt)
        try:
            first = len(table.blocks) * manager.block_size
            if start - first > MAX_REBUILD_TOKENS or not manager.reserve(table, stop):
                return None
            chain = target.tokens[first:stop]
            states = runner.run([Piece(table, first, chain, EMPTY_TREE, False)], boundaries).states
            assert states is not None
            return states.tapped_AND[:, start - first :]
        finally:
            manager.free(table)

    def _names(self, tokens: Items[int], tenant: str, whole: bool = False) -> set[str]:
        """Bundles with blocks of a log; `whole`: those with no other blocks."""
        parts = self._parts.of(tokens, tenant).values()
        found = (bundle for part in parts for bundle in self._kept.bundles_of(part, whole))
        return {bundle.name for bundle in found}

    def _count(self, report: Report) -> None:
        self.num_restores += 1
        self.num_cold += report.kv_tokens == 0
        self.num_half_warm += report.is_half_warm

    def _keep_shared(self, tenant: str) -> None:
        for drafter, fingerprint in self._parts.sharing():
            tensors = drafter.shared(tenant)
            if tensors:
                self.bundles.put(fingerprint, [head_of((), tenant)], tensors)

    def _bring_shared(self, tenant: str) -> None:
        for drafter, fingerprint in self._parts.sharing():
            for place in self.bundles.find(fingerprint, [head_of((), tenant)]):
                drafter.take_shared(tenant, self.bundles.read(place.bundle) or {})

    def _remember(self, tokens: Items[int], tenant: str, answers: Items[tuple[int, int]]) -> None:
        for _, drafter in self._parts.drafters():
            if isinstance(drafter, Remembers):
                for start, stop in answers:
                    drafter.remember(tenant, tokens[start:stop])


def _statistics(manifests: list[Manifest], parts: Mapping[str, Part]) -> Mapping[str, Any]:
    """Of the longest log that has any; those of other models say nothing here."""
    now = [part.fingerprint for part in parts.values()]
    return next((m.statistics for m in manifests if m.statistics and m.agrees(now)), {})
