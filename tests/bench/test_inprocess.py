"""InProcess: pace, order, errors and counts, on a clock that the test moves."""

import pytest

from outrider import LLM
from outrider.bench.feed import Listed
from outrider.bench.histogram import total
from outrider.bench.inprocess import InProcess
from outrider.bench.target import Arm, Ask, Question, Reply
from outrider.errors import ConfigError
from outrider.request import SamplingParams, SpeculationParams
from tests.engine.tiny_checkpoint import write_checkpoint

OFF = Arm(name="off", speculation=SpeculationParams(method="off"))
NGRAM = Arm(
    name="ngram",
    speculation=SpeculationParams(method="ngram", num_draft_tokens=3, prompt_lookup_min=1),
)
MANY = list(range(5, 105))  # a prompt in which a look-up finds most tokens
EIGHT = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(str(write_checkpoint(tmp_path_factory.mktemp("target"))), check_integrity=True)


class Clock:
    """Moves by a millisecond per look at it; sleeping moves it by what was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def ask(name: str, prompt: object = "def main(argv):", arm: Arm = OFF, **more: object) -> Ask:
    question = Question(id=name, prompt=prompt)  # type: ignore[arg-type]
    return Ask(**{"question": question, "sampling": EIGHT, "arm": arm, **more})  # type: ignore[arg-type]


def test_replies_come_in_the_order_of_the_asks_and_agree_with_the_engine(llm: LLM) -> None:
    prompts = ["def main(argv):", "return", "line in argv # the quick"]
    asks = [ask(str(i), prompt) for i, prompt in enumerate(prompts)]
    ticked: list[Reply] = []
    replies = InProcess(llm).run(asks, concurrency=2, tick=ticked.append)
    assert [reply.ask for reply in replies] == asks
    assert sorted(r.ask.question.id for r in ticked) == ["0", "1", "2"]
    for reply, output in zip(replies, llm.generate(prompts, EIGHT, "off"), strict=True):
        assert reply.error == ""
        assert list(reply.token_ids or ()) == output.token_ids
        assert (reply.text, reply.finish_reason) == (output.text, "length")
        assert reply.num_tokens == 8
        assert len(reply.chunk_s) == 8
        assert reply.num_prompt_tokens == len(output.prompt_token_ids)


def test_the_same_ask_twice_gets_two_replies(llm: LLM) -> None:
    twice = [ask("a")] * 2
    first, second = InProcess(llm).run(twice, concurrency=1)
    assert first is not second
    assert first.token_ids == second.token_ids


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_are_in_flight_than_allowed(llm: LLM, concurrency: int) -> None:
    replies = InProcess(llm).run([ask(str(i)) for i in range(7)], concurrency=concurrency)
    changes = [(r.sent_s, 1) for r in replies] + [(r.last_s or 0.0, -1) for r in replies]
    count = most = 0
    for _, change in sorted(changes):
        count += change
        most = max(most, count)
    assert most == concurrency


def test_times_are_ordered_and_first_and_last_are_those_of_tokens(llm: LLM) -> None:
    (reply,) = InProcess(llm).run([ask("a", arm=NGRAM)], concurrency=1)
    assert reply.first_s is not None
    assert reply.last_s is not None
    assert reply.due_s == reply.sent_s < reply.first_s < reply.last_s
    assert (reply.chunk_s[0], reply.chunk_s[-1]) == (reply.first_s, reply.last_s)
    assert list(reply.chunk_s) == sorted(reply.chunk_s)


def test_an_open_loop_waits_for_its_times_and_counts_from_them(llm: LLM) -> None:
    clock = Clock()
    target = InProcess(llm, clock=clock, sleep=clock.sleep)
    asks = [ask("late", at_s=50.0), ask("early", at_s=20.0), ask("at once")]
    replies = target.run(asks, concurrency=4)
    assert [reply.due_s for reply in replies[:2]] == [50.0, 20.0]
    assert [round(reply.sent_s) for reply in replies] == [50, 20, 0]
    assert len(clock.slept) == 2
    assert replies[1].ttft_s == pytest.approx((replies[1].first_s or 0.0) - 20.0)


def test_who_must_wait_for_room_was_due_before(llm: LLM) -> None:
    """A request that was due while no room was free has waited since."""
    clock = Clock()
    target = InProcess(llm, clock=clock, sleep=clock.sleep)
    asks = [ask("a", at_s=1.0), ask("b", at_s=1.0)]
    first, second = target.run(asks, concurrency=1)
    assert second.sent_s >= (first.last_s or 0.0)
    assert second.due_s == 1.0
    assert (second.ttft_s or 0.0) > (first.ttft_s or 0.0)


def test_what_cannot_be_answered_is_told_and_the_others_are_answered(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert InProcess(llm).has_chat_template
    monkeypatch.setattr(llm.tokenizer.backend, "chat_template", None)  # type: ignore[union-attr]
    asks = [
        ask("empty", ""),
        ask("no template", [{"role": "user", "content": "hello"}]),
        ask("no drafter", arm=Arm(name="x", speculation=SpeculationParams(method="draft_model"))),
        ask("for servers", arm=Arm(name="x", extra={"top": 1})),
        ask("two", sampling=SamplingParams(n=2)),
        ask("long", [1] * 500),
        ask("good"),
    ]
    target = InProcess(llm)
    errors = [reply.error for reply in target.run(asks, concurrency=2)]
    wanted = ("empty", "template", "draft_model", "extra=", "n=2", "500 tokens", "")
    for error, part in zip(errors, wanted, strict=True):
        assert part in error
        assert bool(error) == bool(part)
    assert not target.has_chat_template
    assert not llm.engine.has_work()


def test_counters_are_those_of_the_replies(llm: LLM) -> None:
    target = InProcess(llm)
    replies = target.run([ask(str(i), MANY, NGRAM) for i in range(6)], concurrency=3)
    told, counted = total(reply.acceptance for reply in replies), target.counters()
    assert told is not None
    assert counted is not None
    assert told.num_drafts > 0
    assert told[1:4] == counted[1:4]
    assert sum(told.histogram) == told.num_drafts


def test_tenants_share_no_prefix(llm: LLM) -> None:
    prompt = [7] * 64
    asks = [ask(str(i), prompt, tenant=tenant) for i, tenant in enumerate("xyx")]
    cached = [r.num_cached_tokens for r in InProcess(llm).run(asks, concurrency=1)]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


def test_an_interruption_leaves_the_engine_empty(llm: LLM) -> None:
    def interrupt(reply: Reply) -> None:
        raise KeyboardInterrupt

    target = InProcess(llm)
    with pytest.raises(KeyboardInterrupt):
        target.run([ask(str(i)) for i in range(5)], concurrency=3, tick=interrupt)
    assert not llm.engine.has_work()
    assert llm.engine.manager.num_used == 0


def test_it_refuses_a_busy_engine_and_no_concurrency(llm: LLM) -> None:
    events = llm.stream("def main", SamplingParams(max_tokens=50, ignore_eos=True))
    next(events)
    with pytest.raises(ConfigError, match="other requests"):
        InProcess(llm).run([ask("a")], concurrency=1)
    events.close()
    with pytest.raises(ConfigError, match="concurrency=0"):
        InProcess(llm).serve(Listed([ask("a")]), concurrency=0)


def test_it_describes_model_and_engine(llm: LLM) -> None:
    told = InProcess(llm).describe()
    assert told["model_hash"] == llm.engine.spec.fingerprint
    assert (told["engine"], told["kind"]) == ("outrider", "in process")
