"""Statistics of a session: acceptance by position as it is, whatever was drafted; by drafter."""

import random

import pytest

from outrider.control.acceptance import FIRST_REACH, Experience
from outrider.control.minds import Minds
from outrider.request import Request, Speculation
from outrider.sequence import Sequence
from outrider.serve.session_turn import SessionTurn
from outrider.serve.session_warmth import Warm, counts_of
from outrider.session.canary import Tries
from outrider.session.log import SessionLog
from outrider.step import Commit, DraftTree
from outrider.stream.streamer import Streamer

ACCEPTANCE = {"draft_model": (0.9, 0.75, 0.6, 0.4), "ngram": (0.5, 0.8, 0.9, 0.9)}
AUTO = {"method": "auto", "policy": "fixed", "num_draft_tokens": 3}
TURN = {"max_output_tokens": 24, "temperature": 0, "ignore_eos": True}


def metrics_of_turn(rng, max_tokens, depths):
    """A turn whose K varies: its drafts stand as `ACCEPTANCE` says, and its length cuts the last.

    Args:
        depths: the next draft's drafter and K, as a policy might choose them.
    """
    spec = Speculation(drafter="auto", verifier="greedy")
    request = Request(id="r", prompt_token_ids=(1,))
    seq = Sequence(id="r#0", request=request, index=0, tokens=[1], seed=0, speculation=spec)
    stream = Streamer(None, lambda verifier: "exact")
    stream.open(seq)
    left = max_tokens
    while True:
        drafter, depth = depths(rng)
        stands = [rng.random() < p for p in ACCEPTANCE[drafter][:depth]]
        num_accepted = [*stands, False].index(False)
        tokens = (5,) * min(num_accepted + 1, left)
        left -= len(tokens)
        commit = Commit(
            seq=seq,
            tree=DraftTree.chain((5,) * depth, drafter),
            tokens=tokens,
            num_drafted=depth,
            num_accepted=num_accepted,
            num_kept=min(num_accepted, len(tokens)),
            finish_reason=None if left else "length",
        )
        (event,) = stream.verified([commit])
        if not left:
            return event.metrics


def at_random(rng):
    return rng.choice(list(ACCEPTANCE)), rng.randint(1, 4)


def unlike(rng):
    """Always deep drafts of one drafter, mostly short ones of the other."""
    is_short = rng.random() < 0.7
    return rng.choice([("draft_model", 4), ("ngram", 1 if is_short else 4)])


@pytest.fixture(params=[at_random, unlike], scope="module")
def stats(request):
    """Class S after 600 turns of a session, kept turn by turn."""
    rng = random.Random(5)
    log = SessionLog(":memory:", lambda: 0.0)
    session = log.create("", "maker").session
    for _ in range(600):
        metrics = metrics_of_turn(rng, rng.randint(1, 60), request.param)
        counts = counts_of(metrics.by_drafter, metrics.drafter)
        log.stats.add_all("", session, {name: {"0": each} for name, each in counts.items()})
    return log.stats.get("", session)


def experience_of(stats):
    turn = SessionTurn(
        tenant="", response_id="r", session="s", base=None, prompt=(), note={}, warm=Warm(),
        stats=stats, maker="",
    )  # fmt: skip
    return turn.experience(0.0)


@pytest.mark.parametrize("drafter", ACCEPTANCE)
def test_acceptance_by_position_is_not_biased_by_how_deep_drafts_went(stats, drafter):
    past = experience_of(stats)[drafter]
    known = zip(ACCEPTANCE[drafter], past["drafted"], past["accepted"], strict=True)
    for acceptance, drafted, accepted in known:
        error = (acceptance * (1 - acceptance) / drafted) ** 0.5
        assert drafted > 100
        assert accepted / drafted == pytest.approx(acceptance, abs=3.5 * error)


@pytest.mark.parametrize("drafter", ACCEPTANCE)
def test_a_policy_that_starts_from_them_expects_what_is_so(stats, drafter):
    past = experience_of(stats)[drafter]
    experience = Experience()
    experience.expect(past["drafted"], past["accepted"], weight=1e9)
    stands = [1.0, *experience.forecast(4, 0).stands]
    for acceptance, before, found in zip(ACCEPTANCE[drafter], stands, stands[1:], strict=False):
        assert found / before == pytest.approx(FIRST_REACH * acceptance, abs=0.05)


def test_tries_are_those_of_the_positions(stats):
    """The canary reads what the policy reads."""
    for by_heat in stats.values():
        counts = by_heat["0"]
        assert Tries(**counts["tries"]) == Tries.of_positions(counts["drafted"], counts["accepted"])


async def said(client, session, parts, **options):
    speculation = {**AUTO, "drafter_options": {"parts": parts}, **options}
    body = {
        **TURN,
        "input": "one two",
        "speculation": speculation,
        "outrider": {"session": session},
    }
    answer = await client.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_auto_hands_each_candidate_its_own(client, llm, monkeypatch):
    taken, add = [], llm.engine.add

    def noted(request):
        add(request)
        taken.append(llm.engine._groups[request.id][0])

    monkeypatch.setattr(llm.engine, "add", noted)
    made = await client.post("/v1/sessions", json={})
    session = made.json()["id"]
    stats = client.app.state.server.sessions.log.stats
    await said(client, session, "draft_model,ngram")  # a fixed policy drafts by the first
    first = stats.get("", session)
    assert set(first) == {"draft_model", "auto"}
    second = await said(client, session, "ngram,draft_model")
    both = stats.get("", session)
    assert set(both) == {"draft_model", "ngram", "auto"}
    assert both["draft_model"] == first["draft_model"], "what another one drafted is not its own"
    assert second["outrider"]["session"]["spec"]["accept_prior"] is not None
    await said(client, session, "draft_model,ngram")
    seq = taken[-1]
    past = seq.request.experience
    for name in ("draft_model", "ngram"):
        counts = both[name]["0"]
        assert past[name] == {"drafted": counts["drafted"], "accepted": counts["accepted"]}
    assert past["draft_model"] != past["ngram"]
    mind = Minds().of(seq)
    for name in ("draft_model", "ngram"):
        alone = Experience()
        alone.expect(**past[name], weight=12.0)
        assert mind.experience[name]._stand == alone._stand
    sums = [both[name]["0"]["num_drafts"] for name in ("draft_model", "ngram", "auto")]
    assert sums[0] + sums[1] == sums[2] > sums[0] > 0


async def test_a_cascade_tells_of_its_parts_and_of_itself(client):
    session = (await client.post("/v1/sessions", json={})).json()["id"]
    await said(client, session, "ngram,draft_model", method="cascade")
    found = client.app.state.server.sessions.log.stats.get("", session)
    assert "cascade" in found
    assert "draft_model" in found
    total = sum(by_heat["0"]["num_drafts"] for name, by_heat in found.items() if name != "cascade")
    assert found["cascade"]["0"]["num_drafts"] == total
