"""From names to an engine: load target, draft model and tokenizer, check the fit, wire them."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.base import NEEDS, Drafter, ModelParts, Surroundings, Warmth
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import ConfigError, PairError, RequestError, TokenizerError
from outrider.models.base import ModelSpec, Network
from outrider.models.hub import resolve
from outrider.models.network import load_network
from outrider.models.runner import Runner
from outrider.ops.choose import choose
from outrider.quant.schemes import find_scheme
from outrider.registry import DRAFTERS, OURS
from outrider.request import OFF, SpeculationParams
from outrider.sampling.grammar import GrammarCompiler
from outrider.tokenizer import Tokenizer, load_tokenizer, same_vocabulary

DEMO, DEMO_DRAFT = "demo", "demo-draft"
MODEL_DRAFTER, TRANSLATOR = "draft_model", "translate"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What to load and how.

    Attributes:
        model: a hub id, a folder, or "demo".
        draft_model: likewise; None loads none, except that "demo" brings its own ("off" declines
            it). One of another vocabulary drafts through `translate`.
        drafters: further drafters by registered name; None is all that can be had here.
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
        datastore: folder written by `outrider index build`, for method "rest".
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
    datastore: str | None = None


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
    surroundings = Surroundings(
        target=ModelParts(runner=runner, manager=manager, tokenizer=tokenizer),
        datastore=load.datastore,
    )
    default_drafter = ""
    if draft_name:
        surroundings = _with_draft(load, draft_name, surroundings, config)
        default_drafter = MODEL_DRAFTER if surroundings.shares_vocabulary else TRANSLATOR
    engine = Engine(
        runner,
        manager,
        config,
        drafters=_drafters(load, surroundings, default_drafter),
        default_drafter=default_drafter,
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


def _drafters(load: LoadConfig, surroundings: Surroundings, model: str) -> list[Drafter]:
    """Those that were asked for, or all that can be built here; parts before who composes them."""
    made: dict[str, Drafter] = {}
    for name in _asked_drafters(load, model):
        try:
            drafter = _make_drafter(name, replace(surroundings, drafters=dict(made)))
        except ConfigError:
            is_meant = load.datastore is not None and _reads_datastore(name)
            if load.drafters is not None or name == model or is_meant:
                raise
            continue  # nobody named it, and it cannot be had here
        made[name] = drafter
    if load.datastore is not None and not any(_reads_datastore(name) for name in made):
        raise ConfigError(
            f"datastore={load.datastore!r}: none of drafters={load.drafters!r} reads it; add "
            "'rest', or drop it"
        )
    return list(made.values())


def _reads_datastore(name: str) -> bool:
    return "datastore" in DRAFTERS.load(name).needs


def _asked_drafters(load: LoadConfig, model: str) -> list[str]:
    if load.drafters is None:
        names = list(_unasked_drafters())
    elif model_drafters := {MODEL_DRAFTER, TRANSLATOR} & set(load.drafters):
        raise ConfigError(
            f"drafters: {min(model_drafters)!r} comes with draft_model=..., do not list it"
        )
    else:
        names = list(load.drafters)
    if model:
        names.append(model)
    return sorted(dict.fromkeys(names), key=_composes)


def _composes(name: str) -> bool:
    return "drafters" in DRAFTERS.load(name).needs


def _unasked_drafters() -> Iterator[str]:
    """All built in, and plug-ins that need nothing but tokens; who is broken is skipped."""
    try:
        for part in DRAFTERS:
            if part.name in (MODEL_DRAFTER, TRANSLATOR):
                continue
            if _can_be_had(part.name, is_stranger=part.source != OURS):
                yield part.name
    except ConfigError as error:  # two plug-ins of one name: neither can be meant
        logger.warning("plug-ins skipped: %s", error)


def _can_be_had(name: str, is_stranger: bool) -> bool:
    try:
        drafter = DRAFTERS.load(name)
    except ConfigError as error:
        logger.warning("plug-in skipped: %s", error)
        return False
    if is_stranger:
        return drafter.warmth is Warmth.R0 and not drafter.needs
    return set(drafter.needs) <= set(NEEDS)


def _make_drafter(name: str, surroundings: Surroundings) -> Drafter:
    found = DRAFTERS.load(name)
    made: Drafter = found.build(surroundings) if hasattr(found, "build") else found()
    return made


def _with_draft(
    load: LoadConfig, name: str, surroundings: Surroundings, config: EngineConfig
) -> Surroundings:
    """With the draft model, its pool and its tokenizer."""
    target, tokenizer = surroundings.target.runner.network.spec, surroundings.target.tokenizer
    asked = load.draft_quantization
    network = _load(load, name, load.quantization if asked is None else asked)
    draft_tokenizer = _draft_tokenizer(load, name) if tokenizer is not None else None
    reason = _difference(target, tokenizer, network.spec, draft_tokenizer)
    if reason and draft_tokenizer is None:
        raise PairError(
            f"draft model {name!r} does not share the vocabulary of {target.name!r} ({reason}), "
            "and without the tokenizers of both nothing can be translated: use a draft model of "
            "the same family"
        )
    if reason:
        logger.warning(
            "draft model %r has another vocabulary than %r (%s): its drafts are translated",
            name,
            target.name,
            reason,
        )
    affordable = replace(config, max_model_len=None).model_len(network.spec)
    max_model_len = affordable if reason else min(config.model_len(target), affordable)
    runner, manager = _with_pool(network, config, max_model_len)
    return replace(
        surroundings,
        draft=ModelParts(runner=runner, manager=manager, tokenizer=draft_tokenizer),
        shares_vocabulary=not reason,
    )


def _draft_tokenizer(load: LoadConfig, name: str) -> Tokenizer | None:
    """None where the draft model's folder has none: then it has the target's, or none that fits."""
    try:
        return _tokenizer(name, load)
    except TokenizerError:
        return None


def _difference(
    target: ModelSpec, tokenizer: Tokenizer | None, draft: ModelSpec, other: Tokenizer | None
) -> str | None:
    """Why token ids do not mean the same in both models; None if they do."""
    if tokenizer is not None and other is not None:
        return same_vocabulary(tokenizer, other)
    if draft.vocab_size != target.vocab_size:
        return f"it has {draft.vocab_size} tokens instead of {target.vocab_size}"
    return None


def _grammars(tokenizer: Tokenizer | None, spec: ModelSpec) -> GrammarCompiler | None:
    if tokenizer is None:
        return None
    return GrammarCompiler(tokenizer.backend, spec.vocab_size, spec.eos_token_ids)
