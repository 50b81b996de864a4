"""The fused pass: near its twin of single operations, and the same bits in any pass on any threads.

Shape legend: N rows of a pass, V vocabulary.
"""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.models.config import DecoderConfig, LayerConfig
from outrider.models.decoder import Decoder
from outrider.models.weights import tensor_shapes
from outrider.ops.base import DecoderParts, DecoderPass, LayerKV, Ops, Span, Window
from outrider.ops.cpu.ops import CpuOps
from outrider.ops.torch import TorchOps
from outrider.quant.schemes import SCHEMES, find_scheme
from tests.kernels import CPU_FLAGS, cpu_library, make_ops
from tests.models.test_decoder import CASES, DRAFTS, OTHERS, PARENTS, PROMPT, slots_of
from tests.models.tiny import BASE, VOCAB, Passes, difference, tiny_model

THREADS = [2, 5]
WIDE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 203,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 1024,
    "attention_bias": True,
    "tie_word_embeddings": True,
}
LENGTH = 600  # many tiles of attention, and more rows than a thread prepares by itself
LONG = [(13 * i * i + 5 * i) % VOCAB for i in range(LENGTH)]
SLOTS = [(7 * i) % 800 for i in range(LENGTH + 8)]


@pytest.fixture(scope="module")
def cpu() -> CpuOps:
    return CpuOps(cpu_library())


def decoder_of(config_class: str, options: dict[str, Any], ops: Ops, scheme: str) -> Decoder:
    """The lean decoder of a tiny random model of `transformers`."""
    model = tiny_model(config_class, **options)
    config = DecoderConfig.from_dict(model.config.to_dict())
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Decoder(config, state, ops, scheme=find_scheme(scheme))


def by_layer(decoder: Decoder) -> Any:
    """A network that runs one operation at a time."""

    def forward(*args: Any) -> Tensor:
        return decoder.forward_by_layer(*args).logits_RV

    return SimpleNamespace(spec=decoder.spec, ops=decoder.ops, forward=forward)


