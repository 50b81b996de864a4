"""Hidden states that are handed out: those of the model itself, and at no cost to the logits.

Shape legend: A boundaries, N rows, D hidden width, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.draft.base import Warmth
from outrider.models.adapter import load_adapter
from outrider.models.base import ShowsStates
from outrider.models.decoder import Decoder
from outrider.ops.base import Entry, Span
from outrider.ops.torch import TorchOps
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import DraftTree
from outrider.testing.tiny import run, tiny_decoder, tiny_engine
from tests.kernels import CPU_FLAGS, make_ops
from tests.models.test_decoder import CASES, DRAFTS, PARENTS, PROMPT, slots_of
from tests.models.test_fused_decoder import decoder_of
from tests.models.tiny import Passes, difference, write_tiny

TOKENS = [*PROMPT, *DRAFTS]
SPAN = Span(slots_of(0, len(TOKENS)), 0, len(PROMPT), PARENTS)


def tapped(network: Any, taps: list[int], span: Span = SPAN) -> tuple[Tensor, Tensor]:
    """Logits of all rows and the states, of a prompt with a tree below it."""
    torch.manual_seed(1)
    passes = Passes(network)
    layout = network.ops.layout([span], network.spec.device)
    wanted_R = torch.arange(len(TOKENS))
    tokens_N = torch.tensor(TOKENS)
    plain_NV = network.forward(tokens_N, layout, passes.kv, wanted_R)
    logits_NV, tapped_AND = network.forward_tapped(tokens_N, layout, passes.kv, wanted_R, taps)
    assert torch.equal(logits_NV, plain_NV)
    return logits_NV, tapped_AND


@pytest.mark.parametrize("kernels", [*CPU_FLAGS, "torch"])
@pytest.mark.parametrize("name", CASES)
def test_a_decoder_shows_what_its_twin_passes_on(name: str, kernels: str) -> None:
    ops = TorchOps() if kernels == "torch" else make_ops(kernels)
    decoder = decoder_of(*CASES[name], ops, "off")
    num_layers = decoder.spec.num_layers
    logits_NV, tapped_AND = tapped(decoder, list(range(num_layers + 1)))
    assert tapped_AND.shape == (num_layers + 1, len(TOKENS), decoder.spec.hidden_size)
    assert difference(tapped_AND[0], decoder.embed(torch.tensor(TOKENS))) < 1e-6
    assert difference(decoder.head(decoder.final_norm(tapped_AND[-1])), logits_NV) < 1e-5
    twin = decoder.forward_by_layer(
        torch.tensor(TOKENS),
        ops.layout([SPAN], torch.device("cpu")),
        Passes(decoder).kv,
        torch.arange(1),
        range(num_layers + 1),
    )
    assert difference(tapped_AND, twin.tapped_AND) < 1e-5


@pytest.mark.parametrize("kernels", CPU_FLAGS)
def test_layers_may_be_entered_in_the_middle(kernels: str) -> None:
    """A decoder that is handed the embedding, and the first layer's normed input, says the same."""
    decoder = decoder_of(*CASES["qwen3-mixed"], make_ops(kernels), "off")
    assert decoder._fused is not None
    tokens_N, wanted_R = torch.tensor(TOKENS), torch.arange(len(TOKENS))
    layout = decoder.ops.layout([SPAN], torch.device("cpu"))
    kv, tables = Passes(decoder).kv, decoder._rope.tables(layout)
    logits_NV = decoder.forward(tokens_N, layout, kv, wanted_R)
    hidden_ND = decoder.embed(tokens_N)
    first_ND = decoder._layers[0]._attention_norm(hidden_ND)
    for entry in (Entry(hidden_ND), Entry(hidden_ND, first_ND)):
        nothing_N = torch.full_like(tokens_N, -1)
        found = decoder._fused(nothing_N, layout, kv, wanted_R, *tables, entry=entry, taps=(1,))
        assert difference(found.logits_RV, logits_NV) < 1e-6
    wrong = decoder._fused(tokens_N, layout, kv, wanted_R, *tables, entry=Entry(2 * hidden_ND))
    assert difference(wrong.logits_RV, logits_NV) > 0.01, "what enters counts"


ADAPTED = {
    "llama": ("LlamaConfig", {}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "olmo2": ("Olmo2Config", {}),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_shows_the_states_of_its_model(name: str, tmp_path: Path) -> None:
    config_class, options = ADAPTED[name]
    model = write_tiny(tmp_path, config_class, **options)
    adapter = load_adapter(
        tmp_path, ops=make_ops("cpu"), dtype=torch.float32, device=torch.device("cpu"), name=name
    )
    assert isinstance(adapter, ShowsStates)
    assert adapter.spec.num_layers == 2
    chain = Span(SPAN.blocks, 0, len(TOKENS), ())
    logits_NV, tapped_AND = tapped(adapter, [0, 1, 2], chain)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    assert difference(tapped_AND[0], theirs[0][0]) < 1e-5
    assert difference(tapped_AND[1], theirs[1][0]) < 1e-4
    assert difference(adapter.final_norm(tapped_AND[2]), theirs[2][0]) < 1e-4, "normed already"
    assert difference(adapter.head(adapter.final_norm(tapped_AND[2])), logits_NV) < 1e-5


class Looker:
    """Drafts nothing, and keeps the states that it is shown."""

    name = "looker"
    needs = ("target states",)
    default_draft_tokens = default_width = min_width = max_width = 1
    default_num_nodes = None
    sample_methods = ("greedy",)
    options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, boundaries: tuple[int, ...]) -> None:
        self.warmth = Warmth.R2
        self.boundaries = boundaries
        self.seen: list[Any] = []

    def open(self, seq: Any) -> None: ...

    def draft(self, rows: Any, plan: Any) -> list[Any]:
        return [DraftTree.chain([5], self.name) for _ in rows]

    def observe(self, commits: Any, output: Any) -> None:
        self.seen.append((commits, output.states))

    def close(self, seq: Any) -> None: ...

    def snapshot(self, seq: Any) -> None:
        return None

    def restore(self, seq: Any, snapshot: Any) -> int:
        return len(seq.tokens)


def request(name: str, prompt: str, method: str) -> Request:
    return Request(
        id=name,
        prompt_token_ids=tuple(prompt.encode()),
        sampling=SamplingParams(max_tokens=6, ignore_eos=True),
        speculation=SpeculationParams(method=method, num_draft_tokens=1),
    )


def test_an_engine_hands_states_out_while_somebody_looks() -> None:
    decoder: Decoder = tiny_decoder()
    looker = Looker((0, 2))
    engine = tiny_engine(target=decoder, drafters=[looker])
    run(engine, [request("a", "other", "ngram")])
    assert not looker.seen
    run(engine, [request("a", "hello", "looker"), request("b", "a longer prompt", "looker")])
    tokens: dict[str, list[int]] = {}
    for commits, states in looker.seen:
        assert states.boundaries == (0, 2)
        for index, commit in enumerate(commits):
            start, count = states.start[index], states.num_chain[index]
            kept = [start + count + node for node in commit.accepted[: commit.num_kept]]
            rows = [*range(start, start + count), *kept]
            seq, first = commit.seq, states.num_cached[index]
            expected_RD = decoder.embed(torch.tensor(seq.tokens[first : first + len(rows)]))
            assert torch.equal(states.tapped_AND[0][rows], expected_RD)
            tokens.setdefault(seq.id, []).extend(range(first, first + len(rows)))
    for positions in tokens.values():
        assert positions == list(range(len(positions))), "each position once"
