"""The adapter against each architecture's own eager attention: whole, cut, ragged and branching.

Windows and chunks are smaller than the contexts used here.

Shape legend: N rows of a pass, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

from outrider.models.adapter import Adapter, load_adapter
from outrider.ops.base import LayerKV, Ops, Span
from outrider.ops.torch import TorchOps
from tests.kernels import make_ops

VOCAB = 96
PROMPT = 41
WINDOW = 6
TOLERANCE = 2e-5
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ALTERNATING = ["sliding_attention", "full_attention"]
GEMMA = {**BASE, "head_dim": 8, "sliding_window": WINDOW, "layer_types": ALTERNATING}
SHARING = {
    **GEMMA,
    "num_hidden_layers": 4,
    "layer_types": ALTERNATING * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    **BASE,
    **MOE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "num_mtp_layers": 0,
}
LLAMA4 = {
    **BASE,
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": WINDOW,
    "no_rope_layer_interval": 2,
    "layer_types": ["chunked_attention", "full_attention"] * 2,
    "floor_scale": 3,
    "attn_scale": 0.5,
}
NO_MAMBA = {
    "layer_types": ["attention"] * 2,
    "num_local_experts": 0,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "llama-tied-bias": ("LlamaConfig", {**BASE, "tie_word_embeddings": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": WINDOW}),
    "ministral": ("MinistralConfig", GEMMA),
    "qwen2": ("Qwen2Config", BASE),
    "qwen2-window": (
        "Qwen2Config",
        {**BASE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**BASE, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "final_logit_softcapping": 3.0}),
    "gemma3n": ("Gemma3nTextConfig", {**SHARING, "laurel_rank": 4}),
    "gemma4": ("Gemma4TextConfig", {**SHARING, "global_head_dim": 16}),
    "gpt-oss": (
        "GptOssConfig",
        {**GEMMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen3-moe": ("Qwen3MoeConfig", {**BASE, **MOE, "head_dim": 8, "num_experts": 4}),
    "olmoe": ("OlmoeConfig", {**BASE, **MOE, "num_experts": 4}),
    "jetmoe": ("JetMoeConfig", {**BASE, "kv_channels": 8, "num_local_experts": 4}),
    "deepseek-v2": ("DeepseekV2Config", {**MLA, "topk_method": "group_limited_greedy"}),
    "deepseek-v3": ("DeepseekV3Config", MLA),
    "llama4": ("Llama4TextConfig", LLAMA4),
    "olmo2": ("Olmo2Config", BASE),
    "olmo3": ("Olmo3Config", {**BASE, "sliding_window": WINDOW, "layer_types": ALTERNATING}),
    "phi": ("PhiConfig", BASE),
    "phi3": ("Phi3Config", {**BASE, "sliding_window": WINDOW}),
    "phi3-longrope": (
        "Phi3Config",
        {**BASE, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "granite": (
        "GraniteConfig",
        {**BASE, "attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "granite-4-dense": (
        "GraniteMoeHybridConfig",
        {**BASE, **NO_MAMBA, "shared_intermediate_size": 48, "position_embedding_type": "rope"},
    ),
    "cohere": ("CohereConfig", BASE),
    "cohere2": (
        "Cohere2Config",
        {**BASE, "sliding_window": WINDOW, "layer_types": ALTERNATING, "logit_scale": 0.5},
    ),
    "smollm3": ("SmolLM3Config", {**BASE, "no_rope_layer_interval": 2}),
    "glm4": ("Glm4Config", {**BASE, "head_dim": 8}),
    "glm4-moe": (
        "Glm4MoeConfig",
        {**BASE, **MOE, "head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    ),
    "starcoder2": ("Starcoder2Config", {**BASE, "sliding_window": WINDOW}),
    "gpt2": ("GPT2Config", {**BASE, "scale_attn_by_inverse_layer_idx": True}),
    "gpt-neox": ("GPTNeoXConfig", BASE),
    "gpt-bigcode": ("GPTBigCodeConfig", BASE),
    "opt": ("OPTConfig", {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "ernie4.5": ("Ernie4_5Config", {**BASE, "head_dim": 8}),
    "seed-oss": ("SeedOssConfig", {**BASE, "head_dim": 8}),
    "exaone4": (
        "Exaone4Config",
        {**BASE, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
}


class Case(NamedTuple):
    """One architecture: ours, and the model itself under eager attention."""

    adapter: Adapter
    model: Any

    def expected(self, tokens: list[int]) -> Tensor:
        """logits_NV of every position of one plain sequence."""
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    def expected_last(self, sequences: list[list[int]]) -> Tensor:
        """logits_BV after each of several sequences; what pads them on the right is not seen."""
        width = max(map(len, sequences))
        padded = torch.tensor([tokens + [3] * (width - len(tokens)) for tokens in sequences])
        last_B = torch.tensor([len(tokens) - 1 for tokens in sequences])
        with torch.inference_mode():
            logits_BNV = self.model(input_ids=padded, use_cache=False).logits
        return logits_BNV[torch.arange(len(sequences)), last_B]


def save_tiny(config_name: str, options: dict[str, Any], folder: Path) -> Path:
    """A random checkpoint in which no weight is left at a value that hides mistakes."""
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def load_tiny(folder: Path, ops: Ops, **options: Any) -> Adapter:
    options = {"dtype": torch.float32, "device": torch.device("cpu"), **options}
    return load_adapter(folder, ops=ops, **options)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are ten times slower on busy cores when threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FAST_OPS: dict[str, Callable[[], Ops]] = {
    "torch": lambda: TorchOps(batch_invariant=False),
    "cpu": lambda: make_ops("cpu"),
}


@pytest.fixture(scope="module", params=itertools.product(CASES, FAST_OPS), ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, kernels = request.param
    folder = save_tiny(*CASES[name], tmp_path_factory.mktemp("tiny"))
    adapter = load_tiny(folder, FAST_OPS[kernels]())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return Case(adapter, model.eval())


class Row(NamedTuple):
    """A sequence's part of a pass; `tree` maps each node to (token, parent)."""

    name: str
    chain: list[int]
    tree: tuple[tuple[int, int], ...] = ()


