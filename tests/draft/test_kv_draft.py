"""kv_draft: drafts are what the head says of the log, whatever came before."""

import pickle
from dataclasses import replace

import pytest
import torch

from outrider.draft.base import ModelParts, Surroundings
from outrider.draft.kv_draft import KVDrafter
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import ConfigError
from outrider.models.heads.kv_network import KVNetwork, KVRunner
from outrider.models.heads.spec import Head
from outrider.request import SamplingParams, SpeculationParams
from outrider.step import Row, RowPlan
from outrider.testing import ScriptedDrafter, check_drafter, junk_tree, run
from outrider.testing.tiny import ByteTokenizer, tiny_decoder, tiny_engine
from tests.draft import draft_models
from tests.draft.draft_models import kv, pooled, prefilled
from tests.models.heads.kv_heads import DRAFT_IDS, Prefilled, Twin, copied_pair, random_head

OFF = SpeculationParams(method="off")
K4 = SpeculationParams(method="kv_draft", num_draft_tokens=4)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=20, temperature=0.9, ignore_eos=True)


def request(name="r", speculation=K4, sampling=GREEDY, **more):
    return draft_models.request(name, speculation, sampling, **more)


def with_head(target, head, *, num_blocks=256, drafters=(), **options):
    """An engine of this target, its head, and other drafters."""
    runner, manager = pooled(target, num_blocks)
    drafter = KVDrafter(KVRunner(KVNetwork(head, target), runner.pool))
    config = EngineConfig(block_size=4, check_integrity=True, **{"max_num_seqs": 16, **options})
    return Engine(
        runner,
        manager,
        config,
        drafters=[drafter, *drafters],
        default_drafter="kv_draft",
        tokenizer=ByteTokenizer(),
    )


def good_head(target, seed=0, **options):
    """Random, but of the target's own opinion often enough: small sums beside x_n's embedding."""
    head = random_head(target, seed, **options)
    width = target.spec.hidden_size
    for name, tensor in head.tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= 0.1
    head.tensors["fc.weight"][:] = torch.cat((torch.zeros(width, width), torch.eye(width)), dim=1)
    return head


def note_drafts(engine):
    """Every draft of the drafter, with a copy of the log it was made for."""
    noted, drafter = [], engine.drafters["kv_draft"]
    draft = drafter.draft

    def noting(rows, plan):
        trees = draft(rows, plan)
        for row, part, tree in zip(rows, plan, trees, strict=True):
            noted.append((row.seq.id, list(row.seq.tokens), part, tree))
        return trees

    drafter.draft = noting
    return noted


def greedy_chain(target, head, tokens, depth):
    """What a head drafts for a log, from a fresh prefill of it."""
    twin = Twin(head, target, Prefilled(target, tokens[:-1], num_blocks=128))
    path = [tokens[-1]]
    for _ in range(depth):
        path.append(int(twin.path(path)[-1].argmax()))
    return tuple(path[1:])


VARIANTS = {
    "as trained": {},
    "queries only": {"sees_drafts": False},
    "draft vocabulary, fed back raw": {"ids": DRAFT_IDS, "feedback": "pre-norm"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_draft_is_that_of_a_fresh_prefill(options):
    """After rejections and acceptances, in batches of mixed lengths, preempted, in chunks."""
    target = tiny_decoder(3)
    head = good_head(target, **options)
    engine = with_head(
        target,
        head,
        num_blocks=26,
        max_num_batched_tokens=14,
        max_num_seqs=4,
        max_model_len=60,
        long_prefill_token_threshold=5,
    )
    noted = note_drafts(engine)
    asked = [
        request(f"r{k}", replace(K4, num_draft_tokens=k), seed=k, length=6 + k)
        for k in (1, 3, 4, 6)
    ]
    run(engine, asked)
    drafted = [(log, tree) for _, log, _, tree in noted if tree.tokens]
    for log, tree in drafted:
        assert tree.tokens == greedy_chain(target, head, log, len(tree))
    assert len(drafted) > 30
    assert engine.stats.num_preemptions > 0
    assert 0 < engine.stats.num_accepted_tokens < engine.stats.num_draft_tokens


@pytest.mark.parametrize("sees_drafts", [True, False])
def test_after_every_step_the_targets_kv_is_that_of_a_fresh_prefill(sees_drafts):
    """Other drafters' trees beside it; what the head wrote for drafted tokens is gone."""
    target = tiny_decoder(3)
    head = good_head(target, sees_drafts=sees_drafts)
    others = [ScriptedDrafter(junk_tree(256), name="scripted")]
    engine = with_head(target, head, num_blocks=28, drafters=others, max_num_seqs=4)
    wide = SpeculationParams(method="kv_draft", num_draft_tokens=3, width=3)
    junk_wide = SpeculationParams(method="scripted", num_draft_tokens=3, width=3)
    for index, asked in enumerate((K4, wide, junk_wide)):
        engine.add(request(f"r{index}", asked, SAMPLED, seed=index, length=7 + index))
    num_compared = 0
    while engine.has_work():
        engine.step()
        for seq in engine.scheduler.running:
            fresh = prefilled(engine.runner, seq.tokens[: seq.num_cached])
            found = kv(engine.runner, seq.table, seq.num_cached)
            assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True)), seq.id
            num_compared += seq.num_cached
    assert num_compared > 300


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_copy_of_the_target_is_accepted_whole_on_every_call(kernels):
    target, head = copied_pair(kernels)
    engine = with_head(target, head)
    engine.add(request(sampling=SamplingParams(max_tokens=28, ignore_eos=True)))
    seen, accepted = engine.stats, []
    while engine.has_work():
        before = seen.num_draft_tokens, seen.num_accepted_tokens
        engine.step()
        accepted.append((seen.num_draft_tokens - before[0], seen.num_accepted_tokens - before[1]))
    assert accepted == [(0, 0), *[(4, 4)] * 5, (1, 1)], "1 + 5 * 5 + 2 tokens"


