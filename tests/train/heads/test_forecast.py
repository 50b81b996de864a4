"""The projection by hand, and passes that can be timed."""

import pytest

from outrider.models.decoder import Decoder
from outrider.models.heads.eagle_network import EagleNetwork
from outrider.models.heads.kv_network import KVNetwork
from outrider.models.heads.medusa_network import MedusaNetwork
from outrider.train.heads.acceptance import Rates
from outrider.train.heads.forecast import Prices, forecast, measure, told
from outrider.train.heads.kinds import find_kind
from outrider.train.heads.kv import KVHead, new_spec
from outrider.train.heads.timing import CONTEXT
from tests.train.heads.conftest import settings

PRICES = Prices(1, 10.0, (11.0, 12.0, 13.0), (2.0, 4.0, 6.0))
RATES = Rates((0.8, 0.4, 0.1), (0.8, 0.5, 0.25))


def test_the_best_length_by_hand():
    """1.8 / 1.3, 2.2 / 1.6, 2.3 / 1.9."""
    guess = forecast(PRICES, RATES)
    assert guess.num_draft_tokens == 1
    assert guess.speedup == pytest.approx(1.8 / 1.3)
    assert guess.needed == pytest.approx(1.3)
    assert guess.most == pytest.approx(4 / 1.9)
    assert "projected 1.38x at K=1" in told(guess, 1)


def test_a_useless_draft_is_told_as_such():
    assert forecast(PRICES, Rates((0.1, 0.0, 0.0), (0.1, 0.0, 0.0))).speedup < 1.0


@pytest.mark.parametrize("kind", ["eagle3", "medusa", "kv", "draft_model"])
def test_every_kind_has_a_price(teacher, kind):
    student = find_kind(kind).fresh(teacher, settings(kind), None)
    prices = measure(teacher, student, 3, concurrency=2)
    assert prices.concurrency == 2
    assert list(prices.verify_s) == sorted(prices.verify_s)
    assert prices.plain_s <= prices.verify_s[0]
    passes = [student.num_passes(depth) for depth in (1, 2, 3)]
    each = [seconds / count for seconds, count in zip(prices.draft_s, passes, strict=True)]
    assert each == pytest.approx([each[0]] * 3)
    assert each[0] > 0.0


SERVED = {
    "eagle3": EagleNetwork,
    "medusa": MedusaNetwork,
    "kv": KVNetwork,
    "draft_model": Decoder,
}


@pytest.mark.parametrize("kind", SERVED)
def test_what_is_timed_is_what_is_served(teacher, kind, monkeypatch):
    """The trainer's own network has a batch's bookkeeping in it, and no context to read."""
    student = find_kind(kind).fresh(teacher, settings(kind), None)
    run = student.serving_pass(2)
    seen, forward = [], SERVED[kind].forward
    monkeypatch.setattr(
        SERVED[kind], "forward", lambda *args, **kw: seen.append(args) or forward(*args, **kw)
    )
    monkeypatch.setattr(student, "states", None)
    run()
    assert len(seen) == 1


@pytest.mark.parametrize("sees_drafts", [True, False])
def test_a_head_over_the_targets_kv_is_timed_with_context(teacher, sees_drafts, monkeypatch):
    spec = new_spec(teacher, 2, None, sees_drafts=sees_drafts)
    run = KVHead(spec, teacher, None).serving_pass(3)
    seen, rows = [], KVNetwork.rows

    def noted(*args):
        seen.append(rows(*args))
        return seen[-1]

    monkeypatch.setattr(KVNetwork, "rows", noted)
    run()
    context = min(CONTEXT, teacher.spec.max_positions - 1)
    assert seen[0].standing.positions_N.tolist() == [context] * 3
    assert [span.num_cached for span in seen[0].seeing.spans] == [context - (not sees_drafts)] * 3
