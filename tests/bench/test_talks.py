"""Talks: turns follow their answers, after a pause, for so many users at a time."""

import pytest

from outrider.bench.talks import Habits, Talks, follow
from outrider.bench.target import Arm, Ask, Question, Reply
from outrider.errors import ConfigError
from outrider.request import SamplingParams

ARM = Arm(name="a")


def questions(num: int, domain: str = "d") -> list[Question]:
    return [Question(id=f"{domain}{i}", prompt=f"{domain}{i}?", domain=domain) for i in range(num)]


def talks(asked: list[Question], **habits) -> Talks:
    return Talks(asked, ARM, SamplingParams(), Habits(**habits))


def reply(ask: Ask, end_s: float, text: str = "yes", error: str = "") -> Reply:
    return Reply(ask=ask, due_s=0.0, sent_s=0.0, last_s=end_s, text=text, error=error)


def drained(feed: Talks, seconds: float = 1.0) -> list[Ask]:
    """Every ask, answered one after the other."""
    found, now = [], 0.0
    while feed.due_s is not None:
        now = max(now, feed.due_s)
        found.append(feed.take(now))
        now += seconds
        feed.note(reply(found[-1], now))
    return found


def test_a_turn_follows_the_answer_before() -> None:
    asks = drained(talks(questions(3), num_turns=3))
    assert [ask.question.prompt for ask in asks] == [
        "d0?",
        "d0?yes\n\nd1?",
        "d0?yes\n\nd1?yes\n\nd2?",
    ]
    assert [ask.question.id for ask in asks] == ["d0", "d1", "d2"]


def test_talks_are_of_one_domain_and_all_questions_are_asked() -> None:
    asked = questions(3, "a") + questions(2, "b")
    asks = drained(talks(asked, num_turns=2))
    assert [ask.question.id for ask in asks] == ["a0", "a1", "a2", "b0", "b1"]


def test_so_many_users_talk_at_a_time() -> None:
    feed = talks(questions(8), num_users=3, num_turns=2)
    first = [feed.take(0.0) for _ in range(3)]
    assert feed.due_s is None, "all of them wait for answers"
    feed.note(reply(first[1], 5.0))
    assert feed.due_s == 5.0
    assert feed.take(5.0).question.id == "d3"


def test_users_think() -> None:
    feed = talks(questions(400), num_turns=400, think_s=2.0, seed=1)
    pauses, now = [], 0.0
    while feed.due_s is not None:
        pauses.append(feed.due_s - now)
        ask = feed.take(feed.due_s)
        now = max(now, ask.at_s) + 1.0
        feed.note(reply(ask, now))
    assert sum(pauses) / len(pauses) == pytest.approx(2.0, rel=0.15)
    assert min(pauses) >= 0.0


def test_a_failed_turn_ends_its_talk() -> None:
    feed = talks(questions(4), num_turns=2)
    feed.note(reply(feed.take(0.0), 1.0, error="no"))
    assert feed.take(1.0).question.prompt == "d2?"


def test_conversations_go_on_as_conversations() -> None:
    def says(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    before = [says("system", "be brief"), says("user", "a?")]
    turn = [says("system", "be brief"), says("user", "b?")]
    told = follow(before, "yes", turn)
    assert told == [*before, says("assistant", "yes"), says("user", "b?")]
    for mixed in ("b?", [1, 2]):
        with pytest.raises(ConfigError, match="all texts"):
            follow(before, "yes", mixed)


def test_habits_are_checked() -> None:
    for wrong in ({"num_users": 0}, {"num_turns": 0}, {"think_s": -1.0}):
        with pytest.raises(ConfigError, match="must be"):
            Habits(**wrong)
