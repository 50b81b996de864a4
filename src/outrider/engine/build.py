"""From names to an engine: load target, draft model and tokenizer, check the fit, wire them."""

import logging
from collections.abc import Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.base import Drafter, Warmth
from outrider.draft.draft_model import ModelDrafter
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import ConfigError, PairError, RequestError, TokenizerError
from outrider.models.base import ModelSpec, Network
from outrider.models.hub import resolve
from outrider.models.network import load_network
from outrider.models.runner import Runner
from outrider.ops.choose import choose
from outrider.quant.schemes import find_scheme
from outrider.registry import DRAFTERS
from outrider.request import OFF, SpeculationParams
from outrider.sampling.grammar import GrammarCompiler
from outrider.tokenizer import Tokenizer, load_tokenizer, same_vocabulary

DEMO, DEMO_DRAFT = "demo", "demo-draft"
MODEL_DRAFTER = "draft_model"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What to load and how.

    Attributes:
        model: a hub id, a folder, or "demo".
        draft_model: likewise, of the same vocabulary; None loads none, except that "demo" brings
            its own ("off" declines it).
        drafters: further drafters by registered name; None is all that need nothing but tokens.
        dtype: "auto" (the checkpoint's on a GPU, float32 on the CPU) or a torch dtype's name.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
        revision: of the model's hub id; a draft model of another name is taken as it is now.
        network: "auto" (the lean decoder where it knows the family, else the adapter), "lean",
            or "adapter".
        kernels: "auto" (our C++ kernels on the CPU where a compiler is found, else torch's), "cpu"
            (ours or an error), or "torch".
        swap_linear: False leaves an adapted model's own linear layers in place (with
            network="adapter", and not quantised).
        batch_invariant: rows bitwise independent of their company, where kernels exist for it
            (float32 on the CPU).
        trust_remote_code: let the adapter run code that comes with the checkpoint.
        load_tokenizer: False serves token ids only.
        quantization: how the weights of products are quantised when they are loaded: "int8",
            "int8-dynamic", "int8-weight-only", "int4"; None or "off" keeps them as stored.
        draft_quantization: likewise for the draft model; None is as the target.
    """

    model: str
    draft_model: str | None = None
    drafters: tuple[str, ...] | None = None
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    network: str = "auto"
    kernels: str = "auto"
    swap_linear: bool = True
    batch_invariant: bool = True
    trust_remote_code: bool = False
    load_tokenizer: bool = True
    quantization: str | None = None
    draft_quantization: str | None = None


def build(load: LoadConfig, options: Mapping[str, Any]) -> tuple[Engine, Tokenizer | None]:
    """An engine ready to run.

    Args:
        options: fields of `EngineConfig`.

    Raises:
        ConfigError, ModelError: with the value at fault and what to do.
    """
    config = EngineConfig.from_dict(options)
    draft_name = _draft_name(load)
    for quantization in (load.quantization, load.draft_quantization):
        find_scheme(quantization)  # a slip is told before gigabytes are fetched
    target = _load(load, load.model, load.quantization)
    tokenizer = _tokenizer(load.model, load) if load.load_tokenizer else None
    max_model_len = config.model_len(target.spec)
    config = replace(config, max_model_len=max_model_len)
    runner, manager = _with_pool(target, config, max_model_len)
    drafters = [_make_drafter(name) for name in _token_drafters(load)]
    if draft_name:
        drafters.append(_model_drafter(load, draft_name, target.spec, tokenizer, config))
    engine = Engine(
        runner,
        manager,
        config,
        drafters=drafters,
        default_drafter=MODEL_DRAFTER if draft_name else "",
        tokenizer=tokenizer,
        grammars=_grammars(tokenizer, target.spec),
        draft_model=draft_name,
    )
    return engine, tokenizer


def speculation_params(values: str | Mapping[str, Any] | SpeculationParams) -> SpeculationParams:
    """From "off", a method's name, JSON-like keys, or the thing itself; RequestError if wrong."""
    if isinstance(values, SpeculationParams):
        return values
    if isinstance(values, str):
        return SpeculationParams(method=values)
    if not isinstance(values, Mapping):
        raise RequestError(
            f'speculation={values!r}: give "off", a method, or keys like {{"num_draft_tokens": 4}}'
        )
    return SpeculationParams.from_dict(values)


def _draft_name(load: LoadConfig) -> str:
    if load.draft_model == OFF:
        return ""
    if load.draft_model is None:
        return DEMO_DRAFT if load.model == DEMO else ""
    return load.draft_model


def _load(load: LoadConfig, name: str, quantization: str | None) -> Network:
    return load_network(
        name,
        ops=choose(
            load.kernels,
            device=_device(load.device),
            dtype=load.dtype,
            batch_invariant=load.batch_invariant,
        ),
        dtype=load.dtype,
        device=_device(load.device),
        revision=_revision(load, name),
        network=load.network,
        swap_linear=load.swap_linear,
        trust_remote_code=load.trust_remote_code,
        quantization=quantization,
    )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: torch sees no GPU; use device='cpu'")
    return name


def _tokenizer(name: str, load: LoadConfig) -> Tokenizer:
    return load_tokenizer(resolve(name, _revision(load, name)))


def _revision(load: LoadConfig, name: str) -> str | None:
    return load.revision if name == load.model else None


def _with_pool(
    network: Network, config: EngineConfig, max_model_len: int
) -> tuple[Runner, BlockManager]:
    spec = network.spec
    num_blocks = config.num_blocks(spec, max_model_len)
    pool = KVPool(spec.kv_shapes, num_blocks, config.block_size, spec.dtype, spec.device)
    manager = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
    return Runner(network, pool), manager


def _token_drafters(load: LoadConfig) -> Items[str]:
    if load.drafters is None:
        return list(_unasked_drafters())
    if MODEL_DRAFTER in load.drafters:
        raise ConfigError("drafters: 'draft_model' comes with draft_model=..., do not list it")
    return load.drafters


def _unasked_drafters() -> Iterator[str]:
    """All that need nothing but tokens; a broken plug-in is skipped, for nobody named it."""
    try:
        for part in DRAFTERS:
            if _needs_only_tokens(part.name):
                yield part.name
    except ConfigError as error:  # two plug-ins of one name: neither can be meant
        logger.warning("plug-ins skipped: %s", error)


def _needs_only_tokens(name: str) -> bool:
    try:
        return bool(DRAFTERS.load(name).warmth is Warmth.R0)
    except ConfigError as error:
        logger.warning("plug-in skipped: %s", error)
        return False


def _make_drafter(name: str) -> Drafter:
    drafter: Drafter = DRAFTERS.load(name)()
    return drafter


def _model_drafter(
    load: LoadConfig,
    name: str,
    target: ModelSpec,
    tokenizer: Tokenizer | None,
    config: EngineConfig,
) -> ModelDrafter:
    asked = load.draft_quantization
    network = _load(load, name, load.quantization if asked is None else asked)
    _check_pair(load, name, target, network.spec, tokenizer)
    affordable = replace(config, max_model_len=None).model_len(network.spec)
    max_model_len = min(config.model_len(target), affordable)
    runner, manager = _with_pool(network, config, max_model_len)
    return ModelDrafter(runner, manager, target.vocab_size)


def _check_pair(
    load: LoadConfig, name: str, target: ModelSpec, draft: ModelSpec, tokenizer: Tokenizer | None
) -> None:
    """PairError unless token ids mean the same in both models."""
    if tokenizer is None:
        if draft.vocab_size != target.vocab_size:
            raise PairError(
                f"draft model {name!r} has {draft.vocab_size} tokens, {target.name!r} has "
                f"{target.vocab_size}: use a draft model of the same vocabulary"
            )
        return
    try:
        reason = same_vocabulary(tokenizer, _tokenizer(name, load))
    except TokenizerError:
        reason = None if draft.vocab_size == target.vocab_size else "their sizes differ"
    if reason:
        raise PairError(
            f"draft model {name!r} does not share the vocabulary of {target.name!r}: {reason}; "
            "use a draft model of the same family"
        )


def _grammars(tokenizer: Tokenizer | None, spec: ModelSpec) -> GrammarCompiler | None:
    if tokenizer is None:
        return None
    return GrammarCompiler(tokenizer.backend, spec.vocab_size, spec.eos_token_ids)
