"""Warmth: what comes back is what went, bit by bit, and whatever is wrong with it is only cold."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider import LLM, AsyncLLM, SamplingParams
from outrider.engine.warm_bundles import DAMAGED, NO_ROOM, NOT_KEPT, TOO_SHORT
from outrider.engine.warmth import Warmth
from outrider.errors import ConfigError, EngineError, RequestError
from outrider.request import Request, SpeculationParams
from outrider.session.canary import History, Tries, judge
from outrider.session.snapshot import Manifest, head_of
from outrider.testing import ByteTokenizer, events, run, tiny_decoder, tiny_engine
from tests.draft.test_translate import twins
from tests.draft.vocabularies import TEXT
from tests.engine.tiny_checkpoint import write_checkpoint

OFF = SpeculationParams(method="off")
K4 = SpeculationParams(method="draft_model", num_draft_tokens=4)
PROMPT = [(11 * j * j + 7 * j) % 200 + 20 for j in range(33)]
NEXT = [44, 91, 45, 160, 23]
SIZE = 4


def make_engine(name="model", draft="draft", **more):
    """An engine whose models have names of their own, as loaded ones do."""
    more.setdefault("draft_noise", 0.004)
    engine = tiny_engine(**more)
    rename(engine.runner.network, name)
    if "draft_model" in engine.drafters:
        rename(engine.drafters["draft_model"].runner.network, draft)
    return engine


def rename(network, fingerprint):
    network.spec = replace(network.spec, fingerprint=fingerprint)


def ask(tokens, *, temperature=0.0, speculation=K4, tenant="", max_tokens=40, name="r"):
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True)
    return Request(
        id=name,
        prompt_token_ids=tuple(tokens),
        sampling=sampling,
        speculation=speculation,
        seed=17,
        tenant=tenant,
    )


def serve(engine, tokens, **more):
    """The answer, its metrics, and (drafted, accepted) of each step."""
    ((told),) = events(engine, [ask(tokens, **more)]).values()
    steps = [(event.num_drafted, event.num_accepted) for event in told]
    return [t for event in told for t in event.token_ids], told[-1].metrics, steps


def first_turn(engine, **more):
    """The token log after one turn and the beginning of the next."""
    answer, _, _ = serve(engine, PROMPT, **more)
    return [*PROMPT, *answer, *NEXT]


def whole(tokens):
    """What a request over these tokens can hit at most."""
    return (len(tokens) - 1) // SIZE * SIZE


@contextlib.contextmanager
def rows_of(runner):
    """Counts the rows that a runner is given."""
    counted, run_pieces = [], runner.run

    def counting(pieces):
        counted.extend(len(piece.chain) + len(piece.tree) for piece in pieces)
        return run_pieces(pieces)

    runner.run = counting
    yield counted
    del runner.run


def draft_of(engine):
    return engine.drafters["draft_model"]


def check(engine):
    """No block is lost or held, in any pool, once nothing runs."""
    assert not engine.has_work()
    for manager in (engine.manager, draft_of(engine).manager):
        manager.check_integrity([])
        assert manager.num_used == 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("place", ["disk", "host"])
def test_a_restored_log_goes_on_as_if_nothing_had_happened(tmp_path, temperature, place):
    folder = tmp_path if place == "disk" else None
    engine = make_engine()
    log = first_turn(engine, temperature=temperature)
    warmth = Warmth(engine, folder)
    kept = warmth.snapshot(log)
    undisturbed = serve(engine, log, temperature=temperature)
    if place == "disk":  # a restart
        engine = make_engine()
        warmth = Warmth(engine, folder)
    else:
        forget_all(engine)
    report = warmth.restore(log)
    check(engine)
    assert report.kv_tokens == report.kv_restored == kept.kv_tokens == whole(log) - SIZE
    assert (report.restored_from, report.cold_reason) == (place, "")
    assert not report.is_half_warm
    answer, metrics, steps = serve(engine, log, temperature=temperature)
    assert metrics.num_cached_tokens == report.kv_tokens
    assert (answer, steps) == (undisturbed[0], undisturbed[2])
    fresh, fresh_metrics, _ = serve(make_engine(), log, temperature=temperature, speculation=OFF)
    assert fresh_metrics.num_cached_tokens == 0
    assert answer == fresh
    check(engine)


def forget_all(engine):
    for manager in (engine.manager, draft_of(engine).manager):
        manager.reset_prefix_cache()


def test_the_draft_model_does_not_prefill_again(tmp_path):
    engine = make_engine()
    log = first_turn(engine)
    Warmth(engine, tmp_path).snapshot(log)
    with rows_of(draft_of(engine).runner) as warm:
        serve(engine, log)
    restored = make_engine()
    report = Warmth(restored, tmp_path).restore(log)
    with rows_of(draft_of(restored).runner) as rows:
        serve(restored, log)
    cold_engine = make_engine()
    with rows_of(draft_of(cold_engine).runner) as cold:
        serve(cold_engine, log)
    ready = report.drafters["draft_model"].ready_upto
    assert rows == warm
    assert sum(cold) - sum(rows) == ready
    assert rows[0] == len(log) - ready
    assert ready >= report.kv_tokens - SIZE > 60


def test_target_and_draft_kv_are_the_same_bits(tmp_path):
    engine = make_engine()
    log = first_turn(engine)
    Warmth(engine, tmp_path).snapshot(log)
    other = make_engine()
    other.manager.open([1])  # so that blocks have other numbers
    Warmth(other, tmp_path).restore(log)
    for a, b in ((engine, other), (draft_of(engine), draft_of(other))):
        for mine, theirs in zip(kv_of(a, log), kv_of(b, log), strict=True):
            assert torch.equal(mine, theirs)


def kv_of(owner, log):
    table, num_cached = owner.manager.open(log)
    slots = torch.tensor(table.slots(0, num_cached))
    found = [part[slots] for layer in owner.runner.pool.layers for part in layer]
    owner.manager.free(table)
    return found


SESSION = """
import sys
from pathlib import Path
from outrider import LLM, SamplingParams
from outrider.engine.warmth import Warmth
target, draft, folder = sys.argv[1:]
llm = LLM(target, draft_model=draft, policy="fixed")
log = list(range(20, 70))
log += llm.generate([log], SamplingParams(max_tokens=20, ignore_eos=True))[0].token_ids
kept = Warmth(llm.engine, Path(folder), tokenizer=llm.tokenizer).snapshot(log)
print(kept.kv_tokens, *log)
"""


@pytest.mark.slow
def test_another_process_takes_over(tmp_path):
    target = write_checkpoint(tmp_path / "target")
    draft = write_checkpoint(tmp_path / "draft", num_hidden_layers=1)
    command = [sys.executable, "-c", SESSION, str(target), str(draft), str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    kept, *log = map(int, done.stdout.split())
    llm = LLM(target, draft_model=draft, policy="fixed")
    report = Warmth(llm.engine, tmp_path / "kept", tokenizer=llm.tokenizer).restore(log)
    assert report.kv_tokens == kept > 0
    assert report.drafters["draft_model"].ready_upto > 0
    sampling = SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True)
    (answer,) = llm.generate([log], sampling)
    assert answer.metrics.num_cached_tokens == kept
    (fresh,) = LLM(target, draft_model="off").generate([log], sampling)
    assert answer.token_ids == fresh.token_ids


def snapshot_in(folder, tenant=""):
    engine = make_engine()
    log = first_turn(engine, tenant=tenant)
    Warmth(engine, folder).snapshot(log, tenant)
    return log


@pytest.mark.parametrize("harm", ["flip", "cut", "unlink"])
@pytest.mark.parametrize("part", ["target", "draft_model"])
def test_a_damaged_bundle_is_cold_and_no_wrong_kv(tmp_path, monkeypatch, harm, part):
    monkeypatch.setattr("outrider.engine.warm_bundles.RUN_BLOCKS", 4)
    log = snapshot_in(tmp_path)
    engine = make_engine()
    warmth = Warmth(engine, tmp_path)
    mine = sorted((b for b in warmth.bundles if b.fingerprint.part == part), key=lambda b: b.start)
    path = tmp_path / mine[2].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "unlink":
        path.unlink()
    else:
        path.write_bytes(data if harm == "flip" else data[: len(data) // 2])
    report = warmth.restore(log)
    check(engine)
    reasons = {"target": report.cold_reason, "draft_model": report.drafters["draft_model"].reason}
    ready = {
        "target": report.kv_tokens,
        "draft_model": report.drafters["draft_model"].ready_upto,
    }
    assert ready.pop(part) == mine[2].start == 32, "as far as it is whole"
    assert reasons.pop(part) == DAMAGED
    assert set(reasons.values()) == {""}
    assert min(ready.values()) > 60
    assert report.is_half_warm == (part == "draft_model")
    answer, metrics, _ = serve(engine, log)
    assert metrics.num_cached_tokens == report.kv_tokens
    assert answer == serve(make_engine(), log, speculation=OFF)[0]
    Warmth(engine, tmp_path).snapshot(log)
    again = make_engine()
    assert Warmth(again, tmp_path).restore(log).cold_reason == "", "stored anew"


def other_dtype():
    engine = make_engine()
    network = engine.runner.network
    network.spec = replace(network.spec, dtype=torch.bfloat16)
    return engine


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_engine(name="other"), "weights was model and is other"),
        (other_dtype, "dtype was float32 and is bfloat16"),
        (lambda: make_engine(block_size=8), "block_size was 4 and is 8"),
        (
            lambda: make_engine(target=tiny_decoder(num_key_value_heads=1)),
            "kv_shapes was [(2, 8, 8), (2, 8, 8)] and is [(1, 8, 8), (1, 8, 8)]",
        ),
        (lambda: make_engine(name=""), "weights was model and is of this process"),
    ],
    ids=["weights", "dtype", "block size", "shapes", "unnamed"],
)
def test_another_engine_is_cold_and_says_why(tmp_path, make, reason):
    log = snapshot_in(tmp_path)
    engine = make()
    warmth = Warmth(engine, tmp_path)
    assert warmth.fingerprint != Warmth(make_engine()).fingerprint
    report = warmth.restore(log)
    assert (report.kv_tokens, report.kv_restored, report.restored_from) == (0, 0, "")
    assert report.cold_reason.startswith(reason)
    assert warmth.num_cold == 1
    assert engine.manager.num_used == 0


def test_another_tokenizer_is_cold(tmp_path):
    log = snapshot_in(tmp_path)
    report = Warmth(make_engine(), tmp_path, tokenizer=ByteTokenizer()).restore(log)
    assert report.cold_reason == "tokenizer was  and is bytes"


def test_another_draft_model_is_cold_alone(tmp_path):
    log = snapshot_in(tmp_path)
    engine = make_engine(draft="other")
    report = Warmth(engine, tmp_path).restore(log)
    assert report.kv_tokens > 60
    assert report.drafters["draft_model"] == ("R1", 0, "weights was draft and is other")
    assert report.is_half_warm
    assert serve(engine, log)[0] == serve(make_engine(), log, speculation=OFF)[0]


def test_networks_without_a_name_are_known_in_their_own_process_only(tmp_path):
    engine = make_engine(name="", draft="")
    log = first_turn(engine)
    warmth = Warmth(engine, tmp_path)
    warmth.snapshot(log)
    forget_all(engine)
    assert warmth.restore(log).kv_tokens > 60
    assert Warmth(make_engine(name="", draft=""), tmp_path).restore(log).kv_tokens == 0


def test_kv_without_speculation_is_half_warm_and_counted(tmp_path):
    engine = make_engine()
    log = first_turn(engine)
    kept = Warmth(engine, tmp_path).snapshot(log, include=("kv",))
    assert set(kept.parts) == {"target"}
    warmth = Warmth(make_engine(), tmp_path)
    report = warmth.restore(log)
    assert report.is_half_warm
    assert report.drafters["draft_model"] == ("R1", 0, NOT_KEPT)
    assert report.drafters["ngram"] == ("R0", len(log), "")
    assert (warmth.num_restores, warmth.num_cold, warmth.num_half_warm) == (1, 0, 1)


def test_what_is_asked_for_is_kept_and_nothing_else(tmp_path):
    engine = make_engine()
    log = first_turn(engine)
    warmth = Warmth(engine, tmp_path)
    assert set(warmth.snapshot(log, include=("spec",)).parts) == {"draft_model"}
    assert warmth.snapshot(log, include=("stats",), statistics={"a": 1}).statistics == {"a": 1}
    assert warmth.snapshot(log, include=("kv",), statistics={"a": 1}).statistics == {}
    with pytest.raises(RequestError, match="unknown part of a snapshot 'kvs'; did you mean 'kv'"):
        warmth.snapshot(log, include=("kvs",))
    with pytest.raises(ConfigError, match="max_bytes=0"):
        Warmth(engine, max_bytes=0)


def test_a_second_turn_writes_only_what_is_new(tmp_path):
    engine = make_engine()
    log = first_turn(engine)
    warmth = Warmth(engine, tmp_path)
    first = warmth.snapshot(log)
    assert warmth.snapshot(log).num_bytes == 0
    longer = [*log, *serve(engine, log)[0]]
    second = warmth.snapshot(longer)
    assert first.kv_tokens < second.kv_tokens == whole(longer)
    assert second.bundles > first.bundles
    num_new = second.kv_tokens - first.kv_tokens
    per_token = sum(
        layer.keys[0].nbytes + layer.values[0].nbytes for layer in engine.runner.pool.layers
    )
    assert second.parts["target"].num_bytes - num_new * per_token < 1000
    other = make_engine()
    assert Warmth(other, tmp_path).restore(longer).kv_tokens == second.kv_tokens
    assert Manifest.from_dict(second.as_dict()) == second


def test_restoring_twice_restores_once(tmp_path):
    log = snapshot_in(tmp_path)
    engine = make_engine()
    warmth = Warmth(engine, tmp_path)
    first, second = warmth.restore(log), warmth.restore(log)
    assert second.kv_tokens == first.kv_tokens
    assert (second.kv_restored, second.restored_from, second.cold_reason) == (0, "", "")
    check(engine)


def test_forks_share_their_beginning(tmp_path):
    engine = make_engine()
    log = first_turn(engine)
    warmth = Warmth(engine, tmp_path)
    warmth.snapshot(log)
    fork = [*log[:50], 7, 8, 9, 10, 11, 12]
    fork += serve(engine, fork)[0]
    kept = warmth.snapshot(fork)
    (reused,) = {*kept.parts["target"].bundles} & {*warmth.snapshot(log).parts["target"].bundles}
    other = make_engine()
    warmth = Warmth(other, tmp_path)
    assert warmth.restore(fork).kv_tokens == kept.kv_tokens
    resident = warmth.state(log).kv_tokens
    assert resident == 48, "the common beginning, and none of the other branch"
    report = warmth.restore(log)
    assert report.kv_restored == report.kv_tokens - 48 > 0
    check(other)
    for tokens in (log, fork):
        assert serve(other, tokens)[0] == serve(make_engine(), tokens, speculation=OFF)[0]
    assert reused in warmth.bundles


def test_a_rewound_log_takes_what_it_still_shares(tmp_path):
    log = snapshot_in(tmp_path)
    engine = make_engine()
    rewound = log[:41]
    report = Warmth(engine, tmp_path).restore(rewound)
    assert report.kv_tokens == 40
    answer, metrics, _ = serve(engine, rewound)
    assert metrics.num_cached_tokens == 40
    assert answer == serve(make_engine(), rewound, speculation=OFF)[0]


def test_tenants_share_nothing(tmp_path):
    log = snapshot_in(tmp_path, tenant="acme")
    engine = make_engine()
    warmth = Warmth(engine, tmp_path)
    for tenant in ("", "other"):
        report = warmth.restore(log, tenant)
        assert (report.kv_tokens, report.cold_reason) == (0, NOT_KEPT)
        assert warmth.state(log, tenant).tiers == {"device": 0, "disk": 0}
        assert warmth.forget(log, tenant) == 0
    assert warmth.restore(log, "acme").kv_tokens > 60
    assert serve(engine, log, tenant="other")[1].num_cached_tokens == 0
    assert serve(engine, log, tenant="acme")[1].num_cached_tokens > 60


def test_a_short_or_unknown_log_is_cold():
    warmth = Warmth(make_engine())
    assert warmth.restore([5, 6]).cold_reason == TOO_SHORT
    assert warmth.restore([]).cold_reason == TOO_SHORT
    assert warmth.restore(PROMPT).cold_reason == NOT_KEPT
    assert warmth.snapshot([]).kv_tokens == 0
    assert warmth.snapshot(PROMPT).kv_tokens == 0


def test_without_prefix_caching_all_is_cold(tmp_path):
    log = snapshot_in(tmp_path)
    engine = make_engine(options={"enable_prefix_caching": False})
    report = Warmth(engine, tmp_path).restore(log)
    assert (report.kv_tokens, report.cold_reason) == (0, "enable_prefix_caching is off")


def test_under_pressure_only_what_nobody_uses_gives_way(tmp_path):
    log = snapshot_in(tmp_path)
    engine = make_engine(num_blocks=40, options={"max_model_len": 160})
    others = [ask([100 + i, *PROMPT[:15]], name=f"o{i}", max_tokens=60) for i in range(2)]
    alone = [run(make_engine(), [other])[other.id, 0] for other in others]
    for other in others:
        engine.add(other)
    answers = {other.id: [] for other in others}
    warmth, reasons = Warmth(engine, tmp_path), set()
    while engine.has_work():
        for event in engine.step():
            answers[event.request_id] += event.token_ids
        report = warmth.restore(log)
        reasons.add(report.cold_reason)
        assert report.kv_tokens == engine.manager.match(log)
        engine.check_integrity()
    assert list(answers.values()) == alone, "those who ran did not notice"
    assert reasons == {"", NO_ROOM}
    check(engine)


def test_restored_blocks_are_evicted_like_any(tmp_path):
    log = snapshot_in(tmp_path)
    engine = make_engine(num_blocks=24, options={"max_model_len": 96})
    warmth = Warmth(engine, tmp_path)
    assert warmth.restore(log).kv_tokens > 60
    other = serve(engine, [9, *PROMPT], max_tokens=50)[0]
    assert other == serve(make_engine(), [9, *PROMPT], max_tokens=50, speculation=OFF)[0]
    assert warmth.state(log).kv_tokens < 60
    assert warmth.restore(log).kv_tokens > 60
    assert serve(engine, log, max_tokens=10)[0] == serve(make_engine(), log, max_tokens=10)[0]
    check(engine)


def test_what_runs_can_be_kept(tmp_path):
    engine = make_engine()
    engine.add(ask(PROMPT))
    for _ in range(6):
        engine.step()
    ((seq,),) = engine._groups.values()
    log = list(seq.tokens)
    kept = Warmth(engine, tmp_path).snapshot(log)
    assert kept.kv_tokens == whole(log)
    other = make_engine()
    assert Warmth(other, tmp_path).restore(log).kv_tokens == kept.kv_tokens
    assert serve(other, log)[0] == serve(make_engine(), log, speculation=OFF)[0]


def test_a_budget_too_small_keeps_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr("outrider.engine.warm_bundles.RUN_BLOCKS", 4)
    engine = make_engine()
    log = first_turn(engine)
    kept = Warmth(engine, tmp_path, max_bytes=12_000).snapshot(log, include=("kv",))
    assert 0 < kept.kv_tokens < whole(log) - SIZE
    assert "no room" in kept.parts["target"].reason
    report = Warmth(make_engine(), tmp_path).restore(log)
    assert report.kv_tokens == kept.kv_tokens


def test_a_disk_that_refuses_is_no_error(tmp_path, monkeypatch, caplog):
    engine = make_engine()
    log = first_turn(engine)
    warmth = Warmth(engine, tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("outrider.session.files.os.fsync", full)
    kept = warmth.snapshot(log)
    assert kept.kv_tokens == 0
    assert "cannot be written" in kept.parts["target"].reason
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_state_tells_where_what_is(tmp_path):
    engine = make_engine(drafters=["early_exit", "cascade"])
    warmth = Warmth(engine, tmp_path)
    log = first_turn(engine)
    state = warmth.state(log)
    there = whole(log) - SIZE
    assert state.tiers == {"device": there, "disk": 0}
    assert state.kv_tokens == there
    assert set(state.drafters) == {"ngram", "draft_model", "early_exit"}
    assert state.drafters["ngram"] == ("R0", len(log), "")
    assert state.drafters["early_exit"] == ("R1", there, ""), "it reads the target's KV"
    assert there - SIZE <= state.drafters["draft_model"].ready_upto <= there
    kept = warmth.snapshot(log)
    assert kept.watermarks == {name: r.ready_upto for name, r in state.drafters.items()}
    assert warmth.state(log).tiers == {"device": there, "disk": there}
    forget_all(engine)
    assert warmth.state(log).tiers == {"device": 0, "disk": there}
    assert warmth.state(log).drafters["early_exit"].ready_upto == 0


def test_statistics_come_back_with_the_models_that_made_them(tmp_path):
    engine = make_engine()
    log = first_turn(engine)
    warmth = Warmth(engine, tmp_path)
    warmth.snapshot(log[:50], statistics={"draft_model": {"accepted": [3, 1]}})
    warmth.snapshot(log)
    assert Warmth(make_engine(), tmp_path).restore(log).statistics == {
        "draft_model": {"accepted": [3, 1]}
    }
    assert Warmth(make_engine(draft="other"), tmp_path).restore(log).statistics == {}


def test_forgetting_leaves_what_another_log_needs(tmp_path):
    engine = make_engine()
    log = first_turn(engine)
    warmth = Warmth(engine, tmp_path)
    warmth.snapshot(log)
    fork = [*log, *serve(engine, [*log, 7])[0]]
    longer = [*log, *serve(engine, log)[0]]
    for tokens in (fork, longer):
        warmth.snapshot(tokens)
    assert warmth.forget(longer) > 0
    assert warmth.state(longer).tiers["disk"] == warmth.state(log).tiers["disk"] > 60
    assert warmth.forget(fork) > 0
    assert (len(warmth.bundles), len(warmth.snapshots)) == (0, 0)
    assert list(tmp_path.iterdir()) == []


def test_forgetting_a_branch_leaves_the_bundles_that_others_begin_with(tmp_path):
    engine = make_engine()
    log = first_turn(engine)
    warmth = Warmth(engine, tmp_path)
    num_kept = warmth.snapshot(log).kv_tokens
    longer = [*log, *serve(engine, log)[0]]
    warmth.snapshot(longer)
    warmth.snapshots.drop(head_of(log, ""))  # as the oldest of too many would be
    assert warmth.forget(longer, num_shared=len(log)) > 0
    assert warmth.state(longer).tiers["disk"] == num_kept > 60
    assert warmth.forget(log) > 0
    assert len(warmth.bundles) == 0


def test_what_recycle_learnt_of_a_tenant_comes_back(tmp_path):
    engine = make_engine(drafters=["recycle"])
    recycle = SpeculationParams(method="recycle")
    log = first_turn(engine, speculation=recycle, tenant="acme")
    Warmth(engine, tmp_path).snapshot(log, "acme")
    other = make_engine(drafters=["recycle"])
    warmth = Warmth(other, tmp_path)
    warmth.restore(log, "other")
    assert (other.drafters["recycle"].successors("other") == -1).all()
    warmth.restore(log, "acme")
    mine, theirs = (e.drafters["recycle"].tables["acme"] for e in (engine, other))
    assert (mine == theirs).all()
    assert (mine != -1).any()
    theirs[log[0]] = 1
    warmth.restore(log, "acme")
    assert (theirs[log[0]] == 1).all(), "what was learnt since is kept"
    warm = serve(engine, log, speculation=recycle, tenant="acme")
    again = make_engine(drafters=["recycle"])
    Warmth(again, tmp_path).restore(log, "acme")
    assert serve(again, log, speculation=recycle, tenant="acme")[::2] == warm[::2]
    foreign = make_engine(name="other", drafters=["recycle"])
    Warmth(foreign, tmp_path).restore(log, "acme")
    assert "acme" not in foreign.drafters["recycle"].tables


def test_a_table_of_another_shape_is_ignored():
    recycle = make_engine(drafters=["recycle"]).drafters["recycle"]
    ids = torch.tensor([1, 2], dtype=torch.int32)
    rows = torch.zeros(2, 8, dtype=torch.int32)
    assert recycle.take_shared("a", {"ids": ids, "successors": rows}) == 2
    for wrong in (
        {},
        {"ids": ids},
        {"ids": ids, "successors": rows[:, :4]},
        {"ids": ids, "successors": rows + 256},
        {"ids": ids + 254, "successors": rows},
        {"ids": ids - 2, "successors": rows},
        {"ids": ids.long(), "successors": rows},
        {"ids": ids[:0], "successors": rows[:0]},
    ):
        assert recycle.take_shared("b", wrong) == 0
    assert "b" not in recycle.tables


def test_suffix_reads_past_answers_once(tmp_path):
    engine = make_engine(drafters=["suffix"])
    suffix = SpeculationParams(method="suffix", drafter_options={"shared": "tenant"})
    log = first_turn(engine, speculation=suffix, tenant="acme")
    start, stop = len(PROMPT), len(log) - len(NEXT)
    other = make_engine(drafters=["suffix"])
    warmth = Warmth(other)
    for _ in range(3):
        warmth.restore(log, "acme", [(start, stop)])
    drafter = other.drafters["suffix"]
    assert drafter._shared["acme"].num_tokens == stop - start
    assert engine.drafters["suffix"].remember("acme", log[start:stop]) == 0, "it is known there"
    warm = serve(engine, PROMPT, speculation=suffix, tenant="acme")
    again = serve(other, PROMPT, speculation=suffix, tenant="acme")
    assert again[::2] == warm[::2]
    assert warm[1].acceptance_length > 2, "the answer is looked up"
    assert serve(make_engine(drafters=["suffix"]), PROMPT, speculation=suffix)[2] != warm[2]
    assert drafter.remember("other", log[start:stop]) == stop - start, "tenants share nothing"


def session(engine, warmth, *, num_turns=4, restart=None):
    """Tries of each turn of one session; before the last one `restart(log)` may change engines."""
    log, found = list(PROMPT[:20]), []
    for turn in range(num_turns + 1):
        if turn == num_turns and restart is not None:
            engine = restart(log)
        answer, _, steps = serve(engine, log, max_tokens=40)
        log += [*answer, *NEXT[:4]]
        found.append(Tries.of_steps([step for step in steps if step[0]]))
        if warmth is not None:
            warmth.snapshot(log)
    return found


def test_acceptance_after_a_restore_is_what_it_was(tmp_path):
    warm = session(make_engine(), None)

    def restart(log):
        other = make_engine()
        Warmth(other, tmp_path).restore(log)
        return other

    engine = make_engine()
    restored = session(engine, Warmth(engine, tmp_path), restart=restart)
    assert restored == warm, "token by token, so in distribution too"
    assert not judge(History.of(restored[:-1]), restored[-1]).is_worse
    assert restored[-1].rate > 0.5


def test_the_canary_sees_wrong_draft_kv(tmp_path):
    """Random KV in place of the restored: the output stands, and nothing but acceptance tells."""

    def restart(log):
        other = make_engine()
        Warmth(other, tmp_path).restore(log)
        for layer in draft_of(other).runner.pool.layers:
            layer.keys.normal_(generator=torch.Generator().manual_seed(1))
            layer.values.normal_(generator=torch.Generator().manual_seed(2))
        assert serve(other, log)[0] == serve(make_engine(), log, speculation=OFF)[0]
        return other

    engine = make_engine()
    found = session(engine, Warmth(engine, tmp_path), restart=restart)
    verdict = judge(History.of(found[:-1]), found[-1])
    assert verdict.is_worse, verdict


@pytest.fixture
async def served(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    served = AsyncLLM(LLM(folder, draft_model="off", check_integrity=True))
    yield served
    await served.aclose()


async def test_calls_run_between_steps(served, tmp_path):
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    prompt = list(range(20, 60))
    llm = served._llm
    in_step, step = [], llm.engine.step

    def noting():
        in_step.append(True)
        try:
            return step()
        finally:
            in_step.clear()

    llm.engine.step = noting
    warmth = Warmth(llm.engine, tmp_path / "kept")
    kept = 0
    async for _ in served.generate(prompt, sampling):
        assert await served.call(lambda: list(in_step)) == []
        kept = (await served.call(warmth.snapshot, prompt)).kv_tokens
    assert kept == 32
    await served.call(llm.engine.manager.reset_prefix_cache)
    assert (await served.call(warmth.restore, prompt)).kv_tokens == 32


async def test_a_call_that_fails_harms_nobody(served):
    with pytest.raises(ZeroDivisionError):
        await served.call(lambda: 1 / 0)
    assert await served.call(sum, [1, 2]) == 3
    await served.aclose()
    with pytest.raises(EngineError, match="closed"):
        await served.call(sum, [1, 2])


async def test_a_call_may_leave_work(served):
    engine = served._llm.engine
    await served.call(engine.add, ask([5, 6], speculation=SpeculationParams(), max_tokens=3))
    while await served.call(engine.has_work):
        pass
    assert engine.stats.num_generated_tokens == 3


def test_the_folder_is_made_where_it_is_missing(tmp_path):
    Warmth(make_engine(), Path(tmp_path) / "state" / "kept")
    assert (tmp_path / "state" / "kept").is_dir()


def translating(folder=None):
    """A pair of two vocabularies, known by name, and what keeps its warmth."""
    engine = twins(max_model_len=250)
    for index, runner in enumerate((engine.runner, engine.drafters["translate"].runner)):
        rename(runner.network, f"model {index}")
    return engine, Warmth(engine, folder)


@pytest.mark.parametrize("way", ["tokens", "strings"])
def test_a_translating_draft_model_comes_back_too(tmp_path, monkeypatch, way):
    """Its KV is of its own ids; `auto` is what a session asks for, so by that it is kept."""
    engine, warmth = translating(tmp_path)
    usual = engine.drafters["translate"].ways
    monkeypatch.setitem(usual, "auto", usual[way])
    speculation = SpeculationParams(method="translate")
    prompt = usual["strings"].target.tokenizer.encode(TEXT * 3)[:150]
    log = [*prompt, *serve(engine, prompt, speculation=speculation)[0]]
    kept = warmth.snapshot(log)
    num_kept = kept.parts["translate"].num_tokens
    assert num_kept > (150 if way == "tokens" else 60), "text settles some way behind its end"
    other, restored = translating(tmp_path)
    ways = other.drafters["translate"].ways
    monkeypatch.setitem(ways, "auto", ways[way])
    report = restored.restore(log)
    ready = report.drafters["translate"]
    assert (ready.warmth, ready.reason) == ("R1", "")
    assert ready.ready_upto == kept.watermarks["translate"] == num_kept, "a letter is a token"
    assert not report.is_half_warm
    rows = {}
    for name, each in (("warm", engine), ("restored", other), ("cold", translating()[0])):
        if name == "cold":
            ways = each.drafters["translate"].ways
            monkeypatch.setitem(ways, "auto", ways[way])
        with rows_of(each.drafters["translate"].runner) as counted:
            rows[name] = serve(each, log, speculation=speculation, max_tokens=20), sum(counted)
    assert rows["restored"] == rows["warm"], "nothing is computed twice"
    assert rows["cold"][0][0] == rows["warm"][0][0]
    assert rows["cold"][1] - rows["warm"][1] >= num_kept - 2 * SIZE


def test_the_kv_of_a_translating_pair_without_its_drafter_is_half_warm(tmp_path):
    engine, warmth = translating(tmp_path)
    drafter = engine.drafters["translate"]
    prompt = drafter.ways["strings"].target.tokenizer.encode(TEXT * 3)[:150]
    serve(engine, prompt, speculation=SpeculationParams(method="translate"))
    warmth.snapshot(prompt, include=("kv",))
    report = translating(tmp_path)[1].restore(prompt)
    assert report.kv_tokens > 100
    assert report.drafters["translate"] == ("R1", 0, NOT_KEPT)
    assert report.is_half_warm


def test_a_distrusted_drafter_is_computed_anew_in_its_place(tmp_path, monkeypatch):
    """Noise in its KV is gone afterwards, bit by bit up to how kernels round; bundles too."""
    monkeypatch.setattr("outrider.engine.warmth.MAX_REBUILD_TOKENS", 24)
    engine = make_engine()
    log = first_turn(engine)
    warmth = Warmth(engine, tmp_path)
    warmth.snapshot(log)
    right = kv_of(draft_of(engine), log)
    others = kv_of(engine, log)
    for layer in draft_of(engine).runner.pool.layers:
        layer.keys.normal_(generator=torch.Generator().manual_seed(1))
        layer.values.normal_(generator=torch.Generator().manual_seed(2))
    assert warmth.owners("draft_model") == ("draft_model",)
    assert warmth.owners("ngram") == ()
    num_wrong, done, stops = warmth.distrust("draft_model", log), 0, []
    assert num_wrong == warmth.state(log).drafters["draft_model"].ready_upto > 60
    assert {bundle.fingerprint.part for bundle in warmth.bundles} == {"target"}
    while done < num_wrong:
        done = warmth.rebuild("draft_model", log, start=done)
        stops.append(done)
    assert stops[:2] == [24, 48]
    assert done == num_wrong
    assert warmth.rebuild("draft_model", log, start=done) == done, "there is no more"
    for mine, was in zip(kv_of(draft_of(engine), log), right, strict=True):
        torch.testing.assert_close(mine, was, atol=1e-5, rtol=1e-4)
    for mine, was in zip(kv_of(engine, log), others, strict=True):
        assert torch.equal(mine, was), "the target is not touched"
    check(engine)


def test_who_composes_others_owns_what_they_own():
    warmth = Warmth(make_engine(drafters=["early_exit", "cascade"]))
    assert warmth.owners("cascade") == ("draft_model",)
    assert warmth.owners("early_exit") == (), "it reads the target's"
