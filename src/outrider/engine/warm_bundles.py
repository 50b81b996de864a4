"""PartBundles: carries the KV of a part into bundles and back, block by block under its hashes."""

from collections.abc import Iterator, Mapping

import torch

from outrider.cache.transfer import PrefixKV, export_prefix, import_runs
from outrider.engine.warm_parts import Part
from outrider.ops.base import LayerKV
from outrider.session.bundle import Bundle, BundleStore, Found
from outrider.session.fingerprint import Fingerprint
from outrider.session.snapshot import Kept, Manifest

RUN_BLOCKS = 64  # blocks per bundle: what is read, checked and evicted at once
NOT_KEPT = "nothing is kept of this text"
TOO_SHORT = "the text is shorter than one block"
DAMAGED = "a bundle is lost or damaged"
NO_ROOM = "no KV block is free"
NO_CACHE = "enable_prefix_caching is off"
NO_SPACE = "the bundles have no room, or cannot be written"


class PartBundles:
    """The bundles of one place, as the parts of an engine use them."""

    def __init__(self, bundles: BundleStore) -> None:
        self._bundles = bundles

    def keep(self, part: Part) -> Kept:
        """Stores the blocks that are resident and not kept yet."""
        num_there = part.num_resident
        found = self._bundles.find(part.fingerprint, part.hashes[:num_there])
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

    def bring(self, part: Part, manifests: list[Manifest]) -> str:
        """Imports what is kept and missing; returns why not all of it is there now."""
        found = self._bundles.find(part.fingerprint, part.hashes)
        num_kept = sum(place.num_blocks for place in found)
        num_damaged = self._bundles.num_damaged
        missing = self._runs(found, part.num_resident, part.manager.block_size)
        import_runs(part.runner.pool, part.manager, part.tokens, part.salt, missing)
        if not part.manager.enable_prefix_caching:
            return NO_CACHE
        if not part.hashes:
            return TOO_SHORT
        if self._bundles.num_damaged > num_damaged:
            return DAMAGED
        if part.num_resident < num_kept:
            return NO_ROOM
        return "" if part.num_resident else _why_not_kept(part.fingerprint, manifests)

    def drop(self, part: Part) -> None:
        """Forgets all bundles with blocks of a part; what another log continued goes cold too."""
        for place in self._bundles.find(part.fingerprint, part.hashes):
            self._bundles.drop(place.bundle.name)

    def bundles_of(self, part: Part, whole: bool = False) -> list[Bundle]:
        """Those with blocks of a part; `whole`: with no others."""
        found = self._bundles.find(part.fingerprint, part.hashes)
        return [
            bundle
            for bundle, _, num_blocks in found
            if not whole or num_blocks == len(bundle.hashes)
        ]

    def num_kept(self, part: Part) -> int:
        """Leading tokens that bundles hold."""
        found = self._bundles.find(part.fingerprint, part.hashes)
        return sum(place.num_blocks for place in found) * part.manager.block_size

    def _keep_run(self, part: Part, first: int, stop: int) -> Bundle | None:
        """Blocks [first, stop) as one bundle; None where it cannot be stored."""
        size = part.manager.block_size
        tokens = part.tokens[: stop * size]
        run = export_prefix(part.runner.pool, part.manager, tokens, part.salt, start=first * size)
        return self._bundles.put(
            part.fingerprint,
            part.hashes[first:stop],
            _named(run),
            start=first * size,
            stop=stop * size,
            parent=part.hashes[first - 1] if first else "",
        )

    def _runs(self, found: list[Found], num_there: int, block_size: int) -> Iterator[PrefixKV]:
        """What is kept behind the first blocks, bundle by bundle, as far as it is whole."""
        for bundle, at, num_blocks in found:
            first = bundle.start // block_size
            if first + at + num_blocks <= num_there:
                continue
            tensors = self._bundles.read(bundle)
            if tensors is None:
                return
            hashes = tuple(map(bytes.fromhex, bundle.hashes))
            yield PrefixKV(
                block_size=block_size, first=first, hashes=hashes, layers=_layers(tensors)
            )


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
