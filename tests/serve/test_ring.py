"""Rings: numbers without gaps, replay of exactly what was missed, and bounds that hold."""

import json

import pytest
from hypothesis import given, strategies as st

from outrider.serve.ring import TAIL, GoneError, Ring, RingLimits, Rings

DELTA = {"type": "response.output_text.delta", "delta": "x"}


class Clock:
    """Time that goes on when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Listener:
    """A connection that notes what it was told."""

    def __init__(self):
        self.durable = []
        self.tails = []
        self.is_closed = False

    def put_durable(self, item):
        assert not self.is_closed, "nothing follows the end"
        self.durable.append(item)

    def put_tail(self, item):
        self.tails.append(item)

    def close(self):
        self.is_closed = True

    @property
    def numbers(self):
        return [item.number for item in self.durable]


def test_events_are_numbered_without_gaps_and_say_so():
    ring, listener = Ring(), Listener()
    ring.join(listener)
    for _ in range(3):
        ring.put(DELTA)
    assert listener.numbers == [0, 1, 2]
    bodies = [json.loads(item.data) for item in listener.durable]
    assert [body["sequence_number"] for body in bodies] == [0, 1, 2]
    assert all(list(body)[:2] == ["type", "sequence_number"] for body in bodies)


@given(num_before=st.integers(0, 12), num_after=st.integers(0, 12), data=st.data())
def test_whoever_comes_back_gets_exactly_what_is_missing(num_before, num_after, data):
    after = data.draw(st.integers(-1, num_before - 1))
    ring, listener = Ring(), Listener()
    for _ in range(num_before):
        ring.put(DELTA)
    ring.join(listener, after=after)
    for _ in range(num_after):
        ring.put(DELTA)
    ring.close()
    assert listener.numbers == list(range(after + 1, num_before + num_after))
    assert listener.is_closed


def test_a_closed_ring_replays_and_ends():
    ring, late = Ring(), Listener()
    ring.put(DELTA)
    ring.close()
    ring.join(late)
    assert (late.numbers, late.is_closed) == ([0], True)


def test_tails_have_a_base_and_no_number_and_are_not_replayed():
    ring, first, second = Ring(), Listener(), Listener()
    ring.join(first)
    ring.put(DELTA)
    ring.put_tail({"type": "outrider:output_text.tail", "text": "y"})
    ring.put(DELTA)
    ring.join(second)
    (tail,) = first.tails
    body = json.loads(tail.data)
    assert (tail.number, body["base"]) == (TAIL, 0)
    assert "sequence_number" not in body
    assert second.tails == []
    assert second.numbers == [0, 1]


def test_nothing_follows_the_end():
    ring = Ring()
    ring.close()
    with pytest.raises(AssertionError, match="terminal"):
        ring.put(DELTA)
    with pytest.raises(AssertionError, match="terminal"):
        ring.put_tail({"type": "t"})


def test_what_left_hears_nothing_more():
    ring, listener = Ring(), Listener()
    ring.join(listener)
    ring.leave(listener)
    ring.put(DELTA)
    assert listener.numbers == []
    assert ring.num_listeners == 0
    ring.leave(listener)  # twice does no harm


@pytest.mark.parametrize(
    "limits",
    [RingLimits(max_events=5), RingLimits(max_bytes=400)],
    ids=["events", "bytes"],
)
def test_the_oldest_events_go_first(limits):
    ring, listener = Ring(limits), Listener()
    for _ in range(80):
        ring.put(DELTA)
    assert ring.last == 79
    assert 2 <= len(ring) <= 5
    assert ring.num_bytes <= limits.max_bytes
    assert ring.first == 80 - len(ring)
    with pytest.raises(GoneError) as gone:
        ring.join(listener, after=ring.first - 2)
    assert gone.value.first == ring.first
    ring.join(listener, after=ring.first - 1)
    assert listener.numbers == list(range(ring.first, 80))


def test_events_go_when_their_time_is_over():
    clock = Clock()
    ring = Ring(RingLimits(ttl_s=10), clock)
    ring.put(DELTA)
    clock.now = 8
    ring.put(DELTA)
    clock.now = 11
    with pytest.raises(GoneError):
        ring.join(Listener())
    assert ring.first == 1


def test_one_event_is_always_held_however_large():
    ring = Ring(RingLimits(max_bytes=10))
    ring.put({**DELTA, "delta": "x" * 100})
    assert len(ring) == 1


def test_a_ring_goes_on_from_events_of_the_past():
    kept, ring = [], Ring()
    past = [ring.put(DELTA) for _ in range(3)]
    again, listener = Ring(past=past, keep=kept.append), Listener()
    again.join(listener, after=0)
    again.put(DELTA)
    assert listener.numbers == [1, 2, 3]
    assert [event.number for event in kept] == [3], "only what is new is written down"


def test_an_event_is_written_down_before_anybody_hears_of_it():
    listener = Listener()
    ring = Ring(keep=lambda event: told.append((event.number, len(listener.durable))))
    told = []
    ring.join(listener)
    ring.put(DELTA)
    ring.put(DELTA)
    assert told == [(0, 0), (1, 1)]


def test_rings_stay_in_bounds_over_ten_thousand_responses():
    clock = Clock()
    rings = Rings(RingLimits(ttl_s=5), clock, max_rings=64, max_bytes=20_000)
    for index in range(10_000):
        clock.now += 0.01
        ring = rings.open(f"resp_{index}")
        for _ in range(4):
            ring.put(DELTA)
        if index % 100:
            ring.close()
        else:
            rings.drop(f"resp_{index}")
        assert len(rings) <= 64 + 1
        assert rings.num_bytes <= 20_000 + ring.num_bytes
    assert rings.find("resp_0") is None
    assert rings.find("resp_9999") is not None
    clock.now += 6
    assert rings.find("resp_9999") is None, "its time is over"


def test_open_rings_are_not_dropped():
    rings = Rings(max_rings=2)
    first = rings.open("first")
    for index in range(5):
        rings.open(f"r{index}").close()
    assert rings.find("first") is first


def test_an_event_that_cannot_be_kept_is_not_told_and_leaves_its_number():
    def keep(event):
        if is_full:
            raise OSError("no space")

    is_full, ring, listener = False, Ring(keep=keep), Listener()
    ring.join(listener)
    ring.put(DELTA)
    is_full = True
    with pytest.raises(OSError, match="no space"):
        ring.put(DELTA)
    assert (ring.last, len(ring), len(listener.durable)) == (0, 1, 1)
    is_full = False
    assert ring.put(DELTA).number == 1
