"""The C interface of the suffix tree, as ctypes sees it; mirrors cpp/suffix.cpp."""

import ctypes
from ctypes import c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from outrider.ops.cpu.build import Sources, load

SOURCES = Sources(
    name="suffix",
    folder=Path(__file__).parent / "cpp",
    main="suffix.cpp",
    title="the suffix tree",
    twin="plain Python serves",
)
SIGNATURES = {
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


@cache
def library() -> ctypes.CDLL | None:
    """None where it cannot be compiled (`build.load` says why, once)."""
    loaded = load(SOURCES)
    if loaded is not None:
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(loaded, f"suffix_{name}")
            function.restype, function.argtypes = result, arguments
    return loaded
