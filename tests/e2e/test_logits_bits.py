"""The promise under the promise: every token is decided from the same logits, bit for bit.

Tokens could agree by luck, for near ties are rare. Here the rows of logits themselves are compared,
whatever speculates, whoever rides along, and however the KV came to be.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from outrider.engine.engine import Engine
from outrider.models.decoder import Decoder
from outrider.ops.base import LayerKV, Span
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import Batch, Commit, DraftTree, TargetOutput, Verdict
from outrider.testing import (
    ScriptedDrafter,
    junk,
    junk_tree,
    run,
    tiny,
    tiny_decoder,
    tiny_engine,
)
from tests.kernels import cpu_library

COUNT = 16
OFF = SpeculationParams(method="off")
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=20, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=20, temperature=0.8, ignore_eos=True),
}
NGRAM = {"method": "ngram", "prompt_lookup_min": 1}
SPECULATIONS = {
    "off": OFF,
    "ngram, K=1": SpeculationParams(**NGRAM, num_draft_tokens=1),
    "ngram, K=4": SpeculationParams(**NGRAM, num_draft_tokens=4),
    "ngram, K=7": SpeculationParams(**NGRAM, num_draft_tokens=7),
    "ngram tree": SpeculationParams(**NGRAM, num_draft_tokens=3, width=3),
    "draft model, K=4": SpeculationParams(method="draft_model", num_draft_tokens=4),
    "junk": SpeculationParams(method="scripted", num_draft_tokens=5),
    "junk tree": SpeculationParams(method="scripted tree", num_draft_tokens=3, width=3),
}
PRESSED = {
    "max_num_batched_tokens": 24,
    "max_num_seqs": 5,
    "max_model_len": 100,
    "long_prefill_token_threshold": 7,
}
# kernels, quantization, whether bfloat16 can hold the weights
NETWORKS: dict[str, tuple[str, str | None, bool]] = {
    "float32": ("cpu", None, False),
    "bfloat16 weights": ("cpu", None, True),
    "int8": ("cpu", "int8", False),
    "int4": ("cpu", "int4", False),
    "torch": ("torch", None, False),
}
Decided = dict[str, Tensor]


class Witness:
    """Notes the row of logits that each committed token was decided from."""

    def __init__(self, engine: Engine) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        self._forward, self._commit = engine.runner.forward, engine.committer.commit
        engine.runner.forward = self.forward
        engine.committer.commit = self.commit

    def forward(
        self, batch: Batch, drafts: list[DraftTree], taps: tuple[int, ...] = ()
    ) -> TargetOutput:
        output = self._forward(batch, drafts, taps)
        self._logits_NV = output.logits_NV.clone()
        return output

    def commit(
        self,
        batch: Batch,
        drafts: list[DraftTree],
        verdicts: list[Verdict | None],
        output: TargetOutput,
    ) -> list[Commit]:
        commits = self._commit(batch, drafts, verdicts, output)
        for commit, first in zip(commits, output.first, strict=True):
            path = [first, *(first + 1 + node for node in commit.accepted)]
            rows = [self._logits_NV[row] for row in path[: len(commit.tokens)]]
            self.rows.setdefault(commit.seq.id, []).extend(rows)
        return commits


def decided(engine: Engine, asked: list[Request]) -> tuple[Decided, dict]:
    """Serves requests: the logits behind their tokens by sequence, and the tokens."""
    witness = Witness(engine)
    tokens = run(engine, asked)
    return {key: torch.stack(rows) for key, rows in witness.rows.items()}, tokens


def same(ours: Decided, expected: Decided) -> bool:
    """Whether all rows of the sequences in `ours` have the bits they should have."""
    return bool(ours) and all(torch.equal(rows, expected[key]) for key, rows in ours.items())


def requests(kind: str, speculation: SpeculationParams = OFF) -> list[Request]:
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple((11 * i + j * j) % 90 + 30 for j in range(5 + 3 * i)),
            sampling=SAMPLINGS[kind],
            speculation=speculation,
            seed=1000 + i,
        )
        for i in range(COUNT)
    ]


class Setting:
    """One network, and what plain decoding of each request alone decides from."""

    def __init__(self, name: str, kind: str) -> None:
        self.kernels, quantization, is_half = NETWORKS[name]
        self.kind = kind
        if self.kernels == "cpu":
            cpu_library()  # skips where there is none
        self.target = decoder(self.kernels, quantization, is_half)
        self.expected: Decided = {}
        self.tokens: dict = {}
        for request in requests(kind):
            rows, tokens = decided(self.engine(num_blocks=64), [request])
            self.expected |= rows
            self.tokens |= tokens

    def engine(self, **options) -> Engine:
        """The draft model is near the target: it errs half of the time."""
        drafters = [ScriptedDrafter(junk(256)), self._tree()]
        return tiny_engine(
            target=self.target,
            kernels=self.kernels,
            drafters=drafters,
            draft_noise=0.01,
            **options,
        )

    def _tree(self) -> ScriptedDrafter:
        """Trees of junk; where the answer is known, some of their nodes are right."""

        def propose(seq, plan):
            truth = [*seq.request.prompt_token_ids, *self.tokens.get((seq.request.id, 0), ())]
            return junk_tree(256, truth, seed=len(seq.tokens))(seq, plan)

        return ScriptedDrafter(propose, name="scripted tree")


def decoder(kernels: str, quantization: str | None, is_half: bool) -> Decoder:
    random: Callable[..., Tensor] = tiny._random
    with pytest.MonkeyPatch.context() as patch:
        if is_half:
            patch.setattr(tiny, "_random", lambda *given: random(*given).bfloat16().float())
        return tiny_decoder(kernels=kernels, quantization=quantization)


@pytest.fixture(scope="module", params=SAMPLINGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=NETWORKS)
def setting(request: pytest.FixtureRequest, kind: str) -> Setting:
    torch.set_num_threads(1)
    return Setting(request.param, kind)


def test_logits_of_one_pass_over_all_tokens_are_those_of_decoding(setting):
    """What the promise means: a token's logits are a function of the tokens before it alone."""
    target = setting.target
    for request in requests(setting.kind)[::5]:
        log = [*request.prompt_token_ids, *setting.tokens[request.id, 0]]
        kv = [LayerKV(torch.randn(80, 2, 8), torch.randn(80, 2, 8)) for _ in range(2)]
        layout = target.ops.layout([Span(range(len(log)), 0, len(log))], torch.device("cpu"))
        wanted_R = torch.arange(len(request.prompt_token_ids) - 1, len(log) - 1)
        logits_RV = target.forward(torch.tensor(log), layout, kv, wanted_R)
        assert torch.equal(logits_RV, setting.expected[f"{request.id}#0"])


