"""The heads shipped for the demo model: they load, are often right, and change no token."""

import pytest

from outrider.engine.llm import LLM
from outrider.models.hub import SHIPPED
from outrider.request import SamplingParams, SpeculationParams

PROMPTS = ["def main(argv):\n    ", "The history of the town", "Once upon a time there was"]
DRAFTERS = {"demo-eagle3": "eagle", "demo-medusa": "medusa", "demo-kv": "kv_draft"}
LEAST = {"eagle": 1.4, "medusa": 1.15, "kv_draft": 1.6}  # acceptance length at temperature 1


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", draft_model="off", heads=DRAFTERS, max_num_seqs=8)


def test_every_shipped_head_has_its_drafter(llm: LLM) -> None:
    assert {name for name in SHIPPED if name not in ("demo", "demo-draft")} == set(DRAFTERS)
    assert set(DRAFTERS.values()) <= set(llm.engine.drafters.names())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", DRAFTERS.values())
def test_a_shipped_head_is_often_right_and_changes_nothing(
    llm: LLM, drafter: str, temperature: float
) -> None:
    sampling = SamplingParams(max_tokens=64, temperature=temperature, seed=1, ignore_eos=True)
    plain = llm.generate(PROMPTS, sampling, "off")
    spec = SpeculationParams(method=drafter, num_draft_tokens=4, width=1, policy="fixed")
    told = llm.generate(PROMPTS, sampling, spec)
    assert [out.token_ids for out in told] == [out.token_ids for out in plain]
    lengths = [out.metrics.acceptance_length or 1.0 for out in told]
    assert sum(lengths) / len(lengths) > LEAST[drafter]
