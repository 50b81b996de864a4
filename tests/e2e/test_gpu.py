"""The engine on a GPU, where kernels are not batch-invariant: equal tokens, but for near-ties.

Shape legend: N rows of a pass, H query heads, G key/value heads, D head width, S slots.
"""

import pytest
import torch

from outrider import LLM, SamplingParams, SpeculationParams
from outrider.ops.base import LayerKV, Span, Window
from outrider.ops.torch import TorchOps
from outrider.request import Request
from tests.e2e.test_demo_pair import GREEDY, METHODS, OFF, PROMPTS, SAMPLED
from tests.e2e.test_grammar import CONSTRAINTS, assert_valid
from tests.twins.naive_ops import NaiveOps

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# How far apart, in nats, two tokens may be that noise swaps. Logits of this model reach 16 or so:
# there neighbours in bfloat16 lie 1/16 apart, and each of two may be off by one step.
MARGINS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 0.13}
NUM_TOKENS = 48
LOGPROBS = SamplingParams(max_tokens=NUM_TOKENS, logprobs=4, ignore_eos=True)
SHAPED = SamplingParams(
    max_tokens=NUM_TOKENS,
    temperature=1.1,
    top_k=40,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={300: 1.5, 301: float("-inf"), 302: float("-inf")},
    bad_words=("the", "self"),
    min_tokens=NUM_TOKENS,
    seed=7,
)
PENALIZED_GREEDY = SamplingParams(
    max_tokens=NUM_TOKENS, repetition_penalty=1.4, logprobs=4, ignore_eos=True
)


@pytest.fixture(scope="module", params=MARGINS)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(dtype):
    return LLM("demo", device=DEVICE, dtype=dtype, check_integrity=True)


@pytest.fixture
def llm(loaded):
    yield loaded
    assert loaded.engine.manager.num_used == 0


@pytest.fixture(scope="module")
def plain(loaded):
    return loaded.generate(PROMPTS, LOGPROBS, OFF, tenant="plain")


def tokens_of(outputs):
    return [output.token_ids for output in outputs]


def num_equal(ours, theirs):
    return sum(a == b for a, b in zip(tokens_of(ours), tokens_of(theirs), strict=True))


