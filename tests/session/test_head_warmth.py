"""Warm heads: a conversation taken up elsewhere is drafted for as if it had never been put down."""

import contextlib
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch

from outrider.draft.head_drafter import HeadDrafter
from outrider.engine.warm_bundles import NOT_KEPT
from outrider.engine.warmth import Warmth
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.testing import events, tiny_engine
from tests.draft.heads import KINDS, head, loud_target

SIZE = 4
NUM_TURNS = 3
FIRST = [(11 * j * j + 7 * j) % 200 + 20 for j in range(33)]
NEXT = [7, 130, 211, 15, 99, 36, 180]
WARM = 0.9  # temperature; greedy text says the same again and again
WITH_ROWS = [name for name, kind in KINDS.items() if issubclass(kind.drafter, HeadDrafter)]
WITHOUT = [name for name in KINDS if name not in WITH_ROWS]
WAYS = {
    "chain": {"num_draft_tokens": 4, "width": 1},
    "tree": {"num_draft_tokens": 3, "width": 3, "num_nodes": 8, "draft_sample_method": "greedy"},
}


class Turn(NamedTuple):
    """What came of one turn.

    Attributes:
        drafts: log, nodes and parents of each.
        num_rows, num_head_rows: that target and head ran.
    """

    answer: list[int]
    drafts: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    num_accepted: int
    num_cached: int
    num_rows: int
    num_head_rows: int


def engine_of(kind, **options):
    drafter = KINDS[kind].drafter
    heads = {drafter.name: options.pop("head", None) or head(kind)}
    given = {"target": loud_target(), **options}
    return tiny_engine(drafters=[drafter], heads=heads, draft_seed=None, num_blocks=400, **given)


def drafter_of(engine, kind):
    return engine.drafters[KINDS[kind].drafter.name]


def turn(engine, kind, log, way="chain", *, temperature=WARM, tenant="", is_plain=False):
    """One answer to a log, and what it took."""
    asked = SpeculationParams(method="off")
    if not is_plain:
        drafter = drafter_of(engine, kind)
        settings = dict(WAYS[way])
        most = getattr(drafter, "max_draft_tokens", settings["num_draft_tokens"])
        settings["num_draft_tokens"] = min(settings["num_draft_tokens"], most)
        asked = SpeculationParams(method=drafter.name, policy="fixed", **settings)
    sampling = SamplingParams(max_tokens=24, temperature=temperature, ignore_eos=True)
    request = Request(
        id="r",
        prompt_token_ids=tuple(log),
        sampling=sampling,
        speculation=asked,
        seed=17,
        tenant=tenant,
    )
    with noted(engine, kind) as (drafts, rows, head_rows):
        ((told),) = events(engine, [request]).values()
    return Turn(
        [t for event in told for t in event.token_ids],
        drafts,
        sum(event.num_accepted for event in told),
        told[-1].metrics.num_cached_tokens,
        sum(rows),
        sum(head_rows),
    )


@contextlib.contextmanager
def noted(engine, kind):
    """Drafts to come, and the rows that target and head run."""
    drafter, drafts, rows, head_rows = drafter_of(engine, kind), [], [], []
    draft, run_pieces = drafter.draft, engine.runner.run

    def noting(asked, plan):
        trees = draft(asked, plan)
        for row, tree in zip(asked, trees, strict=True):
            drafts.append((tuple(row.seq.tokens), tree.tokens, tree.parents))
        return trees

    def counting(pieces, *more):
        rows.extend(len(piece.chain) + len(piece.tree) for piece in pieces)
        return run_pieces(pieces, *more)

    drafter.draft, engine.runner.run = noting, counting
    if isinstance(drafter, HeadDrafter):
        run_pass = drafter.run_pass

        def counting_too(pieces, depth):
            head_rows.extend(len(piece.chain) for piece in pieces if depth == 0)
            return run_pass(pieces, depth)

        drafter.run_pass = counting_too
    yield drafts, rows, head_rows
    del drafter.draft, engine.runner.run
    if isinstance(drafter, HeadDrafter):
        del drafter.run_pass


class Conversation(NamedTuple):
    """All turns in one engine, and the log before the last of them."""

    engine: object
    log: list[int]
    last: Turn


@cache
def uninterrupted(kind, way, temperature):
    engine, log = engine_of(kind), list(FIRST)
    for _ in range(NUM_TURNS - 1):
        log += [*turn(engine, kind, log, way, temperature=temperature).answer, *NEXT]
    return Conversation(engine, log, turn(engine, kind, log, way, temperature=temperature))