def answers(network: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of a prefill, a decode beside a prefill, and a tree; and the KV they leave."""
    torch.manual_seed(1)
    run, root = Passes(network), len(PROMPT) - 2
    seen = run((Span(slots_of(0, root), 0, root), PROMPT[:root]))
    beside = (Span(slots_of(1, 9), 0, 9), OTHERS[0])
    seen += run(beside, (Span(slots_of(0, root + 1), root, 1), PROMPT[root : root + 1]))
    tree = Span(slots_of(0, root + 2 + len(DRAFTS)), root + 1, 1, PARENTS)
    seen += run((Span(slots_of(1, 10), 9, 1), [3]), (tree, [PROMPT[-1], *DRAFTS]))
    return seen, [part for layer in run.kv for part in layer]


@pytest.mark.parametrize("scheme", ["off", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_every_family_is_near_its_twin(cpu: CpuOps, name: str, scheme: str) -> None:
    config_class, options = CASES[name]
    decoder = decoder_of(config_class, options, cpu, scheme)
    assert decoder._fused is not None
    (ours, our_kv), (theirs, their_kv) = answers(decoder), answers(by_layer(decoder))
    tolerance = 1e-5 if scheme == "off" else 2e-3  # an input may be rounded to the next integer
    assert difference(torch.cat(ours), torch.cat(theirs)) < tolerance
    for mine, other in zip(our_kv, their_kv, strict=True):
        assert difference(mine, other) < tolerance


def test_layers_that_see_their_own_chunk_only_are_near_their_twin(cpu: CpuOps) -> None:
    """No dense family asks for it yet; the interface does."""
    config = DecoderConfig.from_dict({"model_type": "llama", **BASE})
    windows = [Window(chunk=8), Window(sliding=6, chunk=16)]
    layers = [LayerConfig(window, has_rope=True) for window in windows]
    torch.manual_seed(5)
    tensors = {name: torch.randn(shape) * 0.3 for name, shape in tensor_shapes(config).items()}
    full = Decoder(config, dict(tensors), cpu)
    decoder = Decoder(replace(config, layers=layers), tensors, cpu)
    ours, theirs = answers(decoder)[0], answers(by_layer(decoder))[0]
    assert difference(torch.cat(ours), torch.cat(theirs)) < 1e-5
    assert difference(torch.cat(ours), torch.cat(answers(full)[0])) > 0.01, "the windows cut"


@pytest.mark.parametrize("kernels", CPU_FLAGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_near_the_reference_kernels(kernels: str, scheme: str) -> None:
    ops = make_ops(kernels)
    config_class, options = CASES["qwen3-mixed"]
    ours = answers(decoder_of(config_class, options, ops, scheme))[0]
    theirs = answers(decoder_of(config_class, options, TorchOps(), scheme))[0]
    tolerance = {"off": 1e-5, "int8-weight-only": 1e-5, "int8-dynamic": 5e-2}.get(scheme, 2e-3)
    assert difference(torch.cat(ours), torch.cat(theirs)) < tolerance


def wide_decoder(ops: Ops, scheme: str, window: int, is_half: bool) -> Decoder:
    """Biases, head norms, odd widths; weights that bfloat16 holds where `is_half`."""
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    config = DecoderConfig.from_dict({**WIDE, **(sliding if window else {})})
    torch.manual_seed(3)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name != "lm_head.weight":
            value = torch.randn(shape) * 0.2 + (len(shape) == 1 and "norm" in name)
            tensors[name] = value.bfloat16().float() if is_half else value
    return Decoder(config, tensors, ops, scheme=find_scheme(scheme))


def whole(decoder: Decoder) -> Tensor:
    return Passes(decoder, 800)((Span(SLOTS[:LENGTH], 0, LENGTH), LONG))[0]


def in_pieces(decoder: Decoder, cuts: list[int]) -> Tensor:
    run, parts = Passes(decoder, 800), []
    for start, end in itertools.pairwise([0, *cuts, LENGTH]):
        parts += run((Span(SLOTS[:end], start, end - start), LONG[start:end]))
    return torch.cat(parts)


def in_a_tree(decoder: Decoder, root: int) -> Tensor:
    """The true rows root .. root + 3, as a chain of one and nodes between junk, in company."""
    run = Passes(decoder, 1600)
    far = [slot + 800 for slot in SLOTS]
    run((Span(far[:root], 0, root), LONG[:root]), (Span(SLOTS[:40], 0, 40), LONG[:40]))
    tokens = [LONG[root], 5, LONG[root + 1], LONG[root + 2], 6, 7, LONG[root + 3]]
    tree = Span(far[: root + 7], root, 1, (-1, -1, 1, 0, 2, 2))
    before, after = Span(SLOTS[:45], 40, 5), Span(SLOTS[50:57], 0, 3, (-1, -1, 1, 1))
    rows = [(before, LONG[40:45]), (tree, tokens), (after, [1, 2, 3, 4, 5, 6, 7])]
    return run(*rows)[1][[0, 2, 3, 6]]


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("scheme", ["off", "off, bfloat16", "int8", "int8-dynamic", "int4"])
def test_bits_do_not_depend_on_chunks_trees_company_or_threads(
    cpu: CpuOps, scheme: str, window: int
) -> None:
    name, _, half = scheme.partition(", ")
    decoder = wide_decoder(cpu, name, window, bool(half))
    expected = whole(decoder)
    assert torch.equal(in_pieces(decoder, [1, 2, 4, 7, 12, 20, 37, 100, 511, 513]), expected)
    for root in (3, 130, 511):
        assert torch.equal(in_a_tree(decoder, root), expected[root : root + 4])
    for num_threads in THREADS:
        torch.set_num_threads(num_threads)
        assert torch.equal(whole(decoder), expected)
        assert torch.equal(in_pieces(decoder, [1, 100, 590, 598]), expected)
        assert torch.equal(in_a_tree(decoder, 511), expected[511:515])


@pytest.mark.parametrize("kernels", [name for name in CPU_FLAGS if name != "cpu"])
@pytest.mark.parametrize("scheme", ["off", "int8", "int4"])
def test_other_instruction_sets_keep_their_bits_too(kernels: str, scheme: str) -> None:
    decoder = wide_decoder(make_ops(kernels), scheme, 70, is_half=True)
    expected = whole(decoder)
    torch.set_num_threads(2)
    assert torch.equal(in_pieces(decoder, [1, 3, 9, 30, 513]), expected)
    assert torch.equal(in_a_tree(decoder, 130), expected[130:134])


def test_all_rows_alone_have_the_bits_of_the_whole(cpu: CpuOps) -> None:
    decoder = wide_decoder(cpu, "off", 0, is_half=False)
    assert torch.equal(in_pieces(decoder, list(range(1, LENGTH))), whole(decoder))


def test_wanted_rows_have_the_bits_they_have_among_all(cpu: CpuOps) -> None:
    decoder = wide_decoder(cpu, "off", 0, is_half=False)
    expected, kv = whole(decoder), Passes(decoder, 800).kv
    layout = cpu.layout([Span(SLOTS[:LENGTH], 0, LENGTH)], torch.device("cpu"))
    for wanted in ([LENGTH - 1], [3, 8, 599, 0], [5, 5], []):
        wanted_R = torch.tensor(wanted, dtype=torch.int64)
        logits_RV = decoder.forward(torch.tensor(LONG), layout, kv, wanted_R)
        assert torch.equal(logits_RV, expected[wanted])


def test_two_decoders_and_two_pools_do_not_disturb_each_other(cpu: CpuOps) -> None:
    first, second = (wide_decoder(cpu, scheme, 0, is_half=False) for scheme in ("off", "int8"))
    expected, other = whole(first), whole(second)
    runs = [Passes(first, 800), Passes(second, 800), Passes(first, 800)]
    parts: list[list[Tensor]] = [[], [], []]
    for start, end in itertools.pairwise([0, 10, 300, LENGTH]):
        for run, seen in zip(runs, parts, strict=True):
            seen += run((Span(SLOTS[:end], start, end - start), LONG[start:end]))
    assert torch.equal(torch.cat(parts[0]), expected)
    assert torch.equal(torch.cat(parts[1]), other)
    assert torch.equal(torch.cat(parts[2]), expected)


def test_a_row_of_no_numbers_stays_alone(cpu: CpuOps) -> None:
    decoder = wide_decoder(cpu, "off", 0, is_half=False)
    decoder_tokens, bad = [4, 9, 14], 77
    expected = Passes(decoder)((Span([0, 1, 2], 0, 3), decoder_tokens))[0]
    spoiled = wide_decoder(SpoiledEmbedding(cpu, bad), "off", 0, is_half=False)
    run = Passes(spoiled)
    rows = run((Span([8, 9], 0, 2), [4, bad]), (Span([0, 1, 2], 0, 3), decoder_tokens))
    assert rows[0][1].isnan().all()
    assert torch.equal(rows[1], expected)


class SpoiledEmbedding(CpuOps):
    """Kernels of a network in which one token has an embedding of no numbers."""

    def __init__(self, ops: CpuOps, token: int) -> None:
        super().__init__(ops._library)
        self._token = token

    def fuse(self, parts: DecoderParts) -> DecoderPass | None:
        embedding_VD = parts.embedding_VD.clone()
        embedding_VD[self._token] = float("nan")
        return super().fuse(replace(parts, embedding_VD=embedding_VD))


def test_a_pool_of_another_dtype_is_refused_rather_than_misread(cpu: CpuOps) -> None:
    decoder = wide_decoder(cpu, "off", 0, is_half=False)
    kv = [LayerKV(*(part.bfloat16() for part in layer)) for layer in Passes(decoder).kv]
    layout = cpu.layout([Span([0, 1], 0, 2)], torch.device("cpu"))
    with pytest.raises(AssertionError):
        decoder.forward(torch.tensor([1, 2]), layout, kv, torch.tensor([1]))


def test_products_of_others_are_not_fused(cpu: CpuOps) -> None:
    """An `Ops` that makes one product by itself still serves, one operation at a time."""

    class Mixed(CpuOps):
        def linear(self, weight: Any, bias_O: Tensor | None = None) -> Any:
            ours = super().linear(weight, bias_O)
            return ours if weight.shape[0] != VOCAB else partial(ours)

    decoder = wide_decoder(Mixed(cpu._library), "off", 0, is_half=False)
    assert decoder._fused is None
    fused = wide_decoder(cpu, "off", 0, is_half=False)
    span = (Span(SLOTS[:20], 0, 20), LONG[:20])
    assert difference(Passes(decoder)(span)[0], Passes(fused)(span)[0]) < 1e-5