def first_difference(ours, theirs):
    """Index of the first token in which two answers to one prompt differ; None if none does."""
    assert len(ours.token_ids) == len(theirs.token_ids)
    pairs = zip(ours.token_ids, theirs.token_ids, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def assert_same_or_near_tie(ours, expected, margin):
    """Where greedy answers part, the other token was almost as likely as the likeliest."""
    for mine, theirs in zip(ours, expected, strict=True):
        at = first_difference(mine, theirs)
        if at is None:
            continue
        top = theirs.completions[0].logprobs[at].top
        assert mine.token_ids[at] in top, f"token {at}"
        gap = max(top.values()) - top[mine.token_ids[at]]
        assert gap < margin, f"token {at}"


def test_everything_is_on_the_gpu_in_the_dtype_asked_for(llm, dtype):
    draft_model = llm.engine.drafters["draft_model"]
    for runner in (llm.engine.runner, draft_model.runner):
        assert runner.network.spec.device.type == DEVICE
        assert runner.network.spec.dtype == getattr(torch, dtype)
        for part in runner.pool.layers[0]:
            assert (part.device.type, part.dtype) == (DEVICE, getattr(torch, dtype))


@pytest.mark.parametrize("speculation", METHODS, ids=lambda s: f"{s.method} {s.num_draft_tokens}")
def test_greedy_tokens_are_those_of_plain_decoding(llm, plain, dtype, speculation):
    ours = llm.generate(PROMPTS, LOGPROBS, speculation, tenant=str(speculation))
    assert_same_or_near_tie(ours, plain, MARGINS[dtype])
    assert sum(output.metrics.num_accepted_tokens for output in ours) > 0
    alone = llm.generate(PROMPTS[0], LOGPROBS, speculation, tenant=f"alone {speculation}")
    assert_same_or_near_tie(alone, plain[:1], MARGINS[dtype])


def test_acceptance_of_the_pair(llm):
    outputs = llm.generate(PROMPTS, GREEDY, METHODS[0])
    drafts = sum(output.metrics.num_drafts for output in outputs)
    accepted = sum(output.metrics.num_accepted_tokens for output in outputs)
    assert 1 + accepted / drafts > 1.7


def test_the_cpu_says_the_same():
    """Two devices add in different orders: a little more noise than within one."""
    there = LLM("demo", device=DEVICE, dtype="float32").generate(PROMPTS, LOGPROBS, METHODS[0])
    here = LLM("demo", device="cpu", dtype="float32").generate(PROMPTS, LOGPROBS, OFF)
    assert_same_or_near_tie(there, here, 1e-3)


@pytest.mark.parametrize("speculation", METHODS, ids=lambda s: f"{s.method} {s.num_draft_tokens}")
@pytest.mark.parametrize("sampling", [SAMPLED, SHAPED], ids=["sampled", "shaped"])
def test_sampled_tokens_are_those_of_plain_decoding(llm, dtype, sampling, speculation):
    """Noise of the logits moves a draw only where it falls on the edge between two tokens."""
    expected = llm.generate(PROMPTS, sampling, OFF, tenant=f"off {sampling.top_p}")
    ours = llm.generate(PROMPTS, sampling, speculation, tenant=str(speculation))
    assert all(len(output.token_ids) == NUM_TOKENS for output in ours)
    assert dtype != "float32" or num_equal(ours, expected) >= len(PROMPTS) - 1
    firsts = [first_difference(a, b) for a, b in zip(ours, expected, strict=True)]
    assert sum(at is None or at > 0 for at in firsts) >= len(PROMPTS) // 2


def test_masks_hold(llm):
    for speculation in (OFF, *METHODS):
        for output in llm.generate(PROMPTS, SHAPED, speculation):
            assert not {301, 302} & set(output.token_ids)
            assert llm.engine.spec.eos_token_ids[0] not in output.token_ids
            assert output.finish_reason == "length"
            assert not output.completions[0].error


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_a_law_cut_to_its_top_is_greedy(llm, plain, dtype, options):
    """Greedy but for equals, which bfloat16 has: there any of them may be drawn."""
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=1.0, seed=3, logprobs=4, ignore_eos=True, **options
    )
    ours = llm.generate(PROMPTS, sampling, METHODS[0], tenant=str(options))
    assert_same_or_near_tie(ours, plain, MARGINS[dtype])


def test_penalties_change_the_output_and_hold_under_speculation(llm, plain, dtype):
    """Logprobs are of raw logits, so a parting cannot be judged: in float32 there is hardly one."""
    expected = llm.generate(PROMPTS, PENALIZED_GREEDY, OFF)
    assert num_equal(expected, plain) < len(PROMPTS)
    ours = llm.generate(PROMPTS, PENALIZED_GREEDY, METHODS[0])
    assert num_equal(ours, expected) >= (len(PROMPTS) - 1 if dtype == "float32" else 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["regex", "EBNF"])
def test_grammars_hold(llm, kind, temperature):
    sampling = SamplingParams(max_tokens=100, temperature=temperature, seed=11, **CONSTRAINTS[kind])
    for speculation in (OFF, *METHODS):
        for output in llm.generate(PROMPTS[:4], sampling, speculation):
            assert_valid(llm, sampling, output)


def test_rejection_runs(llm):
    spec = SpeculationParams(method="draft_model", num_draft_tokens=4, verifier="rejection")
    for output in llm.generate(PROMPTS, SHAPED, spec):
        assert output.finish_reason == "length"
        assert not {301, 302} & set(output.token_ids)


def kv_of(drafter, state):
    slots = torch.tensor(state.table.slots(0, state.num_cached), device=DEVICE)
    return [part[slots].cpu() for layer in drafter.runner.pool.layers for part in layer]


