"""From names to an engine: load target, draft model and tokenizer, check the fit, wire them."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.control.base import Facts
from outrider.control.policies import make_controller
from outrider.draft.base import NEEDS, Drafter, ModelParts, Surroundings, Warmth
from outrider.engine.calibrate import load_prices
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.engine.heads import is_head, load_heads
from outrider.errors import ConfigError, PairError, RequestError, TokenizerError, unknown
from outrider.models.base import KVShape, ModelSpec, Network
from outrider.models.heads.fingerprint import head_fingerprint
from outrider.models.hub import resolve
from outrider.models.network import load_network
from outrider.models.runner import Runner
from outrider.ops.choose import choose
from outrider.quant.schemes import find_scheme
from outrider.registry import DRAFTERS, OURS
from outrider.request import OFF, Option, SpeculationParams
from outrider.sampling.grammar import GrammarCompiler
from outrider.tokenizer import Tokenizer, load_tokenizer, same_vocabulary

Settings = Mapping[str, Mapping[str, Any]]
DEMO, DEMO_DRAFT = "demo", "demo-draft"
MODEL_DRAFTER, TRANSLATOR = "draft_model", "translate"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What to load and how.

    Attributes:
        model: a hub id, a folder, or "demo".
        draft_model: likewise; None loads none, except that "demo" brings its own ("off" declines
            it). One of another vocabulary drafts through `translate`. A draft head may be named
            here, too, or "native" for modules in the target's own files.
        heads: draft heads trained on top of the target: folders, hub ids, or "native". Requests
            draft with the draft model where there is one, else with the first of these.
        drafters: further drafters by registered name; None is all that can be had here.
        drafter_settings: by drafter, what it is made with, as in
            {"suffix": {"max_shared_tokens": 200_000}}: memory and the like, which requests share.
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
        policy: who decides how far to draft where a request does not say: "adaptive", "fixed",
            "off", "table", or a plug-in's name.
    """

    model: str
    draft_model: str | None = None
    heads: tuple[str, ...] = ()
    drafters: tuple[str, ...] | None = None
    drafter_settings: Settings = field(default_factory=dict)
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
    policy: str = "adaptive"


def build(load: LoadConfig, options: Mapping[str, Any]) -> tuple[Engine, Tokenizer | None]:
    """An engine ready to run.

    Args:
        options: fields of `EngineConfig`.

    Raises:
        ConfigError, ModelError: with the value at fault and what to do.
    """
    config = EngineConfig.from_dict(options)
    draft_name, head_names = _draft_names(load)
    for quantization in (load.quantization, load.draft_quantization):
        find_scheme(quantization)  # a slip is told before gigabytes are fetched
    _check_settings(load.drafter_settings)
    if load.draft_quantization not in (None, OFF) and not draft_name:
        raise ConfigError(
            f"draft_quantization={load.draft_quantization!r}: no draft model is loaded (heads run "
            "as they are stored); drop it, or give draft_model=..."
        )
    target = _load(load, load.model, load.quantization)
    tokenizer = _tokenizer(load.model, load) if load.load_tokenizer else None
    max_model_len = config.model_len(target.spec)
    config = replace(config, max_model_len=max_model_len)
    runner, manager = _with_pool(target, config, max_model_len)
    surroundings = Surroundings(
        target=ModelParts(runner=runner, manager=manager, tokenizer=tokenizer),
        datastore=load.datastore,
        heads=load_heads(head_names, load.model, target, load.revision),
        make_pool=partial(_head_pool, runner, manager),
    )
    default_drafter = next(iter(surroundings.heads), "")
    if draft_name:
        surroundings = _with_draft(load, draft_name, surroundings, config)
        default_drafter = MODEL_DRAFTER if surroundings.shares_vocabulary else TRANSLATOR
    engine = Engine(
        runner,
        manager,
        config,
        drafters=_drafters(load, surroundings, {default_drafter, *surroundings.heads} - {""}),
        default_drafter=default_drafter,
        tokenizer=tokenizer,
        grammars=_grammars(tokenizer, target.spec),
        draft_model=draft_name,
        heads=dict(zip(surroundings.heads, head_names, strict=True)),
        controller=make_controller(max_model_len, _facts(target.spec), load.policy),
        clock=time.perf_counter,
        draft_fingerprint=_draft_fingerprint(surroundings),
    )
    engine.has_prices = load_prices(engine)
    return engine, tokenizer


