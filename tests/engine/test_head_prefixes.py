"""Requests that share a prefix find the rows of a head, whoever ran the prefix first."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.engine.llm import LLM
from outrider.errors import ConfigError, RequestError
from outrider.request import SamplingParams, SpeculationParams
from tests.engine.test_heads import FAMILIES, write_target

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
HEADS = ("eagle3", "dflash")
FIXED = SpeculationParams(policy="fixed")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("prefixes") / "target")


def served(name: str, target: Path, folder: Path, **options: int) -> LLM:
    head = FAMILIES[name][1](folder / name)
    return LLM(str(target), draft_model=head, load_tokenizer=False, **options)


def cold(llm: LLM) -> int:
    found: int = llm.engine.drafters[llm.engine.default_drafter].num_cold_starts
    return found


def shared(length: int) -> list[int]:
    rng = random.Random(1)
    return [rng.randrange(40) for _ in range(length)]


@pytest.mark.parametrize("name", HEADS)
def test_requests_that_come_a_step_later_begin_warm(
    name: str, target: Path, tmp_path: Path
) -> None:
    llm = served(name, target, tmp_path, max_num_batched_tokens=128, block_size=8)
    llm.generate([[*shared(80), k, 3, k] for k in range(8)], GREEDY, FIXED)
    assert cold(llm) == 0


@pytest.mark.parametrize("name", HEADS)
def test_a_prefix_first_run_without_the_head_is_run_again_once(
    name: str, target: Path, tmp_path: Path
) -> None:
    llm = served(name, target, tmp_path, block_size=8)
    llm.generate([[*shared(80), 1, 2, 3]], GREEDY, SpeculationParams(method="off"))
    runs = []
    for k in range(3):
        before = llm.engine.stats.num_rows
        llm.generate([[*shared(80), k, 5, 6, 7]], GREEDY, FIXED)
        runs.append(llm.engine.stats.num_rows - before)
    assert cold(llm) == 0
    assert runs[0] > 80 > max(runs[1:]) - 60, "the prefix is run again by the first alone"
    assert runs[1] < runs[0] - 40


def test_completions_that_are_not_drafted_for_at_first_have_all_rows(
    target: Path, tmp_path: Path
) -> None:
    llm = served("eagle3", target, tmp_path)
    seen = []
    drafter = llm.engine.drafters["eagle"]
    close = drafter.close
    drafter.close = lambda seq: (seen.append(seq.drafter_state["eagle"].num_skipped), close(seq))
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=1, n=3, ignore_eos=True)
    rare = SpeculationParams(method="eagle", policy="table", policy_options={"table": "9-:2"})
    llm.generate([shared(60)], sampling, rare)
    assert seen == [0, 0, 0]


@pytest.mark.parametrize("name", HEADS)
def test_completions_begin_warm_though_the_first_one_ended_at_once(
    name: str, target: Path, tmp_path: Path
) -> None:
    """All rows of its prompt are theirs, those of its last block too, cached prefixes or not."""
    plain = LLM(str(target), load_tokenizer=False)
    sampling = SamplingParams(max_tokens=10, temperature=1.0, seed=4, n=3, ignore_eos=True)
    (whole,) = plain.generate([shared(60)], sampling, "off")
    first = whole.completions[0].token_ids[0]
    assert all(first not in other.token_ids for other in whole.completions[1:])
    ending = replace(sampling, stop_token_ids=[first])
    for caches in (True, False):
        llm = served(name, target, tmp_path, enable_prefix_caching=caches)
        drafter = llm.engine.drafters[llm.engine.default_drafter]
        skipped, close = {}, drafter.close
        drafter.close = lambda seq, skipped=skipped, drafter=drafter, close=close: (
            skipped.update({seq.index: seq.drafter_state[drafter.name].num_skipped}),
            close(seq),
        )
        (answer,) = llm.generate([shared(60)], ending, FIXED)
        assert [c.token_ids for c in answer.completions[1:]] == [
            c.token_ids for c in whole.completions[1:]
        ]
        assert len(answer.completions[0].token_ids) == 1
        assert skipped == {0: 0, 1: 0, 2: 0}
        assert drafter.num_cold_starts == 0
        assert drafter.manager.num_used == 0


@pytest.mark.parametrize(
    "asked",
    [
        SpeculationParams(method="off"),
        SpeculationParams(method="eagle", num_draft_tokens=0),
        SpeculationParams(method="eagle", policy="off"),
    ],
    ids=["off", "K = 0", "policy off"],
)
def test_who_can_never_be_drafted_for_costs_no_states(
    asked: SpeculationParams, target: Path, tmp_path: Path
) -> None:
    llm = served("eagle3", target, tmp_path)
    taps = []
    forward = llm.engine.runner.forward
    llm.engine.runner.forward = lambda *parts: taps.append(parts[2]) or forward(*parts)
    plain = llm.generate([shared(20)], GREEDY, asked)
    assert set(taps) == {()}
    assert llm.engine.drafters["eagle"].manager.hits == 0
    both = llm.generate([shared(20), shared(20)], GREEDY, [asked, FIXED])
    assert any(taps)
    assert [output.token_ids for output in both] == [plain[0].token_ids] * 2


def test_a_request_may_insist_on_the_head(target: Path, tmp_path: Path) -> None:
    head = str(FAMILIES["eagle3"][1](tmp_path / "head"))
    asked = {"method": "eagle", "model": head}
    llm = LLM(str(target), heads=[head], speculation=asked, load_tokenizer=False)
    assert llm.generate([[1, 2, 3]], GREEDY)[0].token_ids
    assert LLM(str(target), draft_model=head, speculation=asked, load_tokenizer=False).engine
    for method in ("eagle", None):
        with pytest.raises(RequestError) as error:
            llm.generate([[1, 2, 3]], GREEDY, {"method": method, "model": "other"})
        told = str(error.value)
        assert told.startswith(f"model='other': 'eagle' runs the head {head!r} here; drop the key")
        assert told.endswith("load that head with heads=... or draft_model=...")
    with pytest.raises(RequestError) as error:
        LLM(str(target), speculation=asked, load_tokenizer=False)
    assert f"no such head is loaded; give the engine heads={[head]!r}" in str(error.value)


def test_what_a_head_cannot_honour_is_refused(target: Path, tmp_path: Path) -> None:
    head = FAMILIES["eagle3"][1](tmp_path / "head")
    (head / "tokenizer.json").write_text("{}")
    assert LLM(str(target), draft_model=head, load_tokenizer=False).engine.default_drafter
    with pytest.raises(ConfigError, match=r"draft_quantization='int8'.*drop it"):
        LLM(str(target), draft_model=head, draft_quantization="int8", load_tokenizer=False)
    with pytest.raises(ConfigError, match="no MTP modules and no Medusa heads"):
        LLM(str(target), draft_model="native", load_tokenizer=False)
    with pytest.raises(RequestError, match=r"no such head is loaded.*heads="):
        LLM(str(target), load_tokenizer=False).generate(
            [[1, 2, 3]], GREEDY, SpeculationParams(method="eagle")
        )