@pytest.mark.parametrize("method", ["coupled", "probabilistic", "independent"])
def test_a_copy_of_the_target_is_accepted_at_any_temperature(method):
    """Laws of both differ by rounding alone."""
    target, head = copied_pair()
    engine = with_head(target, head)
    asked = SpeculationParams(
        method="kv_draft",
        num_draft_tokens=4,
        draft_sample_method=method,
        verifier=None if method == "coupled" else "rejection",
    )
    run(engine, [request(f"r{i}", asked, SAMPLED, seed=i) for i in range(6)])
    assert engine.stats.num_draft_tokens > 60
    assert engine.stats.num_accepted_tokens >= 0.98 * engine.stats.num_draft_tokens


def test_trees_grow_by_the_laws_of_their_paths():
    """Of a best-first tree every node's children are the likeliest by the head's law there."""
    target = tiny_decoder(3)
    head = good_head(target)
    engine = with_head(target, head)
    noted = note_drafts(engine)
    asked = SpeculationParams(method="kv_draft", num_draft_tokens=3, width=2)
    run(engine, [request("a", asked), request("b", asked, length=14, seed=2)])
    trees = [(log, part, tree) for _, log, part, tree in noted if not tree.is_chain]
    assert len(trees) > 8
    for log, part, tree in trees:
        twin = Twin(head, target, Prefilled(target, log[:-1], num_blocks=128))
        best = best_first(twin, log[-1], part)
        assert {tree.path_tokens(node) for node in range(len(tree))} == best


def best_first(twin, root, plan: RowPlan):
    """Paths of the largest products of probabilities, by looking at all of them."""
    known = {(): 0.0}
    for depth in range(plan.depth):
        for path in [path for path in known if len(path) == depth]:
            log_V = twin.path([root, *path])[-1].log_softmax(0)
            for token in log_V.topk(plan.width).indices.tolist():
                known[*path, token] = known[path] + float(log_V[token])
    del known[()]
    return set(sorted(known, key=known.__getitem__, reverse=True)[: plan.num_nodes])


@pytest.mark.parametrize("method", ["probabilistic", "independent"])
@pytest.mark.parametrize("width", [1, 2])
def test_recorded_laws_are_the_heads(method, width):
    """Each node's law is the head's after its path, at the request's temperature."""
    target = tiny_decoder(3)
    head = good_head(target)
    engine = with_head(target, head)
    noted = note_drafts(engine)
    rule = "rejection" if width == 1 else "traversal"
    asked = SpeculationParams(
        method="kv_draft",
        num_draft_tokens=3,
        width=width,
        draft_sample_method=method,
        verifier=rule,
    )
    run(engine, [request("a", asked, SAMPLED)])
    num_checked = 0
    for _, log, _, tree in noted:
        for node in range(len(tree)):
            path = tree.path_tokens(node)
            twin = Twin(head, target, Prefilled(target, log[:-1], num_blocks=128))
            law_V = (twin.path([log[-1], *path[:-1]])[-1].double() / 0.9).softmax(0)
            before = [
                tree.tokens[sibling]
                for sibling in tree.children(tree.parents[node])
                if sibling < node and method == "probabilistic"
            ]
            law_V[before] = 0.0
            torch.testing.assert_close(tree.law(node), law_V / law_V.sum(), atol=1e-5, rtol=1e-3)
            num_checked += 1
    assert num_checked > 15