class Pool:
    """Sequences over a pool whose unwritten slots hold a value that would be noticed."""

    def __init__(self, adapter: Adapter, num_slots: int = 400) -> None:
        self.adapter = adapter
        self.kv = [
            LayerKV(
                torch.full((num_slots, shape.num_heads, shape.key_width), 1e3),
                torch.full((num_slots, shape.num_heads, shape.value_width), 1e3),
            )
            for shape in adapter.spec.kv_shapes
        ]
        order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(1)).tolist()
        self.free = iter(order)
        self.slots: dict[str, list[int]] = {}
        self.num_cached: dict[str, int] = {}

    def run(self, *rows: Row) -> dict[str, Tensor]:
        """One pass; logits per sequence, all its rows."""
        spans, tokens = [], []
        for row in rows:
            cached = self.num_cached.setdefault(row.name, 0)
            slots = self.slots.setdefault(row.name, [])
            needed = cached + len(row.chain) + len(row.tree)
            slots += itertools.islice(self.free, max(0, needed - len(slots)))
            parents = tuple(parent for _, parent in row.tree)
            spans.append(Span(slots[:needed], cached, len(row.chain), parents))
            tokens += row.chain + [token for token, _ in row.tree]
            self.num_cached[row.name] += len(row.chain)
        layout = self.adapter.ops.layout(spans, torch.device("cpu"))
        logits_NV = self.adapter.forward(
            torch.tensor(tokens), layout, self.kv, torch.arange(len(tokens))
        )
        parts = logits_NV.split([span.num_rows for span in spans])
        return {row.name: part for row, part in zip(rows, parts, strict=True)}

    def span(self, name: str, num_cached: int, num_chain: int) -> Span:
        return Span(self.slots[name][: num_cached + num_chain], num_cached, num_chain)

    def keep(self, name: str, path: list[int]) -> None:
        """Moves the KV of accepted nodes behind the chain, and forgets the others."""
        cached, slots = self.num_cached[name], self.slots[name]
        source = [slots[cached + node] for node in path]
        target = slots[cached : cached + len(path)]
        for pool in self.kv:
            for part in pool:
                part[target] = part[source].clone()
        self.num_cached[name] += len(path)


def tokens_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < TOLERANCE * max(1.0, theirs.abs().max().item())


def test_whole_prefill(case: Case) -> None:
    tokens = tokens_of(0, PROMPT)
    assert_same(Pool(case.adapter).run(Row("a", tokens))["a"], case.expected(tokens))


def test_chunked_prefill_of_two_sequences(case: Case) -> None:
    pool, a, b = Pool(case.adapter), tokens_of(1, PROMPT), tokens_of(2, 23)
    got: dict[str, list[Tensor]] = {"a": [], "b": []}
    for rows in (
        [Row("a", a[:13])],
        [Row("b", b[:9]), Row("a", a[13:14])],
        [Row("a", a[14:33]), Row("b", b[9:])],
        [Row("a", a[33:])],
    ):
        for name, logits_NV in pool.run(*rows).items():
            got[name].append(logits_NV)
    assert_same(torch.cat(got["a"]), case.expected(a))
    assert_same(torch.cat(got["b"]), case.expected(b))


def test_batched_decode_of_different_lengths(case: Case) -> None:
    pool = Pool(case.adapter)
    sequences = {"a": tokens_of(5, 37), "b": tokens_of(6, 5), "c": tokens_of(7, 22)}
    for name, tokens in sequences.items():
        pool.run(Row(name, tokens[:-3]))
    steps = [pool.run(*(Row(n, [t[at]]) for n, t in sequences.items())) for at in (-3, -2, -1)]
    for name, tokens in sequences.items():
        assert_same(torch.cat([step[name] for step in steps]), case.expected(tokens)[-3:])


TREE = ((5, -1), (6, -1), (7, 0), (8, 0), (9, 2), (10, 1), (11, 4), (12, 6), (13, 5))


def path_of(node: int) -> list[int]:
    return [] if node < 0 else [*path_of(TREE[node][1]), node]


def test_tree_verify_and_compaction(case: Case) -> None:
    pool, a, b = Pool(case.adapter), tokens_of(3, 30), tokens_of(4, 12)
    pool.run(Row("a", a[:-1]), Row("b", b[:4]))
    out = pool.run(Row("b", b[4:], TREE), Row("a", a[-1:], TREE))
    for name, tokens, num_chain in (("a", a, 1), ("b", b, 8)):
        assert_same(out[name][:num_chain], case.expected(tokens)[-num_chain:])
        paths = [tokens + [TREE[n][0] for n in path_of(node)] for node in range(len(TREE))]
        assert_same(out[name][num_chain:], case.expected_last(paths))
    pool.keep("a", path_of(7))
    pool.keep("b", path_of(5))
    a += [TREE[n][0] for n in path_of(7)]
    b += [TREE[n][0] for n in path_of(5)]
    after = pool.run(Row("a", [20, 21]), Row("b", [22], TREE[:2]))
    assert_same(after["a"], case.expected([*a, 20, 21])[-2:])
    assert_same(after["b"][0], case.expected([*b, 22])[-1])
    assert_same(after["b"][2], case.expected([*b, 22, TREE[1][0]])[-1])
