"""Windows come from their own stream, each once per pass, from a restorable position."""

from collections import Counter

import pytest
import torch

from outrider.train.packing import PackedBatches

STREAMS = {"low": torch.arange(100, dtype=torch.int16), "high": torch.arange(1000, 1200).short()}


def make_batches(shares: dict[str, float] | None = None) -> PackedBatches:
    return PackedBatches(
        STREAMS, shares or {"low": 0.5, "high": 0.5}, batch_size=4, window=10, seed=3
    )


def test_windows_are_consecutive_tokens_of_one_domain() -> None:
    batch_BT = make_batches().next_batch()
    assert batch_BT.shape == (4, 10)
    assert (batch_BT.diff(dim=1) == 1).all()


def test_a_pass_visits_every_window_once() -> None:
    batches = make_batches({"low": 1.0, "high": 1e-9})
    num_windows = len(STREAMS["low"]) // 10 - 1
    rows = [row for _ in range(9) for row in batches.next_batch().tolist()]
    starts = Counter(row[0] for row in rows[:num_windows])
    assert set(starts.values()) == {1}
    assert len({start % 10 for start in starts}) == 1


def test_position_restores_exactly() -> None:
    batches, resumed = make_batches(), make_batches()
    for _ in range(5):
        batches.next_batch()
    resumed.load_state_dict(batches.state_dict())
    for _ in range(5):
        assert torch.equal(resumed.next_batch(), batches.next_batch())


def test_short_stream_and_missing_share_are_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens"):
        PackedBatches({"low": STREAMS["low"][:12]}, {"low": 1.0}, batch_size=1, window=10, seed=0)
    with pytest.raises(ValueError, match="'high' has no share"):
        make_batches({"low": 1.0})
