"""From a checkpoint folder to a running decoder: device, dtype, weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from outrider.errors import ConfigError, ModelError, unknown
from outrider.models.checkpoint import eos_token_ids, fingerprint, load_tensors, read_config
from outrider.models.config import DecoderConfig, is_lean
from outrider.models.decoder import Decoder
from outrider.models.heads.native import native_names
from outrider.models.hub import resolve
from outrider.models.weights import EMBEDDING
from outrider.ops.base import Ops
from outrider.quant.schemes import Scheme, find_scheme

__all__ = [
    "DTYPES",
    "eos_token_ids",
    "fingerprint",
    "is_lean",
    "load_decoder",
    "load_tensors",
    "pick_device",
    "pick_dtype",
    "pick_scheme",
    "read_config",
    "resolve",
    "stored_dtype",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_decoder(
    folder: Path | str,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    ops: Ops,
    name: str | None = None,
    quantization: str | None = None,
) -> Decoder:
    """The lean decoder in `folder`, ready to run.

    Args:
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on an
            accelerator; float32 on the CPU, where half-width products are slow or missing.
        name: what `spec.name` shall say; the folder if None.
        quantization: see `quant.schemes`; None leaves the weights as they are stored.

    Raises:
        ModelError: the checkpoint is broken, or beyond the lean decoder (see `is_lean`).
        ConfigError: there is no such quantisation, or not in this dtype on this device.
    """
    folder = Path(folder)
    values = read_config(folder)
    config = DecoderConfig.from_dict(values)
    device = pick_device(device)
    tensors = load_tensors(folder)
    for extra in native_names(tensors):  # heads that came with it are loaded as heads
        del tensors[extra]
    stored = stored_dtype(values)
    if stored is None and EMBEDDING in tensors:
        stored = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    chosen = pick_dtype(dtype, stored, device)
    scheme = pick_scheme(quantization, chosen, device)
    return Decoder(
        config,
        tensors,
        ops,
        name=name or str(folder),
        eos_token_ids=eos_token_ids(folder),
        fingerprint=fingerprint(folder, scheme.variant),
        dtype=chosen,
        device=device,
        scheme=scheme,
    )


def pick_dtype(dtype: str, stored: str | None, device: torch.device) -> torch.dtype:
    """What `dtype` means on this device for weights stored as `stored` (None: unknown, float32).

    Raises:
        ModelError: there is no such dtype, or the model cannot run in the one it is stored in.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelError(unknown("dtype", dtype, ["auto", *DTYPES]))
        return DTYPES[dtype]
    if device.type == "cpu" or stored is None:
        return torch.float32
    if stored not in DTYPES:
        raise ModelError(f"weights stored as {stored!r}: give dtype as one of {', '.join(DTYPES)}")
    return DTYPES[stored]


def pick_scheme(quantization: str | None, dtype: torch.dtype, device: torch.device) -> Scheme:
    """The scheme by name. ConfigError if there is none such for this dtype on this device."""
    scheme = find_scheme(quantization)
    if not scheme.is_off and device.type == "cpu" and dtype != torch.float32:
        raise ConfigError(
            f"quantization={quantization!r} with dtype={str(dtype).removeprefix('torch.')!r}: "
            "on the CPU quantised products are made for float32; leave dtype at 'auto'"
        )
    return scheme


def pick_device(device: torch.device | str) -> torch.device:
    """The device by name. ModelError if this machine has none such."""
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ModelError(f"device {str(device)!r} cannot be used here ({first_line})") from error
    return chosen


def stored_dtype(values: Mapping[str, Any]) -> str | None:
    """The dtype that `config.json` gives the weights, of a multimodal model its language part."""
    inner = values.get("text_config") or {}
    return next(
        (v[key] for v in (values, inner) for key in ("dtype", "torch_dtype") if v.get(key)), None
    )
