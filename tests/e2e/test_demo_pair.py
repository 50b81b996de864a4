"""The shipped pair with all threads of the machine: same tokens, and acceptance that is pinned."""

import os

import pytest
import torch

from outrider import LLM, SamplingParams, SpeculationParams

PROMPTS = [
    "import os\nimport sys\n\ndef main(argv=None):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "Abstract\n========\n\nThis PEP proposes ",
    "The old man looked out of the window and",
    [{"role": "user", "content": "I would like to order a large coffee, please."}],
    [{"role": "user", "content": "Tom has 12 apples and buys 7 more. How many are there?"}],
    "# git commit\n\n> Commit files to the repository.\n",
    "for i in range(10):\n    for j in range(10):\n        ",
]
GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=48, temperature=0.9, top_p=0.95, seed=3, ignore_eos=True)
OFF = SpeculationParams(method="off")
METHODS = [
    SpeculationParams(method="draft_model", num_draft_tokens=4),
    SpeculationParams(method="draft_model", num_draft_tokens=7, draft_sample_method="greedy"),
    SpeculationParams(method="ngram", num_draft_tokens=4, width=2, prompt_lookup_min=1),
]


NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


@pytest.fixture
def _all_threads() -> None:
    """Kernels split their work: what holds on one thread must hold on several."""
    torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="module")
def llm() -> LLM:
    torch.set_num_threads(NUM_THREADS)
    return LLM("demo", check_integrity=True)


@pytest.fixture(scope="module")
def plain(llm: LLM) -> dict[str, list[list[int]]]:
    torch.set_num_threads(NUM_THREADS)
    return {
        name: [out.token_ids for out in llm.generate(PROMPTS, sampling, OFF)]
        for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED))
    }


@pytest.mark.usefixtures("_all_threads")
@pytest.mark.parametrize("speculation", METHODS, ids=lambda s: f"{s.method} {s.num_draft_tokens}")
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_same_tokens_side_by_side_and_alone(llm, plain, speculation, kind):
    sampling = GREEDY if kind == "greedy" else SAMPLED
    together = llm.generate(PROMPTS, sampling, speculation, tenant=f"{kind} {speculation}")
    assert [out.token_ids for out in together] == plain[kind]
    for index in (0, 4):
        alone = llm.generate([PROMPTS[index]], sampling, speculation)[0]
        assert alone.token_ids == plain[kind][index]


@pytest.mark.usefixtures("_all_threads")
def test_logits_keep_their_bits_in_company(llm):
    """What the rest stands on: log-probabilities are equal to the last bit, alone or verified."""
    sampling = SamplingParams(max_tokens=24, logprobs=3, ignore_eos=True)
    alone = llm.generate([PROMPTS[0]], sampling, OFF, tenant="alone")[0].completions[0].logprobs
    drafted = llm.generate(PROMPTS, sampling, METHODS[1], tenant="company")[0].completions[0]
    assert drafted.logprobs == alone


@pytest.mark.usefixtures("_all_threads")
def test_acceptance_of_the_pair_has_not_rotted(llm):
    """Pinned below what the model card reports, so that a wrong drafter or rule is seen."""
    outputs = llm.generate(PROMPTS, GREEDY, METHODS[0])
    drafts = sum(out.metrics.num_drafts for out in outputs)
    accepted = sum(out.metrics.num_accepted_tokens for out in outputs)
    assert 1 + accepted / drafts > 1.8


@pytest.mark.usefixtures("_all_threads")
def test_warm_turns_of_a_chat_hit_the_prefix_cache(llm):
    messages = [{"role": "user", "content": "I would like a coffee and a tea, please. " * 3}]
    first = llm.chat(messages, SamplingParams(max_tokens=24))
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And a cake."},
    ]
    second = llm.chat(messages, SamplingParams(max_tokens=24))
    assert second.metrics.num_cached_tokens >= 16
    cold = llm.generate([messages], SamplingParams(max_tokens=24), OFF, tenant="cold")[0]
    assert cold.metrics.num_cached_tokens == 0
    assert second.token_ids == cold.token_ids