def put_down(kind, folder, way="chain", *, temperature=WARM, tenant="", include=("kv", "spec")):
    """The log after all turns but the last, with a snapshot after each."""
    engine, log = engine_of(kind), list(FIRST)
    warmth = Warmth(engine, folder)
    for _ in range(NUM_TURNS - 1):
        told = turn(engine, kind, log, way, temperature=temperature, tenant=tenant)
        log += told.answer
        kept = warmth.snapshot(log, tenant, include)
        log += NEXT
    return log, kept


def check(engine, kind):
    """No block is lost or held."""
    managers = [engine.manager]
    if kind in WITH_ROWS:
        managers.append(drafter_of(engine, kind).manager)
    for manager in managers:
        manager.check_integrity([])
        assert manager.num_used == 0


@pytest.mark.parametrize(
    ("way", "temperature"),
    [("chain", WARM), ("tree", 0.0), pytest.param("chain", 0.0, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_conversation_is_drafted_for_as_one_that_went_on(
    tmp_path, kind, way, temperature
):
    """Draft by draft, token by token; and neither target nor head runs a row that it has."""
    _, log, warm = uninterrupted(kind, way, temperature)
    kept = put_down(kind, tmp_path, way, temperature=temperature)
    assert kept[0] == log
    engine = engine_of(kind)
    report = Warmth(engine, tmp_path).restore(log)
    check(engine, kind)
    resumed = turn(engine, kind, log, way, temperature=temperature)
    assert resumed == warm
    assert report.kv_tokens == kept[1].kv_tokens == warm.num_cached > 70
    ready = report.drafters[KINDS[kind].drafter.name]
    assert ready.warmth == "R2"
    assert ready.reason == ""
    assert report.kv_tokens - SIZE <= ready.ready_upto <= report.kv_tokens + SIZE
    assert not report.is_half_warm
    cold = turn(engine_of(kind), kind, log, way, temperature=temperature)
    assert (cold.answer, cold.drafts, cold.num_cached) == (warm.answer, warm.drafts, 0)
    assert cold.num_rows - resumed.num_rows == report.kv_tokens
    if kind in WITH_ROWS:
        assert drafter_of(engine, kind).num_cold_starts == 0
        assert cold.num_head_rows - resumed.num_head_rows >= report.kv_tokens - SIZE
    off = turn(engine_of(kind), kind, log, way, temperature=temperature, is_plain=True)
    assert off.answer == warm.answer
    assert warm.num_accepted > 0
    check(engine, kind)


@pytest.mark.parametrize("kind", WITH_ROWS)
@pytest.mark.parametrize("is_run_again", [True, False])
def test_target_kv_without_the_heads_is_half_warm(tmp_path, monkeypatch, kind, is_run_again):
    """Its features are gone: the target has to say them again, or drafts begin without a past."""
    log, _ = put_down(kind, tmp_path, include=("kv",))
    warm = uninterrupted(kind, "chain", WARM).last
    if not is_run_again:
        monkeypatch.setattr("outrider.draft.head_drafter.MAX_RERUN", 0)
    engine = engine_of(kind)
    report = Warmth(engine, tmp_path).restore(log)
    assert report.is_half_warm
    assert report.drafters[KINDS[kind].drafter.name] == ("R2", 0, NOT_KEPT)
    told = turn(engine, kind, log)
    assert told.answer == warm.answer
    assert (told.drafts == warm.drafts) == is_run_again
    assert (told.num_cached < warm.num_cached) == is_run_again
    assert (drafter_of(engine, kind).num_cold_starts > 0) != is_run_again


@pytest.mark.parametrize("kind", WITHOUT)
def test_who_keeps_no_kv_is_as_warm_as_the_target(tmp_path, kind):
    log, _ = put_down(kind, tmp_path, include=("kv",))
    engine = engine_of(kind)
    report = Warmth(engine, tmp_path).restore(log)
    assert report.drafters[KINDS[kind].drafter.name] == ("R2", report.kv_tokens, "")
    assert not report.is_half_warm
    assert turn(engine, kind, log) == uninterrupted(kind, "chain", WARM).last


@pytest.mark.parametrize("kind", ["eagle3", "mtp", "dflash"])
def test_rows_of_another_head_or_of_another_target_are_not_taken(tmp_path, kind):
    log, _ = put_down(kind, tmp_path)
    name = KINDS[kind].drafter.name
    other = head(kind)
    trained = {key: tensor.clone() for key, tensor in other.tensors.items()}
    next(iter(trained.values()))[0] += 1e-3
    pinned = replace(other.spec.conventions, norm_before_residual=True)
    heads = {
        "weights": other._replace(tensors=trained),
        "convention": other._replace(spec=replace(other.spec, conventions=pinned)),
    }
    for made in heads.values():
        report = Warmth(engine_of(kind, head=made), tmp_path).restore(log)
        assert report.kv_tokens > 0
        assert report.drafters[name].ready_upto == 0
        assert report.drafters[name].reason.startswith("weights was ")
    moved = other._replace(spec=replace(other.spec, source="elsewhere", assumed=frozenset("a")))
    report = Warmth(engine_of(kind, head=moved), tmp_path).restore(log)
    assert report.drafters[name].ready_upto > 0, "where it lies makes no other head of it"
    engine = engine_of(kind)
    network = engine.runner.network
    spec = network.spec
    try:
        network.spec = replace(spec, fingerprint="another")
        report = Warmth(engine, tmp_path).restore(log)
    finally:
        network.spec = spec
    assert (report.kv_tokens, report.drafters[name].ready_upto) == (0, 0)
    assert report.drafters[name].reason == "target was loud and is another"


@pytest.mark.parametrize("kind", ["eagle1", "dspark"])
def test_tenants_share_no_rows(tmp_path, kind):
    log, _ = put_down(kind, tmp_path, tenant="acme")
    engine = engine_of(kind)
    warmth = Warmth(engine, tmp_path)
    assert warmth.restore(log, "other").kv_tokens == 0
    assert warmth.state(log, "other").drafters[KINDS[kind].drafter.name].ready_upto == 0
    assert warmth.restore(log, "acme").drafters[KINDS[kind].drafter.name].ready_upto > 70
    assert turn(engine, kind, log, tenant="other").num_cached == 0


@pytest.mark.parametrize("kind", WITH_ROWS)
def test_rows_that_are_distrusted_are_computed_anew_in_their_place(tmp_path, monkeypatch, kind):
    """From the target's states, in a pass that leaves no KV of the target behind."""
    monkeypatch.setattr("outrider.engine.warmth.MAX_REBUILD_TOKENS", 24)
    log, _ = put_down(kind, tmp_path)
    engine = engine_of(kind)
    warmth = Warmth(engine, tmp_path)
    warmth.restore(log)
    drafter, name = drafter_of(engine, kind), KINDS[kind].drafter.name
    right = [part.clone() for layer in drafter.runner.pool.layers for part in layer]
    for layer in drafter.runner.pool.layers:
        for part in layer:
            part.normal_(generator=torch.Generator().manual_seed(1))
    assert warmth.owners(name) == (name,)
    num_wrong, done = warmth.distrust(name, log), 0
    while done < num_wrong:
        upto = warmth.rebuild(name, log, start=done)
        assert upto == min(done + 24, num_wrong)
        done = upto
    check(engine, kind)
    blocks = drafter.manager.open(log[1:], f"\0{log[0]}")[0]
    slots = torch.tensor(blocks.slots(0, num_wrong))
    found = [part for layer in drafter.runner.pool.layers for part in layer]
    slots = slots[kind == "mtp of two" :]  # whose second module has no first row
    for mine, was in zip(found, right, strict=True):
        torch.testing.assert_close(mine[slots], was[slots], atol=1e-5, rtol=1e-4)
    drafter.manager.free(blocks)
    assert turn(engine, kind, log) == uninterrupted(kind, "chain", WARM).last


def test_rows_are_not_computed_anew_over_a_target_that_is_gone(tmp_path, monkeypatch):
    """A pass over all of a long log is what a request is for."""
    log, _ = put_down("eagle3", tmp_path)
    engine = engine_of("eagle3")
    warmth = Warmth(engine, tmp_path)
    warmth.restore(log)
    engine.manager.reset_prefix_cache()
    monkeypatch.setattr("outrider.engine.warmth.MAX_REBUILD_TOKENS", 24)
    assert warmth.rebuild("eagle", log, start=0) == 24
    assert warmth.rebuild("eagle", log, start=24) == 48
    assert warmth.rebuild("eagle", log, start=48) == 48
    check(engine, "eagle3")
