"""Bundles: runs of KV blocks in files, found again by the hash of the prefix they belong to."""

import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence as Items
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from outrider.session.files import Files
from outrider.session.fingerprint import Fingerprint
from outrider.session.sealed import seal, unseal

MANIFEST, TENSORS = ".bundle.json", ".safetensors"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What one file of tensors holds: the manifest beside it.

    All state of a range of blocks that is rebuilt from the same pass goes into one bundle, so that
    it is stored, evicted and restored together (a draft head's state with the target's KV).

    Attributes:
        name: from the fingerprint and the last hash, so equal content has one name.
        hashes: of the blocks, in order, as hex; each names its whole prefix and its tenant.
        start, stop: positions of the log that the blocks cover.
        parent: hash of the block before the first, "" at the start of the log.
        file, num_bytes, checksum: the tensors; the checksum is part of the file's name, so a
            manifest never stands beside tensors of another time.
    """

    name: str
    fingerprint: Fingerprint
    hashes: tuple[str, ...]
    start: int
    stop: int
    parent: str
    file: str
    num_bytes: int
    checksum: str

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


class Found(NamedTuple):
    """A bundle that goes on with a prefix: with `num_blocks` blocks from its block `at` on."""

    bundle: Bundle
    at: int
    num_blocks: int


class BundleStore:
    """Bundles within a budget of bytes; where it is full, the leaf not used for longest goes.

    A leaf is a bundle that none continues, so a prefix never loses its beginning before its end.
    Whatever happens to a file, the worst is that its blocks are cold.

    Args:
        files: where they lie; what is there already is taken over, in order of use.
        max_bytes: of tensors and manifests together.
    """

    def __init__(self, files: Files, max_bytes: int) -> None:
        self.files = files
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_damaged = 0
        self._bundles: OrderedDict[str, Bundle] = OrderedDict()
        self._where: dict[tuple[str, str], tuple[str, int]] = {}
        self._num_children: Counter[tuple[str, str]] = Counter()
        self._take_over()

    def __len__(self) -> int:
        return len(self._bundles)

    def __contains__(self, name: str) -> bool:
        return name in self._bundles

    def __iter__(self) -> Iterator[Bundle]:
        """Least recently used first."""
        return iter(list(self._bundles.values()))

    def num_bytes_of(self, names: Iterable[str]) -> int:
        """Of the tensors of those bundles that are there."""
        return sum(self._bundles[name].num_bytes for name in set(names) if name in self._bundles)

    def find(self, fingerprint: Fingerprint, hashes: Items[str]) -> list[Found]:
        """Who holds the blocks with these hashes, as far as they go without a gap."""
        found: list[Found] = []
        for prefix_hash in hashes:
            place = self._where.get((fingerprint.digest, prefix_hash))
            if place is None:
                break
            bundle, index = self._bundles[place[0]], place[1]
            last = found[-1] if found else None
            if last is not None and last.bundle is bundle:
                found[-1] = last._replace(num_blocks=last.num_blocks + 1)
            else:
                found.append(Found(bundle, index, 1))
        return found

    def put(
        self,
        fingerprint: Fingerprint,
        hashes: Items[str],
        tensors: Mapping[str, Tensor],
        *,
        start: int = 0,
        stop: int = 0,
        parent: str = "",
    ) -> Bundle | None:
        """Stores one run; replaces a bundle of the same name.

        None, and nothing stored, where it does not fit beside what it continues, or the disk
        refuses it.
        """
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        checksum = hashlib.sha256(data).hexdigest()
        name = bundle_name(fingerprint, hashes[-1])
        bundle = Bundle(
            name=name,
            fingerprint=fingerprint,
            hashes=tuple(hashes),
            start=start,
            stop=stop,
            parent=parent,
            file=f"{name}-{checksum[:16]}{TENSORS}",
            num_bytes=len(data),
            checksum=checksum,
        )
        before = self._bundles.get(name)
        if before is not None and before.file == bundle.file:
            self._touch(name)
            return before
        return bundle if self._store(bundle, data, before) else None

    def read(self, bundle: Bundle) -> dict[str, Tensor] | None:
        """Its tensors; None, and the bundle forgotten, if they are not what was stored."""
        data = self.files.read(bundle.file)
        tensors = None
        if data is not None and hashlib.sha256(data).hexdigest() == bundle.checksum:
            tensors = _load(data)
        if tensors is None:
            self.num_damaged += 1
            logger.warning("bundle %s is lost or damaged: its blocks are cold", bundle.file)
            self.drop(bundle.name)
            return None
        self._touch(bundle.name)
        return tensors

    def drop(self, name: str) -> None:
        """Forgets a bundle and deletes its files; what continued it stays, out of reach."""
        bundle = self._bundles.get(name)
        if bundle is not None:
            self._remove(bundle)
            self.files.remove(bundle.name + MANIFEST)
            self.files.remove(bundle.file)

    def drop_leaves(self, names: Container[str]) -> int:
        """Forgets those of the bundles that no other bundle continues; returns how many."""
        count = 0
        while leaf := next((b for b in self if b.name in names and self._is_leaf(b)), None):
            self.drop(leaf.name)
            count += 1
        return count

    def _store(self, bundle: Bundle, data: bytes, before: Bundle | None) -> bool:
        manifest = seal(asdict(bundle))
        if not self._make_room(len(data) + len(manifest), bundle, before):
            return False
        try:
            # The manifest comes last: with it, and not before, the bundle is there.
            self.files.write(bundle.file, data)
            self.files.write(bundle.name + MANIFEST, manifest)
        except OSError as error:
            logger.warning("bundle %s was not stored: %s", bundle.file, error)
            self.files.remove(bundle.file)
            return False
        if before is not None:
            self._remove(before)
            self.files.remove(before.file)
        self._add(bundle)
        return True

    def _make_room(self, num_bytes: int, bundle: Bundle, before: Bundle | None) -> bool:
        """Evicts leaves, but never what the new bundle continues or replaces."""
        place = self._where.get((bundle.fingerprint.digest, bundle.parent))
        kept = {bundle.name, place[0] if place else ""}
        num_bytes -= self._size(before) if before is not None else 0
        while self.num_bytes + num_bytes > self.max_bytes:
            leaf = next((b for b in self if b.name not in kept and self._is_leaf(b)), None)
            if leaf is None:
                return False
            self.drop(leaf.name)
        return True

    def _is_leaf(self, bundle: Bundle) -> bool:
        digest = bundle.fingerprint.digest
        return not any(self._num_children[digest, h] for h in bundle.hashes)

    def _size(self, bundle: Bundle) -> int:
        return bundle.num_bytes + len(seal(asdict(bundle)))

    def _touch(self, name: str) -> None:
        self._bundles.move_to_end(name)
        self.files.touch(name + MANIFEST)

    def _add(self, bundle: Bundle) -> None:
        self._bundles[bundle.name] = bundle
        self.num_bytes += self._size(bundle)
        digest = bundle.fingerprint.digest
        self._num_children[digest, bundle.parent] += 1
        for index, prefix_hash in enumerate(bundle.hashes):
            self._where[digest, prefix_hash] = bundle.name, index

    def _remove(self, bundle: Bundle) -> None:
        del self._bundles[bundle.name]
        self.num_bytes -= self._size(bundle)
        digest = bundle.fingerprint.digest
        self._num_children[digest, bundle.parent] -= 1
        for prefix_hash in bundle.hashes:
            if self._where.get((digest, prefix_hash), ("",))[0] == bundle.name:
                del self._where[digest, prefix_hash]

    def _take_over(self) -> None:
        """The index, from the manifests; what belongs to none was left by a crash, and goes."""
        names = self.files.names()
        present = set(names)
        for name in names:
            if not name.endswith(MANIFEST):
                continue
            bundle = _bundle(unseal(self.files.read(name)))
            if bundle is None or bundle.file not in present:
                self.files.remove(name)
            else:
                self._add(bundle)
        named = {bundle.file for bundle in self}
        for name in names:
            if name.endswith(TENSORS) and name not in named:
                self.files.remove(name)


def bundle_name(fingerprint: Fingerprint, last_hash: str) -> str:
    return hashlib.sha256(f"{fingerprint.digest}:{last_hash}".encode()).hexdigest()[:32]


def _bundle(record: dict[str, Any] | None) -> Bundle | None:
    try:
        values: dict[str, Any] = dict(record or {})
        values["fingerprint"] = Fingerprint(**values["fingerprint"])
        values["hashes"] = tuple(values["hashes"])
        return Bundle(**values)
    except (KeyError, TypeError):
        return None


def _load(data: bytes) -> dict[str, Tensor] | None:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError):
        return None