def test_draft_kv_survives_snapshot_and_restore(llm):
    engine, drafter = llm.engine, llm.engine.drafters["draft_model"]
    prompt = tuple(llm.tokenizer.encode("import os\nimport sys\n\ndef main(argv):\n"))
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    request = Request(
        id="kept", prompt_token_ids=prompt, sampling=sampling, speculation=METHODS[0], tenant="kept"
    )
    engine.add(request)
    for _ in range(4):
        engine.step()
    (seq,) = engine.scheduler.running
    before = kv_of(drafter, seq.drafter_state["draft_model"])
    snapshot = drafter.snapshot(seq)
    assert all(part.device.type == "cpu" for layer in snapshot.state for part in layer)

    drafter.close(seq)
    drafter.manager.reset_prefix_cache()
    for layer in drafter.runner.pool.layers:
        for part in layer:
            part.zero_()
    assert drafter.restore(seq, snapshot) == snapshot.num_tokens
    after = kv_of(drafter, seq.drafter_state["draft_model"])
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))

    num_forwards = drafter.num_forwards
    engine.step()
    assert drafter.num_forwards - num_forwards == 4, "restored: nothing to catch up with"
    while engine.has_work():
        engine.step()
    assert drafter.manager.num_used == 0


def test_the_adapter_says_what_the_lean_decoder_says(llm, plain, dtype):
    adapter = LLM("demo", device=DEVICE, dtype=dtype, network="adapter", check_integrity=True)
    expected = adapter.generate(PROMPTS, LOGPROBS, OFF, tenant="off")
    for speculation in METHODS:
        ours = adapter.generate(PROMPTS, LOGPROBS, speculation, tenant=str(speculation))
        assert_same_or_near_tie(ours, expected, MARGINS[dtype])
    if dtype == "float32":  # in half width the two round in different places
        assert_same_or_near_tie(expected, plain, MARGINS[dtype])


SPANS = [
    Span([5 + 3 * i for i in range(20)], 0, 20),
    Span([4 + 3 * i for i in range(76)], 70, 1, (-1, 0, 0, -1, 3)),
    Span([300 + (7 * i) % 97 for i in range(33)], 3, 30),
    Span([299], 0, 1),
    Span([400 + (5 * i) % 149 for i in range(133)], 129, 2, (-1, 0)),
]
ATTENTIONS = {
    "full": {},
    "sliding": {"window": Window(sliding=9)},
    "chunk": {"window": Window(chunk=16)},
    "softcap": {"softcap": 3.0},
}


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize(
    ("name", "tolerance"), [("float32", 1e-5), ("float16", 4e-3), ("bfloat16", 3e-2)]
)
@pytest.mark.parametrize(("num_heads", "num_groups", "width"), [(6, 2, 64), (4, 4, 16)])
def test_attention_agrees_with_its_twin(
    num_heads, num_groups, width, name, tolerance, kind, has_sinks
):
    num_rows = sum(span.num_rows for span in SPANS)
    query_NHD = torch.randn(num_rows, num_heads, width).to(getattr(torch, name))
    keys_NGD, values_NGD = torch.randn(2, num_rows, num_groups, width).to(getattr(torch, name))
    keys_SGD, values_SGD = torch.randn(2, 600, num_groups, width).to(getattr(torch, name))
    sinks_H = torch.randn(num_heads) if has_sinks else None

    def attend(ops, device, dtype):
        def there(tensor):
            return tensor.clone().to(device, dtype)  # each has a pool of its own

        kv = LayerKV(there(keys_SGD), there(values_SGD))
        layout = ops.layout(SPANS, torch.device(device))
        ops.write_kv(kv, there(keys_NGD), there(values_NGD), layout)
        return ops.attend(
            there(query_NHD),
            kv,
            layout,
            scale=width**-0.5,
            sinks_H=None if sinks_H is None else sinks_H.to(device),
            **ATTENTIONS[kind],
        )

    ours = attend(TorchOps(), DEVICE, getattr(torch, name))
    assert (ours.device.type, ours.dtype) == (DEVICE, getattr(torch, name))
    expected = attend(NaiveOps(), "cpu", torch.float32)
    torch.testing.assert_close(ours.float().cpu(), expected, rtol=0, atol=tolerance)