def _draft_fingerprint(surroundings: Surroundings) -> str:
    """Of all weights that draft."""
    draft = surroundings.draft
    parts = [draft.runner.network.spec.fingerprint] if draft else []
    return "+".join([*parts, *map(head_fingerprint, surroundings.heads.values())])


def _facts(spec: ModelSpec) -> Facts:
    """What can be said of passes before one is timed: by the bytes they read."""
    kv_bytes = KVPool.bytes_per_block(spec.kv_shapes, 1, spec.dtype)
    weight_bytes = spec.num_parameters * spec.dtype.itemsize
    return Facts(clock=time.perf_counter, context_price=kv_bytes / max(weight_bytes, 1))


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


def _draft_names(load: LoadConfig) -> tuple[str, tuple[str, ...]]:
    """The draft model ("" for none) and the heads, first one that was named as draft model."""
    if load.draft_model == OFF:
        return "", load.heads
    if load.draft_model is None:
        return DEMO_DRAFT if load.model == DEMO and not load.heads else "", load.heads
    if is_head(load.draft_model):
        return "", (load.draft_model, *load.heads)
    return load.draft_model, load.heads


def _head_pool(
    runner: Runner, manager: BlockManager, kv_shapes: tuple[KVShape, ...]
) -> tuple[KVPool, BlockManager]:
    """As many blocks as the target has; a head has few layers, so they are small."""
    spec, size = runner.network.spec, manager.block_size
    pool = KVPool(kv_shapes, manager.num_blocks, size, spec.dtype, spec.device)
    return pool, BlockManager(manager.num_blocks, size, manager.enable_prefix_caching)


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


def _drafters(load: LoadConfig, surroundings: Surroundings, meant: set[str]) -> list[Drafter]:
    """Those that were asked for, or all that can be built here; parts before who composes them.

    Args:
        meant: those that run a draft model or a head that was given.
    """
    made: dict[str, Drafter] = {}
    settings = load.drafter_settings
    for name in _asked_drafters(load, meant):
        try:
            around = replace(surroundings, drafters=dict(made))
            drafter = _make_drafter(name, around, settings.get(name, {}))
        except ConfigError:
            is_meant = name in settings or (load.datastore is not None and _reads_datastore(name))
            if load.drafters is not None or name in meant or is_meant:
                raise
            continue  # nobody named it, and it cannot be had here
        made[name] = drafter
    if load.datastore is not None and not any(_reads_datastore(name) for name in made):
        raise ConfigError(
            f"datastore={load.datastore!r}: none of drafters={load.drafters!r} reads it; add "
            "'rest', or drop it"
        )
    for name in settings:
        if name not in made:
            raise ConfigError(
                f"drafter_settings[{name!r}]: that drafter is not set up here; name it in "
                "drafters=..., or drop its settings"
            )
    return list(made.values())


def _check_settings(settings: Settings) -> None:
    """ConfigError for a drafter or a setting that is not known, or a value out of bounds."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"drafter_settings={settings!r}: must map drafters to their settings")
    for name, given in settings.items():
        known: Mapping[str, Option] = getattr(DRAFTERS.load(name), "settings", {})
        told = f"drafter_settings[{name!r}]"
        if not isinstance(given, Mapping):
            raise ConfigError(f"{told}={given!r}: must map names of settings to values")
        for setting, value in given.items():
            if not known:
                raise ConfigError(f"{told}={dict(given)!r}: {name} has no settings; drop it")
            if setting not in known:
                raise ConfigError(unknown(f"setting of drafter {name!r}:", setting, list(known)))
            try:
                known[setting].check(f"{told}[{setting!r}]", value)
            except RequestError as error:
                raise ConfigError(str(error)) from None


def _reads_datastore(name: str) -> bool:
    return "datastore" in DRAFTERS.load(name).needs


def _asked_drafters(load: LoadConfig, meant: set[str]) -> list[str]:
    if load.drafters is None:
        names = list(_unasked_drafters())
    elif model_drafters := {MODEL_DRAFTER, TRANSLATOR} & set(load.drafters):
        raise ConfigError(
            f"drafters: {min(model_drafters)!r} comes with draft_model=..., do not list it"
        )
    else:
        names = list(load.drafters)
    names += sorted(meant)
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


def _make_drafter(name: str, surroundings: Surroundings, settings: Mapping[str, Any]) -> Drafter:
    found = DRAFTERS.load(name)
    if hasattr(found, "build"):
        built: Drafter = found.build(surroundings, **settings)
        return built
    made: Drafter = found(**settings)
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