@pytest.mark.parametrize("name", SPECULATIONS)
def test_same_logits_in_a_batch_of_16(setting, name):
    used = setting.engine()
    rows, tokens = decided(used, requests(setting.kind, SPECULATIONS[name]))
    assert same(rows, setting.expected)
    assert len(rows) == COUNT
    assert tokens == setting.tokens
    assert name == "off" or used.stats.num_draft_tokens > 0


@pytest.mark.parametrize("name", ["ngram, K=4", "draft model, K=4", "junk tree"])
@pytest.mark.parametrize("count", [1, 4])
def test_same_logits_alone_and_in_a_batch_of_4(setting, count, name):
    asked = requests(setting.kind, SPECULATIONS[name])
    for at in range(0, 8, count):
        rows, _ = decided(setting.engine(num_blocks=128), asked[at : at + count])
        assert same(rows, setting.expected)


@pytest.mark.parametrize("name", ["off", "draft model, K=4", "junk tree"])
def test_same_logits_after_preemption_and_in_chunks(setting, name):
    used = setting.engine(num_blocks=40, options=PRESSED)
    rows, _ = decided(used, requests(setting.kind, SPECULATIONS[name]))
    assert same(rows, setting.expected)
    assert len(rows) == COUNT
    assert used.stats.num_preemptions > 0, "the test must press hard enough to preempt"


@pytest.mark.parametrize("name", ["off", "ngram tree", "draft model, K=4"])
def test_same_logits_from_a_warm_prefix_cache(setting, name):
    used = setting.engine(num_blocks=600)
    cold, _ = decided(used, requests(setting.kind, SPECULATIONS[name]))
    hits = used.manager.hits
    warm, _ = decided(used, requests(setting.kind, SPECULATIONS[name]))
    assert same(cold, setting.expected)
    assert same(warm, setting.expected)
    assert used.manager.hits > hits


@pytest.mark.parametrize("name", ["off", "junk tree"])
def test_same_logits_on_several_threads(setting, name):
    torch.set_num_threads(3)
    if setting.kernels == "torch":
        pytest.skip("the reference kernels choose their products by the number of threads")
    rows, _ = decided(setting.engine(), requests(setting.kind, SPECULATIONS[name]))
    assert same(rows, setting.expected)


def test_accepted_drafts_and_trees_are_among_what_is_compared(setting):
    for name in ("draft model, K=4", "junk tree"):
        used = setting.engine()
        decided(used, requests(setting.kind, SPECULATIONS[name]))
        assert 0 < used.stats.num_accepted_tokens < used.stats.num_draft_tokens


def test_the_comparison_sees_one_bit():
    expected = {"a": torch.randn(3, 8)}
    ours = {"a": expected["a"].clone()}
    assert same(ours, expected)
    ours["a"][2, 5] = torch.nextafter(ours["a"][2, 5], torch.tensor(9.0))
    assert not same(ours, expected)
    assert not same({}, expected)
