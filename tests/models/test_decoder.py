"""The lean decoder against `transformers`: whole, cut, ragged, branching and after compaction.

Windows are narrower than the contexts used here, so that they cut.

Shape legend: N rows of a pass, V vocabulary, P positions.
"""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from outrider.errors import ModelError
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder, silu_anywhere
from outrider.models.loader import load_decoder
from outrider.models.weights import tensor_shapes
from outrider.ops.base import Ops, Span
from outrider.ops.torch import TorchOps
from tests.kernels import make_ops
from tests.models.tiny import (
    BASE,
    MAX_POSITIONS,
    VOCAB,
    Passes,
    difference,
    reference_logits,
    write_tiny,
)
from tests.twins.naive_ops import NaiveOps

TOLERANCE = 2e-5
WINDOW = 5
PROMPT = [(7 * i + 3) % VOCAB for i in range(23)]
OTHERS = [[(11 * i + 5) % VOCAB for i in range(9)], [42]]
PARENTS = (-1, 0, 0, -1, 3, 1)
DRAFTS = [4, 8, 15, 16, 23, 42]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [2.0, 3.0, 5.0, 7.0],
    "original_max_position_embeddings": 64,
}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
MIXED = ["sliding_attention", "full_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-biases": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-head-dim": ("LlamaConfig", {"head_dim": 12, "num_key_value_heads": 4}),
    "llama-llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama-dynamic": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama-yarn": (
        "LlamaConfig",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 32}},
    ),
    "llama-yarn-mscale": (
        "LlamaConfig",
        {
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 32,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "beta_fast": 4,
                "beta_slow": 1,
                "truncate": False,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-late-sliding": ("Qwen2Config", {**SLIDING, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-mixed": (
        "Qwen3Config",
        {"head_dim": 8, "attention_bias": True, **SLIDING, "layer_types": MIXED},
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "smollm3-sliding": (
        "SmolLM3Config",
        {"no_rope_layers": [0, 1], "tie_word_embeddings": True, **SLIDING},
    ),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "phi3-partial": (
        "Phi3Config",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": (
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small only lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    folder: Path
    model: Any
    decoder: Decoder

    def expected(self, tokens: list[int]) -> Tensor:
        return reference_logits(self.model, tokens)


class Checkpoint(NamedTuple):
    folder: Path
    model: Any

    def case(self, ops: Ops) -> Case:
        return Case(self.folder, self.model, load_decoder(self.folder, ops=ops))


@pytest.fixture(scope="module", params=["torch", "cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


@pytest.fixture(scope="module", params=CASES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    config_class, options = CASES[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    return Checkpoint(folder, write_tiny(folder, config_class, **options))


@pytest.fixture(scope="module")
def case(checkpoint: Checkpoint, ops: Ops) -> Case:
    return checkpoint.case(ops)


@pytest.fixture(scope="module")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    return Checkpoint(folder, write_tiny(folder))


@pytest.fixture(scope="module")
def llama(llama_checkpoint: Checkpoint, ops: Ops) -> Case:
    return llama_checkpoint.case(ops)


def slots_of(sequence: int, num_slots: int) -> list[int]:
    """Slots of one of four sequences that share the pool, scattered and not in order."""
    return [sequence + 4 * ((5 * i) % 59) for i in range(num_slots)]


def paths_to_nodes(parents: tuple[int, ...]) -> list[list[int]]:
    """For every node the nodes from the root's child down to it."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


def test_prefill(case: Case) -> None:
    (ours,) = Passes(case.decoder)((Span(slots_of(0, len(PROMPT)), 0, len(PROMPT)), PROMPT))
    assert ours.dtype == torch.float32
    assert difference(ours, case.expected(PROMPT)) < TOLERANCE


def test_chunked_prefill(case: Case) -> None:
    run, parts = Passes(case.decoder), []
    for start, end in itertools.pairwise([0, 1, 8, 20, len(PROMPT)]):
        parts += run((Span(slots_of(0, end), start, end - start), PROMPT[start:end]))
    assert difference(torch.cat(parts), case.expected(PROMPT)) < TOLERANCE


def test_batched_decode(case: Case) -> None:
    run = Passes(case.decoder)
    sequences = [list(PROMPT), *map(list, OTHERS)]
    num_cached = [0] * len(sequences)
    for step in range(4):
        rows = [
            (Span(slots_of(i, len(s)), num_cached[i], len(s) - num_cached[i]), s[num_cached[i] :])
            for i, s in enumerate(sequences)
        ]
        for i, ours in enumerate(run(*rows)):
            expected = case.expected(sequences[i])[num_cached[i] :]
            assert difference(ours, expected) < TOLERANCE, f"sequence {i}, step {step}"
            num_cached[i] = len(sequences[i])
            sequences[i].append(int(ours[-1].argmax()))


def test_tree_verify(case: Case) -> None:
    run = Passes(case.decoder)
    prompt, other = PROMPT, OTHERS[0]
    run((Span(slots_of(0, len(prompt) - 1), 0, len(prompt) - 1), prompt[:-1]))
    tree = Span(slots_of(0, len(prompt) + len(DRAFTS)), len(prompt) - 1, 1, PARENTS)
    beside = Span(slots_of(1, len(other) + 2), 0, len(other), (-1, -1))
    ours, theirs = run((tree, [prompt[-1], *DRAFTS]), (beside, [*other, 1, 2]))
    assert difference(ours[0], case.expected(prompt)[-1]) < TOLERANCE
    for node, path in enumerate(paths_to_nodes(PARENTS)):
        tokens = [*prompt, *(DRAFTS[i] for i in path)]
        assert difference(ours[1 + node], case.expected(tokens)[-1]) < TOLERANCE, f"node {node}"
    assert difference(theirs[-1], case.expected([*other, 2])[-1]) < TOLERANCE


def test_decode_after_compaction(case: Case) -> None:
    run = Passes(case.decoder)
    slots = slots_of(0, 40)
    root = len(PROMPT) - 1
    run((Span(slots[: root + 1], 0, root + 1), PROMPT))
    run((Span(slots[: root + 1 + len(DRAFTS)], root, 1, PARENTS), [PROMPT[-1], *DRAFTS]))
    accepted = [0, 2]
    run.move([slots[root + 1 + node] for node in accepted], slots[root + 1 : root + 3])
    tokens = [*PROMPT, *(DRAFTS[node] for node in accepted), 77, 78]
    num_cached = len(tokens) - 2
    (ours,) = run((Span(slots[: len(tokens)], num_cached, 2), tokens[num_cached:]))
    assert difference(ours, case.expected(tokens)[num_cached:]) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3-mixed"])
def test_naive_ops_agree(name: str, tmp_path: Path) -> None:
    config_class, options = CASES[name]
    model = write_tiny(tmp_path, config_class, **options)
    run = Passes(load_decoder(tmp_path, ops=NaiveOps()))
    prompt = PROMPT[:8]
    run((Span(slots_of(0, 7), 0, 7), prompt[:7]))
    (ours,) = run((Span(slots_of(0, 8 + len(DRAFTS)), 7, 1, PARENTS), [prompt[7], *DRAFTS]))
    for node, path in enumerate(paths_to_nodes(PARENTS)):
        expected = reference_logits(model, [*prompt, *(DRAFTS[i] for i in path)])
        assert difference(ours[1 + node], expected[-1]) < TOLERANCE


def test_the_window_cuts(tmp_path: Path) -> None:
    cut = write_tiny(tmp_path, "MistralConfig", sliding_window=WINDOW)
    ours = load_decoder(tmp_path, ops=TorchOps())
    assert all(layer.window.sliding == WINDOW for layer in ours.config.layers)
    full = reference_logits(cut, PROMPT)
    cut.config.sliding_window = None
    assert difference(full, reference_logits(cut, PROMPT)) > 0.01


def test_only_wanted_rows_have_logits(llama: Case) -> None:
    run = Passes(llama.decoder)
    layout = llama.decoder.ops.layout([Span(list(range(9)), 0, 9)], torch.device("cpu"))
    tokens_N = torch.tensor(PROMPT[:9])
    expected = llama.expected(PROMPT[:9])
    for wanted in ([8], [3, 8], []):
        wanted_R = torch.tensor(wanted, dtype=torch.int64)
        logits_RV = llama.decoder.forward(tokens_N, layout, run.kv, wanted_R)
        assert logits_RV.shape == (len(wanted), VOCAB)
        torch.testing.assert_close(logits_RV, expected[wanted], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"config_class": "Qwen3Config", "head_dim": 24}])
def test_rows_keep_their_bits_in_any_company(
    options: dict[str, Any], ops: Ops, tmp_path: Path
) -> None:
    # Widths that are no multiples of a vector, in passes large enough for several threads.
    torch.set_num_threads(2)
    write_tiny(tmp_path, hidden_size=72, intermediate_size=1003, **options)
    decoder = load_decoder(tmp_path, ops=ops)
    prompt = [(13 * i) % VOCAB for i in range(67)]
    slots = list(range(len(prompt)))
    (whole,) = Passes(decoder)((Span(slots, 0, len(prompt)), prompt))
    run, parts = Passes(decoder), []
    for start, end in itertools.pairwise([0, 1, 2, 3, 5, 8, 13, 21, 34, 66, 67]):
        parts += run((Span(slots[:end], start, end - start), prompt[start:end]))
    assert torch.equal(whole, torch.cat(parts))


def test_silu_keeps_its_bits_wherever_an_element_stands() -> None:
    torch.set_num_threads(2)
    x_N = torch.randn(70001) * 5
    whole_N = silu_anywhere(x_N)
    torch.testing.assert_close(whole_N, torch.nn.functional.silu(x_N))
    for start in range(0, 70000, 997):
        for length in (1, 7, 19, 45):
            part_N = silu_anywhere(x_N[start : start + length].clone())
            assert torch.equal(part_N, whole_N[start : start + length])


def test_silu_of_extremes() -> None:
    x_N = torch.tensor([-3e38, -200.0, -0.0, 0.0, 200.0, 3e38])
    assert silu_anywhere(x_N).tolist() == [0.0, 0.0, 0.0, 0.0, 200.0, x_N[-1].item()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_width(dtype: str, checkpoint: Checkpoint) -> None:
    case = checkpoint.case(TorchOps())
    decoder = load_decoder(case.folder, ops=TorchOps(), dtype=dtype)
    (ours,) = Passes(decoder)((Span(slots_of(0, len(PROMPT)), 0, len(PROMPT)), PROMPT))
    assert decoder.spec.dtype == getattr(torch, dtype)
    assert ours.dtype == torch.float32
    assert difference(ours, case.expected(PROMPT)) < (0.2 if dtype == "bfloat16" else 0.03)


def test_bfloat16_rounds_as_transformers_does(llama_checkpoint: Checkpoint) -> None:
    llama = llama_checkpoint.case(TorchOps())
    decoder = load_decoder(llama.folder, ops=TorchOps(), dtype="bfloat16")
    (ours,) = Passes(decoder)((Span(slots_of(0, len(PROMPT)), 0, len(PROMPT)), PROMPT))
    theirs = reference_logits(copy.deepcopy(llama.model).bfloat16(), PROMPT)
    exact = llama.expected(PROMPT)
    assert (ours - theirs).abs().mean() < (theirs - exact).abs().mean()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("auto", 0.2)])
def test_on_a_gpu(dtype: str, tolerance: float, checkpoint: Checkpoint, tmp_path: Path) -> None:
    case = checkpoint.case(TorchOps())
    copy.deepcopy(case.model).bfloat16().save_pretrained(tmp_path)
    folder = tmp_path if dtype == "auto" else case.folder
    decoder = load_decoder(folder, ops=TorchOps(), dtype=dtype, device="cuda")
    assert decoder.spec.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    run, root = Passes(decoder), len(PROMPT) - 1
    run((Span(slots_of(0, root), 0, root), PROMPT[:root]))
    tree = Span(slots_of(0, root + 1 + len(DRAFTS)), root, 1, PARENTS)
    (ours,) = run((tree, [PROMPT[-1], *DRAFTS]))
    for node, path in enumerate(paths_to_nodes(PARENTS)):
        tokens = [*PROMPT, *(DRAFTS[i] for i in path)]
        assert difference(ours[1 + node], case.expected(tokens)[-1]) < tolerance


def test_context_longer_than_the_first_rope_table(ops: Ops, tmp_path: Path) -> None:
    model = write_tiny(tmp_path, max_position_embeddings=4096, num_hidden_layers=1)
    decoder = load_decoder(tmp_path, ops=ops)
    run, prompt = Passes(decoder, 1200), [(3 * i) % VOCAB for i in range(1100)]
    run((Span(list(range(1000)), 0, 1000), prompt[:1000]))
    (ours,) = run((Span(list(range(1100)), 1000, 100), prompt[1000:]))
    assert difference(ours, reference_logits(model, prompt)[1000:]) < TOLERANCE


def test_spec(llama: Case) -> None:
    spec = llama.decoder.spec
    assert (spec.family, spec.vocab_size, spec.max_positions) == ("llama", VOCAB, MAX_POSITIONS)
    assert spec.eos_token_ids == (2,)
    assert spec.kv_shapes == ((2, 8, 8),) * 2
    assert spec.num_parameters == sum(p.numel() for p in llama.model.parameters())
    assert spec.name == str(llama.folder)
    assert (spec.dtype, spec.device) == (torch.float32, torch.device("cpu"))


def random_tensors(config: DecoderConfig) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in tensor_shapes(config).items()}


def test_from_a_dict_of_tensors_that_is_emptied() -> None:
    config = DecoderConfig.from_dict({"model_type": "llama", **BASE})
    tensors = random_tensors(config)
    ops: Ops = TorchOps()
    decoder = Decoder(config, tensors, ops, name="mine", eos_token_ids=(7,))
    assert tensors == {}
    assert (decoder.spec.name, decoder.spec.eos_token_ids) == ("mine", (7,))


def test_tied_head_that_differs_from_the_embedding_is_kept(ops: Ops) -> None:
    config = DecoderConfig.from_dict({"model_type": "llama", **BASE, "tie_word_embeddings": True})
    tensors = random_tensors(config)
    untied = DecoderConfig.from_dict({"model_type": "llama", **BASE})
    span = Span(list(range(5)), 0, 5)
    (ours,) = Passes(Decoder(config, dict(tensors), ops))((span, PROMPT[:5]))
    (theirs,) = Passes(Decoder(untied, dict(tensors), ops))((span, PROMPT[:5]))
    assert torch.equal(ours, theirs)


def change(tensors: dict[str, Tensor], what: str) -> None:
    first = "model.layers.0.mlp.up_proj.weight"
    if what == "missing":
        for name in [n for n in tensors if "down_proj" in n or "input_layernorm" in n]:
            del tensors[name]
    elif what == "unexpected":
        tensors["model.layers.0.mlp.experts.weight"] = torch.zeros(1)
    elif what == "misshapen":
        tensors[first] = tensors[first][:5]
    else:
        tensors[first] = tensors[first].to(torch.int8)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"has 4 missing tensors: .*input_layernorm\.weight; .* and 1 more$"),
        ("unexpected", r"has 1 unexpected tensors: model\.layers\.0\.mlp\.experts\.weight$"),
        ("misshapen", r"1 misshapen .*up_proj\.weight is \[5, 32\], config\.json says \[48, 32\]$"),
        ("quantised", r"1 quantised tensors: .*up_proj\.weight is torch\.int8$"),
    ],
)
def test_wrong_tensors(what: str, message: str) -> None:
    config = DecoderConfig.from_dict({"model_type": "llama", **BASE})
    tensors = random_tensors(config)
    change(tensors, what)
    with pytest.raises(ModelError, match=message):
        Decoder(config, tensors, TorchOps())


def test_old_rotary_buffers_are_ignored() -> None:
    config = DecoderConfig.from_dict({"model_type": "llama", **BASE})
    tensors = random_tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    Decoder(config, tensors, TorchOps())
