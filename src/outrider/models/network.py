"""From a name to a network: the lean decoder where it knows the family, else the adapter."""

from collections.abc import Mapping
from typing import Any

import torch

from outrider.errors import ConfigError, ModelError
from outrider.models.base import Network
from outrider.models.loader import (
    eos_token_ids,
    fingerprint,
    is_lean,
    load_decoder,
    pick_device,
    pick_dtype,
    pick_scheme,
    read_config,
    resolve,
    stored_dtype,
)
from outrider.ops.base import Ops

KINDS = ("auto", "lean", "adapter")


def load_network(
    name: str,
    *,
    ops: Ops,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    network: str = "auto",
    trust_remote_code: bool = False,
    quantization: str | None = None,
    swap_linear: bool = True,
) -> Network:
    """The network of a hub id, a folder, or a shipped name.

    Args:
        network: "lean", "adapter", or "auto", which prefers the lean decoder.
        quantization: see `quant.schemes`; None leaves the weights as they are stored.
        swap_linear: False leaves the adapter's linear layers to the model itself.

    Raises:
        ModelError: it cannot be found, read, or run.
        ConfigError: `quantization` or `swap_linear` cannot be honoured.
    """
    if network not in KINDS:
        raise ModelError(f"network={network!r}: must be one of {', '.join(KINDS)}")
    folder = resolve(name, revision)
    config = read_config(folder)
    _refuse_quantised(name, config)
    if network == "lean" or (network == "auto" and is_lean(config)):
        if not swap_linear:
            raise ConfigError(
                f"swap_linear=False: {name!r} runs in the lean decoder, which has no linear layers "
                "but ours; use network='adapter'"
            )
        return load_decoder(
            folder, dtype=dtype, device=device, ops=ops, name=name, quantization=quantization
        )
    from outrider.models.adapter import load_adapter  # transformers takes seconds to import

    place = pick_device(device)
    chosen = pick_dtype(dtype, stored_dtype(config), place) or torch.float32
    scheme = pick_scheme(quantization, chosen, place)
    if not swap_linear and not scheme.is_off:
        raise ConfigError(
            f"swap_linear=False with quantization={quantization!r}: only swapped layers can be "
            "quantised; leave one of them out"
        )
    return load_adapter(
        folder,
        dtype=chosen,
        device=place,
        ops=ops,
        name=name,
        trust_remote_code=trust_remote_code,
        eos_token_ids=eos_token_ids(folder),
        fingerprint=fingerprint(folder, scheme.variant),
        scheme=scheme,
        swap_linear=swap_linear,
    )


def _refuse_quantised(name: str, config: Mapping[str, Any]) -> None:
    stored = config.get("quantization_config")
    if stored:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else stored
        raise ModelError(
            f"the weights of {name!r} are stored quantised (quant_method={method!r}), which is not "
            "read: load the checkpoint it was made from, with quantization='int8' or 'int4'"
        )
