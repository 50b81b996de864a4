"""Nothing crosses a tenant: told by counters of hits and by drafts, never by a clock."""

import pytest

from outrider.request import SpeculationParams
from outrider.testing import tiny_engine
from tests.engine.test_warmth import PROMPT, ask as request, serve

LEARNING = ("suffix", "recycle")  # what they have learnt of a tenant serves its next request
OTHERS = ("draft_model", "ngram", "lookahead", "retrieval", "early_exit")


def make_engine(method):
    more = [] if method in ("draft_model", "ngram") else [method]
    return tiny_engine(draft_noise=0.004, drafters=more)


def hits(engine):
    """Tokens found cached, in every pool."""
    pools = {"target": engine.manager, "draft": engine.drafters["draft_model"].manager}
    return {name: manager.hits for name, manager in pools.items()}


def ask(engine, tenant, method):
    """(answer, drafts of each step), and what was hit for it."""
    before = hits(engine)
    answer, metrics, steps = serve(
        engine, PROMPT, tenant=tenant, speculation=SpeculationParams(method=method)
    )
    found = {name: count - before[name] for name, count in hits(engine).items()}
    assert found["target"] == metrics.num_cached_tokens
    return (answer, steps), found


@pytest.mark.parametrize("method", LEARNING + OTHERS)
def test_another_tenant_finds_what_the_first_one_found_at_first(method):
    engine = make_engine(method)
    first, found = ask(engine, "a", method)
    assert found == {"target": 0, "draft": 0}
    again, found = ask(engine, "a", method)
    assert found["target"] > 0, "the same tenant does hit: the counters count"
    assert (found["draft"] > 0) == (method == "draft_model")
    if method in LEARNING:
        assert again[1] != first[1], "and it drafts by what it has learnt"
    for tenant in ("b", "", "a\x00salt"):
        other, found = ask(engine, tenant, method)
        assert found == {"target": 0, "draft": 0}
        assert other == first
    assert ask(engine, "a", method)[1]["target"] > 0


def test_tenants_that_run_side_by_side_share_no_block():
    """Tables of one step, opened at once: no block is in two of them."""
    engine = make_engine("draft_model")
    for tenant in ("a", "b", "a"):
        engine.add(request(PROMPT, tenant=tenant, name=f"{tenant}{len(engine._groups)}"))
    shared = set()
    while engine.has_work():
        engine.step()
        running = [seq for group in engine._groups.values() for seq in group if seq.table]
        for seq in running:
            for other in running:
                common = {*seq.table.blocks} & {*other.table.blocks}
                if seq is not other and common:
                    shared.add((seq.request.tenant, other.request.tenant))
    assert shared == {("a", "a")}, "one tenant does share"
