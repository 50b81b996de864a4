"""A tiny random model, a byte tokenizer, and an engine of them: a whole loop in milliseconds."""

from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias

import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.base import Drafter, ModelParts, Surroundings
from outrider.draft.draft_model import ModelDrafter
from outrider.draft.ngram import NgramDrafter
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.models.base import KVShape
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder
from outrider.models.heads.spec import Head
from outrider.models.runner import Runner
from outrider.models.weights import tensor_shapes
from outrider.ops.choose import choose
from outrider.quant.schemes import find_scheme
from outrider.registry import DRAFTERS
from outrider.request import Request
from outrider.sampling.grammar import GrammarCompiler
from outrider.stream.events import Committed, Event

Made: TypeAlias = str | Callable[[], Drafter]

VOCAB_SIZE = 256
EOS = 3
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class ByteTokenizer:
    """One token per byte; ids below 4 are special and read as nothing."""

    vocab_size = VOCAB_SIZE
    eos_token_id = EOS
    special_ids = frozenset(range(4))

    def fingerprint(self) -> str:
        return "bytes"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte for byte in text.encode() if byte > 3]

    def decode(self, ids: Items[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i > 3 or not skip_special_tokens).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        """What a grammar must know."""
        return [bytes([i]) if i not in self.special_ids else b"" for i in range(VOCAB_SIZE)]


def tiny_decoder(
    seed: int = 0,
    *,
    scale: float = 0.25,
    noise: float = 0.0,
    quantization: str | None = None,
    kernels: str = "auto",
    **config: Any,
) -> Decoder:
    """A random Llama of two layers over 256 tokens.

    Args:
        scale: deviation of the weights; larger makes sharper laws.
        noise: deviation of what is added to the weights of this seed; the less, the more often
            the decoder agrees with the one without.
        quantization: name of a scheme for its weights.
        kernels: "cpu", "torch", or "auto": see `ops.choose`.
        config: keys of a Hugging Face config that shall differ.
    """
    read = DecoderConfig.from_dict({**TINY, **config})
    generator = torch.Generator().manual_seed(seed)
    noise_generator = torch.Generator().manual_seed(seed + 1)
    tensors = {
        name: torch.ones(shape)
        if len(shape) == 1
        else _random(shape, scale, generator) + _random(shape, noise, noise_generator)
        for name, shape in tensor_shapes(read).items()
        if not (read.is_tied and name == "lm_head.weight")
    }
    return Decoder(
        read,
        tensors,
        choose(kernels),
        name=f"tiny-{seed}",
        eos_token_ids=(EOS,),
        scheme=find_scheme(quantization),
    )


def tiny_engine(
    *,
    num_blocks: int = 256,
    block_size: int = 4,
    drafters: Items[Drafter | Made] | None = None,
    draft_seed: int | None = 0,
    draft_noise: float = 0.0,
    target: Decoder | None = None,
    kernels: str = "auto",
    datastore: str | None = None,
    heads: Mapping[str, Head] | None = None,
    options: Mapping[str, Any] | None = None,
    **engine: Any,
) -> Engine:
    """An engine over tiny models that proves its KV after every step.

    Args:
        drafters: drafters beside `ngram` and `draft_model`, or in their place where one has that
            name. A registered name, a class or a function is made into one as an engine does, after
            those before it; a class that has `build` is shown this engine's models.
        datastore: folder for drafters that retrieve from one.
        heads: draft heads on the target, by the drafter that runs each.
        draft_seed: seed of the draft model; 0 is the target itself, None loads none.
        draft_noise: added to the draft model's weights; 0.01 on the target's own is accepted
            about half of the time.
        kernels: of the draft model, and of the target where none is given.
        options: fields of `EngineConfig`. engine: further arguments of `Engine`.
    """
    target = target or tiny_decoder(kernels=kernels)
    config = EngineConfig(
        **{"block_size": block_size, "check_integrity": True, "max_num_seqs": 16, **(options or {})}
    )
    draft = None
    if draft_seed is not None:
        network = tiny_decoder(draft_seed, noise=draft_noise, kernels=kernels)
        draft = _pooled(network, num_blocks, config)
    parts = _pooled(target, num_blocks, config)
    around = Surroundings(
        target=parts,
        draft=draft,
        datastore=datastore,
        heads=heads or {},
        make_pool=lambda shapes: _pool(shapes, target, num_blocks, config),
    )
    mine = _drafters(drafters or (), around)
    spec = target.spec
    engine.setdefault("tokenizer", ByteTokenizer())
    engine.setdefault("grammars", _grammars(spec.vocab_size, spec.eos_token_ids))
    return Engine(parts.runner, parts.manager, config, drafters=mine, **engine)


@cache
def _grammars(vocab_size: int, eos_token_ids: tuple[int, ...]) -> GrammarCompiler:
    """One for all engines: it keeps what it has compiled."""
    return GrammarCompiler(ByteTokenizer(), vocab_size, eos_token_ids)


def _drafters(given: Items[Drafter | Made], around: Surroundings) -> list[Drafter]:
    """The usual ones and those that are ready, then, in order, those that are to be made."""
    mine: dict[str, Drafter] = {"ngram": NgramDrafter()}
    to_make: list[Made] = []
    for part in given:
        if isinstance(part, str) or callable(part):
            to_make.append(part)
        else:
            mine[part.name] = part
    if around.draft is not None:
        usual = ModelDrafter(around.draft.runner, around.draft.manager, VOCAB_SIZE)
        mine.setdefault(usual.name, usual)
    for make in to_make:
        if make not in mine:
            made = _made(make, replace(around, drafters=dict(mine)))
            mine[made.name] = made
    return list(mine.values())


def _made(make: Made, around: Surroundings) -> Drafter:
    found = DRAFTERS.load(make) if isinstance(make, str) else make
    made: Drafter = found.build(around) if hasattr(found, "build") else found()
    return made


def run(engine: Engine, requests: Items[Request]) -> dict[tuple[str, int], list[int]]:
    """Serves requests to the end; the tokens of each completion by (request id, index)."""
    return {
        key: [t for e in told for t in e.token_ids]
        for key, told in events(engine, requests).items()
    }


def events(engine: Engine, requests: Items[Request]) -> dict[tuple[str, int], list[Committed]]:
    """Serves requests to the end; the events of each completion by (request id, index)."""
    for request in requests:
        engine.add(request)
    told: dict[tuple[str, int], list[Committed]] = {}
    while engine.has_work():
        for event in engine.step():
            _note(told, event)
    return told


def _note(told: dict[tuple[str, int], list[Committed]], event: Event) -> None:
    if isinstance(event, Committed):
        told.setdefault((event.request_id, event.index), []).append(event)


def _pool(
    shapes: tuple[KVShape, ...], network: Decoder, num_blocks: int, config: EngineConfig
) -> tuple[KVPool, BlockManager]:
    spec = network.spec
    pool = KVPool(shapes, num_blocks, config.block_size, spec.dtype, spec.device)
    return pool, BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)


def _pooled(network: Decoder, num_blocks: int, config: EngineConfig) -> ModelParts:
    pool, manager = _pool(network.spec.kv_shapes, network, num_blocks, config)
    return ModelParts(runner=Runner(network, pool), manager=manager, tokenizer=ByteTokenizer())


def _random(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * scale
