"""The C interfaces of the indexes, as ctypes sees them; mirrors suffix.cpp and datastore.cpp."""

import ctypes
from collections.abc import Mapping
from ctypes import c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from outrider.ops.cpu.build import Sources, load

Signatures: TypeAlias = Mapping[str, tuple[Any, tuple[Any, ...]]]

FOLDER = Path(__file__).parent / "cpp"
SOURCES = Sources(
    name="suffix",
    folder=FOLDER,
    main="suffix.cpp",
    title="the suffix tree",
    twin="plain Python serves",
)
SIGNATURES: Signatures = {
    "new": (c_void_p, (c_int32,)),
    "free": (None, (c_void_p,)),
    "open": (c_int32, (c_void_p,)),
    "extend": (None, (c_void_p, c_int32, c_void_p, c_int32)),
    "remove": (None, (c_void_p, c_int32)),
    "count": (c_int32, (c_void_p, c_void_p, c_int32)),
    "speculate": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32),
            *(c_double, c_double, c_double, c_void_p, c_void_p, c_void_p),
        ),
    ),
    "longest": (c_int32, (c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_void_p)),
    "num_tokens": (c_int64, (c_void_p,)),
    "num_nodes": (c_int64, (c_void_p,)),
    "bytes": (c_int64, (c_void_p,)),
}
DATASTORE_SOURCES = Sources(
    name="datastore",
    folder=FOLDER,
    main="datastore.cpp",
    title="the datastore's search",
    twin="plain Python serves",
)
DATASTORE_SIGNATURES: Signatures = {
    "new": (c_void_p, (c_void_p, c_int64, c_void_p, c_int64, c_int32)),
    "free": (None, (c_void_p,)),
    "search": (c_int32, (c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p)),
    "draft": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int64),
            *(c_int32, c_int32, c_int32, c_void_p, c_void_p),
        ),
    ),
}


@cache
def library() -> ctypes.CDLL | None:
    """Of the suffix tree; None where it cannot be compiled (`build.load` says why, once)."""
    return _load(SOURCES, SIGNATURES)


@cache
def datastore_library() -> ctypes.CDLL | None:
    """Of the datastore's search; None where it cannot be compiled."""
    return _load(DATASTORE_SOURCES, DATASTORE_SIGNATURES)


def _load(sources: Sources, signatures: Signatures) -> ctypes.CDLL | None:
    loaded = load(sources)
    if loaded is not None:
        for name, (result, arguments) in signatures.items():
            function = getattr(loaded, f"{sources.name}_{name}")
            function.restype, function.argtypes = result, arguments
    return loaded