def test_a_draft_costs_one_pass_per_depth_for_all_sequences_together():
    target = tiny_decoder(3)
    engine = with_head(target, good_head(target))
    for index in range(5):
        engine.add(request(f"r{index}", seed=index))
    engine.step()
    drafter = engine.drafters["kv_draft"]
    assert drafter.num_forwards == 0, "no feature yet"
    for count in range(1, 4):
        engine.step()
        assert drafter.num_forwards == 4 * count


def test_after_a_prefix_hit_it_is_warm_with_the_first_pass():
    target = tiny_decoder(3)
    head = good_head(target)
    engine = with_head(target, head)
    run(engine, [request("first", length=22)])
    noted = note_drafts(engine)
    engine.add(request("again", length=22))
    engine.step()
    (seq,) = engine.scheduler.running
    assert seq.num_prefix_hits >= 16
    engine.step()
    cold, warm = noted[0][3] if noted else None, noted[-1]
    assert not cold
    assert warm[3].tokens == greedy_chain(target, head, warm[1], 4)


def test_completions_of_one_prompt_are_drafted_for_alike():
    target = tiny_decoder(3)
    head = good_head(target)
    engine = with_head(target, head)
    noted = note_drafts(engine)
    several = SamplingParams(max_tokens=12, n=3, temperature=0.8, ignore_eos=True)
    run(engine, [request("three", sampling=several)])
    last = {seq_id: (log, tree) for seq_id, log, _, tree in noted if tree.tokens}
    assert len(last) == 3
    assert len({tuple(log) for log, _ in last.values()}) > 1


def test_a_sequence_not_drafted_for_in_many_steps_is_warm():
    """Its feature follows every pass, whoever drafts."""
    target = tiny_decoder(3)
    head = good_head(target)
    engine = with_head(target, head)
    noted = note_drafts(engine)
    engine.add(request())
    engine.step()
    plan, engine.controller.plan = engine.controller.plan, lambda b: [RowPlan() for _ in b.rows]
    for _ in range(5):
        engine.step()
    assert not any(tree.tokens for _, _, _, tree in noted)
    engine.controller.plan = plan
    engine.step()
    _, log, _, tree = noted[-1]
    assert len(log) == 9 + 6
    assert tree.tokens == greedy_chain(target, head, log, 4)


def test_drafts_of_others_leave_its_feature_right():
    """Where another drafter's tokens were committed, the feature is that of the last of them."""
    target = tiny_decoder(3)
    head = good_head(target)
    truth = list(request().prompt_token_ids)
    truth += run(tiny_engine(target=target, draft_seed=None), [request(speculation=OFF)])["r", 0]
    other = ScriptedDrafter(junk_tree(256, truth), name="scripted")
    engine = with_head(target, head, drafters=[other])
    engine.add(request())
    noted = note_drafts(engine)
    plan = engine.controller.plan
    for step in range(12):
        name = "kv_draft" if step % 2 else "scripted"
        engine.controller.plan = lambda batch, name=name: [
            part._replace(drafter=name, width=2, num_nodes=min(part.num_nodes, 6))
            for part in plan(batch)
        ]
        engine.step()
    trees = [(log, part, tree) for _, log, part, tree in noted if tree.tokens]
    assert len(trees) > 3
    assert engine.stats.num_accepted_tokens > 3
    for log, part, tree in trees:
        twin = Twin(head, target, Prefilled(target, log[:-1], num_blocks=128))
        paths = {tree.path_tokens(node) for node in range(len(tree))}
        assert paths == best_first(twin, log[-1], part)


def test_a_snapshot_brings_back_the_feature():
    target = tiny_decoder(3)
    engine = with_head(target, good_head(target))
    drafter = engine.drafters["kv_draft"]
    engine.add(request())
    for _ in range(3):
        engine.step()
    (seq,) = engine.scheduler.running
    saved = pickle.loads(pickle.dumps(drafter.snapshot(seq)))
    assert saved.num_tokens == len(seq.tokens) - 1
    before = seq.drafter_state["kv_draft"].feature_H.clone()
    drafter.close(seq)
    drafter.open(seq)
    assert drafter.snapshot(seq) is None
    assert drafter.restore(seq, saved) == len(seq.tokens) - 1
    assert torch.equal(seq.drafter_state["kv_draft"].feature_H, before)
    seq.tokens.append(40)
    assert drafter.restore(seq, saved) == 0, "a token was added: the next pass tells"
    seq.tokens.pop()


