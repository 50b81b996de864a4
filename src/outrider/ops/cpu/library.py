"""The C interface of the kernels, as ctypes sees it; mirrors the structs in cpp/*.h."""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache

from outrider.ops.cpu import build

FLOAT32, BFLOAT16, INT8_FLOAT, INT8, INT4 = range(5)


class LinearStruct(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("kind", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("activation_bits", c_int32),
    )


class AttentionStruct(ctypes.Structure):
    _fields_ = (
        ("heads", c_int32),
        ("groups", c_int32),
        ("key_width", c_int32),
        ("value_width", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("sliding", c_int32),
        ("chunk", c_int32),
        ("sinks", c_void_p),
    )


class KVStruct(ctypes.Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p))


class LayerStruct(ctypes.Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("sliding", c_int32),
        ("chunk", c_int32),
        ("has_rope", c_int32),
    )


class DecoderStruct(ctypes.Structure):
    _fields_ = (
        ("hidden", c_int32),
        ("heads", c_int32),
        ("groups", c_int32),
        ("head_width", c_int32),
        ("inner", c_int32),
        ("vocabulary", c_int32),
        ("num_layers", c_int32),
        ("rotated", c_int32),
        ("eps", c_float),
        ("scale", c_float),
        ("embedding", c_void_p),
        ("embedding_kind", c_int32),
        ("embedded", c_int32),
        ("final_norm", c_void_p),
        ("head", LinearStruct),
        ("layers", POINTER(LayerStruct)),
    )


class CallStruct(ctypes.Structure):
    _fields_ = (
        ("tokens", c_void_p),
        ("spans", c_void_p),
        ("parents", c_void_p),
        ("wanted", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("kv", c_void_p),
        ("logits", c_void_p),
        ("entry", c_void_p),
        ("first", c_void_p),
        ("taps", c_void_p),
        ("tapped", c_void_p),
        ("num_spans", c_int32),
        ("num_wanted", c_int32),
        ("threads", c_int32),
        ("num_taps", c_int32),
    )


STRUCTS = (LinearStruct, AttentionStruct, KVStruct, LayerStruct, DecoderStruct, CallStruct)

SIGNATURES = {
    "lanes": (c_int32, ()),
    "has_tiles": (c_int32, ()),
    "has_threads": (c_int32, ()),
    "read": (c_double, (c_void_p, c_int64, c_int32)),
    "linear": (None, (c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int32)),
    "layout": (None, (c_void_p, c_int32, c_void_p, c_void_p, c_void_p)),
    "attend": (
        None,
        (c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int32),
    ),
    "write": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_int32, c_int32)),
    "argmax": (None, (c_void_p, c_int32, c_int32, c_void_p, c_int32)),
    "decoder_scratch": (c_void_p, ()),
    "decoder_free": (None, (c_void_p,)),
    "decoder": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "size": (c_int32, (c_int32,)),
}


class Library:
    """The kernels as functions; each releases the interpreter's lock while it runs."""

    lanes: Callable[[], int]
    has_tiles: Callable[[], int]
    has_threads: Callable[[], int]
    read: Callable[..., float]
    linear: Callable[..., None]
    layout: Callable[..., None]
    attend: Callable[..., None]
    write: Callable[..., None]
    argmax: Callable[..., None]
    decoder_scratch: Callable[[], int]
    decoder_free: Callable[[int], None]
    decoder: Callable[..., int]
    size: Callable[[int], int]

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, f"outrider_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        sizes = [self.size(index) for index in range(len(STRUCTS))]
        assert sizes == [ctypes.sizeof(struct) for struct in STRUCTS], "structs differ from C++"


@cache
def library() -> Library | None:
    """None where there are no kernels (`build.load` says why)."""
    loaded = build.load()
    return None if loaded is None else Library(loaded)
