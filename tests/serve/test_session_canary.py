"""The canary at work: wrong draft KV after a restart is found by acceptance, and made anew."""

from types import SimpleNamespace

import pytest
import torch

from outrider import LLM, AsyncLLM
from outrider.engine.warm_parts import Readiness
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from outrider.serve.session_canary import MAX_TRIES, SessionCanary, Watch
from outrider.serve.session_counters import NAMES, Counters
from outrider.serve.session_warmth import Warm, counts_of
from outrider.session.canary import LEVEL, History, Tries
from outrider.stream.events import DrafterMetrics
from tests.engine.tiny_checkpoint import write_checkpoint
from tests.serve.conftest import TEMPLATE, client_of
from tests.serve.test_metrics import samples
from tests.serve.test_sessions import WIDE, create, fresh, kept, say, tokens_of

LONG = {
    "max_output_tokens": 40,
    "temperature": 0,
    "ignore_eos": True,
    "speculation": {"method": "draft_model", "num_draft_tokens": 4},  # no clock decides
}
TEXTS = ("one fine day", "two of them", "three more", "four", "five words for you", "six")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that drafts for itself, so that all drafts stand as long as its draft KV is right."""
    return str(write_checkpoint(tmp_path_factory.mktemp("model"), **WIDE))


@pytest.fixture
def serving(checkpoint, tmp_path):
    """A process: `async with serving() as (client, llm)`; all have one folder."""

    class Process:
        async def __aenter__(self):
            self.llm = LLM(checkpoint, draft_model=checkpoint, policy="fixed", check_integrity=True)
            self.llm.tokenizer.backend.chat_template = TEMPLATE
            config = ServeConfig(drain_s=0, state_dir=tmp_path / "state")
            app = create_app(AsyncLLM(self.llm), config)
            self.lifespan = app.router.lifespan_context(app)
            await self.lifespan.__aenter__()
            self.client = await client_of(app).__aenter__()
            return self.client, self.llm

        async def __aexit__(self, *error):
            await self.client.aclose()
            await self.lifespan.__aexit__(*error)

    return Process


async def talk(client, session):
    for text in TEXTS:
        await say(client, session, text, LONG)


def break_what_is_restored(client, llm):
    """The restore brings noise in place of the draft KV, as a wrong mapping of blocks would."""
    warmth = kept(client).warmth
    restore = warmth.restore

    def restore_wrongly(*args):
        report = restore(*args)
        for seed, layer in enumerate(llm.engine.drafters["draft_model"].runner.pool.layers):
            noise = torch.Generator().manual_seed(seed)
            layer.keys.normal_(generator=noise)
            layer.values.normal_(generator=noise)
        return report

    warmth.restore = restore_wrongly


def accepted(answer):
    return answer["metrics"]["speculative_decoding"]["mean_acceptance_length"]


async def test_wrong_draft_kv_is_found_and_made_anew(serving):
    async with serving() as (client, _):
        session = (await create(client))["id"]
        await talk(client, session)
        before = (await say(client, session, "seven", LONG))["metrics"]["speculative_decoding"]
        stats = kept(client).log.stats.get("", session)
    async with serving() as (client, llm):
        break_what_is_restored(client, llm)
        found = await say(client, session, "eight", LONG)
        counted = await samples(client)
        learnt = kept(client).log.stats.get("", session)
        later = await say(client, session, "nine", LONG)
        heads = [each["outrider"]["session"]["head"] for each in (found, later)]
        logs = [tokens_of(client, head) for head in heads]
    report = found["outrider"]["session"]
    assert report["restored_from"] == "disk"
    assert accepted(found) < 0.6 * before["mean_acceptance_length"]
    told = report["spec"]["regression"]
    assert told["seen"] < told["expected"] - 0.3
    assert told["p_value"] < LEVEL
    assert told["drafter"] == "draft_model"
    assert told["ready_upto"] == 0
    assert told["rebuilt_tokens"] >= report["kv_hit_tokens"] - 16 > 100
    assert counted["outrider_session_warmth_regressions_total", ()] == 1
    assert counted["outrider_session_rebuilt_tokens_total", ()] == told["rebuilt_tokens"]
    assert counted["outrider_session_restores_total", ()] == 1
    assert learnt == stats, "a turn on wrong KV says nothing of the drafter"
    assert accepted(later) > 0.9 * before["mean_acceptance_length"], "it recovers"
    assert "regression" not in later["outrider"]["session"]["spec"]
    for tokens in logs:
        assert fresh(llm, tokens[:-40], LONG, 40) == tokens[-40:], "no text was ever wrong"


async def test_what_was_kept_of_it_is_forgotten(serving):
    """Wrong bundles would be restored wrongly again; those of the target stay."""
    async with serving() as (client, _):
        session = (await create(client))["id"]
        await talk(client, session)
    async with serving() as (client, llm):
        break_what_is_restored(client, llm)
        answer = await say(client, session, "seven", LONG)
        assert "regression" in answer["outrider"]["session"]["spec"]
        parts = [bundle.fingerprint.part for bundle in kept(client).warmth.bundles]
        assert "draft_model" not in parts
        assert "target" in parts
    async with serving() as (client, _):
        answer = await say(client, session, "eight", LONG)
        spec = answer["outrider"]["session"]["spec"]
        assert spec["ready_upto"] > 100, "what was computed anew was kept when the server stopped"
        assert "regression" not in spec
        assert accepted(answer) > 4


async def test_a_right_restore_raises_nothing(serving):
    async with serving() as (client, _):
        session = (await create(client))["id"]
        await talk(client, session)
    async with serving() as (client, _):
        for text in TEXTS:
            answer = await say(client, session, text, LONG)
            assert "regression" not in answer["outrider"]["session"]["spec"]
        counted = await samples(client)
    assert counted["outrider_session_warmth_regressions_total", ()] == 0
    assert counted["outrider_session_turns_total", ()] == len(TEXTS)
    assert counted["outrider_session_restores_total", ()] == 1
    assert {f"outrider_session_{name}_total" for name in NAMES} <= {name for name, _ in counted}


def canary(kind="R1"):
    return SessionCanary(SimpleNamespace(kind=lambda drafter: kind), Counters())


GOOD = History.of([Tries(70, 10)] * 6).as_dict()
STATS = {"draft_model": {"0": {"turns": GOOD}}}
RESTORED = Warm(restored_from="disk", drafters={"draft_model": Readiness("R1", 64)})


def test_short_turns_are_looked_at_together():
    watched = canary()
    watched.heed("s", RESTORED)
    looks = [watched.look("s", "draft_model", "0", STATS, Tries(1, 5)) for _ in range(8)]
    first = next(index for index, found in enumerate(looks) if found is not None)
    assert first == 3, "24 tries, the first 20 of which are too few"
    assert looks[first].is_worse
    assert looks[first + 1 :] == [None] * 4, "one alarm per restore"


@pytest.mark.parametrize(
    ("kind", "warm", "heat"),
    [("R0", RESTORED, "0"), (None, RESTORED, "0"), ("R1", Warm(), "0"), ("R1", RESTORED, "1")],
)
def test_without_state_of_its_own_a_restore_or_a_history_nothing_is_said(kind, warm, heat):
    watched = canary(kind)
    watched.heed("s", warm)
    assert watched.look("s", "draft_model", heat, STATS, Tries(1, 99)) is None


def test_what_a_turn_adds_is_of_the_form_that_the_canary_reads():
    fared = DrafterMetrics(num_drafts=3, tried=(3, 2, 2, 1), stood=(2, 2, 1, 1))
    assert counts_of({}, "auto") == {}
    counts = counts_of({"draft_model": fared}, "draft_model")
    assert list(counts) == ["draft_model"]
    assert Tries(**counts["draft_model"]["tries"]) == Tries(6, 2)
    assert History.from_dict(counts["draft_model"]["turns"]) == History.of([Tries(6, 2)])


def test_a_method_of_several_drafters_has_their_sum_beside_theirs():
    one = DrafterMetrics(num_drafts=3, tried=(3, 1), stood=(1, 0))
    other = DrafterMetrics(num_drafts=1, tried=(1, 1, 1), stood=(1, 1, 1))
    counts = counts_of({"draft_model": one, "ngram": other}, "auto")
    assert set(counts) == {"draft_model", "ngram", "auto"}
    assert counts["auto"]["drafted"] == [4, 2, 1]
    assert counts["auto"]["accepted"] == [2, 1, 1]
    assert counts["auto"]["tries"] == {"accepted": 4, "rejected": 3}
    assert counts["ngram"]["num_drafts"] == 1


def test_each_drafter_is_watched_until_it_is_known():
    watched = canary()
    watched.heed("s", RESTORED)
    both = {name: {"0": {"turns": GOOD}} for name in ("draft_model", "early_exit")}
    assert watched.look("s", "draft_model", "0", both, Tries(MAX_TRIES, 40)) is None
    assert watched.look("s", "draft_model", "0", both, Tries(0, 500)) is None, "it is known"
    found = watched.look("s", "early_exit", "0", both, Tries(2, 40))
    assert found is not None
    assert found.is_worse


def test_all_looks_together_spend_the_level_once():
    watch, levels = Watch(History.from_dict(GOOD)), []
    while watch.tries.total < MAX_TRIES:
        if watch.look(Tries(7, 1)) is not None:
            levels.append(LEVEL / 2**watch.num_looks)
    assert len(levels) == 4, "after 24, 48, 96 and 192 tries"
    assert sum(levels) < LEVEL


def test_a_drafter_that_did_well_for_long_is_not_watched_for_ever():
    watched = canary()
    watched.heed("s", RESTORED)
    assert watched.look("s", "draft_model", "0", STATS, Tries(MAX_TRIES, 40)) is None
    assert watched.look("s", "draft_model", "0", STATS, Tries(0, 500)) is None