def test_no_draft_reaches_beyond_the_context():
    target = tiny_decoder(3, max_position_embeddings=20)
    engine = with_head(target, good_head(target))
    seq = running(engine, request(length=16))
    assert len(seq.tokens) == 17
    assert len(drafted(engine, seq, 4)) == 4, "the last one is run at position 19"
    assert not drafted(engine, seq, 5)


def test_without_kv_or_feature_of_every_committed_position_nothing_is_drafted():
    target = tiny_decoder(3)
    engine = with_head(target, good_head(target))
    seq = running(engine, request())
    assert drafted(engine, seq, 2)
    seq.drafter_state["kv_draft"].position -= 1
    assert not drafted(engine, seq, 2)
    seq.drafter_state["kv_draft"].position += 1
    seq.num_cached -= 1
    assert not drafted(engine, seq, 2)
    seq.num_cached += 1
    assert drafted(engine, seq, 2)


def running(engine, asked):
    """Its sequence, after the pass over the prompt."""
    engine.add(asked)
    engine.step()
    (seq,) = engine.scheduler.running
    return seq


def drafted(engine, seq, depth):
    """A draft so deep, whatever the engine would plan."""
    engine.manager.reserve(seq.table, len(seq.tokens) + depth)
    plan = RowPlan(drafter="kv_draft", depth=depth, num_nodes=depth)
    (tree,) = engine.drafters["kv_draft"].draft([Row(seq, 1, depth)], [plan])
    return tree


def slow_but_the_first(variants):
    first, *others = variants.items()
    marked = [pytest.param(value, id=name, marks=pytest.mark.slow) for name, value in others]
    return [pytest.param(first[1], id=first[0]), *marked]


@pytest.mark.parametrize("options", slow_but_the_first(VARIANTS))
def test_it_is_a_drafter(options):
    target = tiny_decoder()

    class Made(KVDrafter):
        @classmethod
        def build(cls, around):
            head = good_head(target, **options)
            runner = around.target.runner
            return cls(KVRunner(KVNetwork(head, runner.network), runner.pool))

    check_drafter(Made, target=target)


def parts(network, num_blocks=64):
    runner, manager = pooled(network, num_blocks)
    return ModelParts(runner=runner, manager=manager)


def test_it_is_built_from_a_head_over_the_targets_pool():
    target = tiny_decoder(3)
    around = Surroundings(target=parts(target), heads={"kv_draft": good_head(target)})
    drafter = KVDrafter.build(around)
    assert drafter.runner.pool is around.target.runner.pool
    assert drafter.boundaries == (2,)


def test_without_a_head_it_is_refused():
    with pytest.raises(ConfigError, match="heads="):
        KVDrafter.build(Surroundings(target=parts(tiny_decoder(3))))


def test_a_head_of_another_family_is_refused():
    target = tiny_decoder(3)
    spec, tensors = good_head(target)
    plain = type(spec).__mro__[1](
        family=spec.family, widths=spec.widths, conventions=spec.conventions, source="other"
    )
    around = Surroundings(target=parts(target), heads={"kv_draft": Head(plain, tensors)})
    with pytest.raises(ConfigError, match="'other' is of the family"):
        KVDrafter.build(around)


def test_a_target_that_is_not_lean_is_refused():
    target = tiny_decoder(3)
    around = Surroundings(target=parts(target), heads={"kv_draft": good_head(target)})
    around.target.runner.network = type("Other", (), {"spec": target.spec})()
    with pytest.raises(ConfigError, match="network='lean'"):
        KVDrafter.build(around)


def test_plain_output_is_unchanged_beside_it():
    """The engine that taps states says what one without a head says."""
    target = tiny_decoder(3)
    plain = tiny_engine(target=target, draft_seed=None)
    asked = [request(f"r{i}", OFF, SAMPLED, seed=i) for i in range(3)]
    drafted = [request(f"r{i}", K4, SAMPLED, seed=i) for i in range(3)]
    assert run(with_head(target, good_head(target)), drafted) == run(plain, asked)
