"""Trees of the draft model: best-first against exhaustive search, drawn ones against their law."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

from outrider.draft.draft_model import ModelDrafter
from outrider.draft.growth import Chains, Line, Siblings, draw_siblings
from outrider.draft.tree_search import BestFirst
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.sampling.grammar import GrammarCompiler
from outrider.sampling.rng import PositionStream, RootStream
from outrider.step import DraftTree
from outrider.testing import (
    ByteTokenizer,
    ToyModel,
    bias,
    events,
    exact_law,
    run,
    speculate,
    tiny_decoder,
    tiny_engine,
)
from outrider.verify.gbv import GbvVerifier
from outrider.verify.spectr import SpectrVerifier
from outrider.verify.traversal import TraversalVerifier
from outrider.verify.tree import TreeVerifier
from tests.draft.draft_models import (
    GREEDY,
    OFF,
    drafter_of,
    exact_output_law,
    kv,
    last_logits,
    pooled,
    prefilled,
    request,
)
from tests.verify.toy_problems import EXACT, toys

SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, ignore_eos=True)
SHAPED = SamplingParams(
    max_tokens=24, temperature=1.1, top_k=40, top_p=0.95, repetition_penalty=1.2,
    frequency_penalty=0.3, logit_bias={65: 1.5, 70: float("-inf")}, min_tokens=8,
)  # fmt: skip
PENALIZED = SamplingParams(max_tokens=24, repetition_penalty=1.4, frequency_penalty=0.5)
KINDS = {"greedy": GREEDY, "sampled": SAMPLED, "shaped": SHAPED, "penalized": PENALIZED}
METHODS = ("greedy", "coupled", "probabilistic", "independent")
# Rules that are keyed by the root, with the ways of drafting trees that they are made for.
DRAWING = [
    (TreeVerifier, Siblings),
    (TraversalVerifier, Siblings),
    (TreeVerifier, Chains),
    (TraversalVerifier, Chains),
    (SpectrVerifier, Chains),
    (GbvVerifier, Chains),
    (lambda: GbvVerifier(rule="recursive"), Chains),
]
PAIRS = [
    ("tree", "probabilistic"),
    ("traversal", "probabilistic"),
    ("traversal", "independent"),
    ("spectr", "independent"),
    ("gbv", "independent"),
]
HALF_RIGHT = 0.01  # noise on the weights with which a draft model errs half of the time


def tree_of(method="greedy", k=4, width=3, **more):
    return SpeculationParams(
        method="draft_model",
        num_draft_tokens=k,
        width=width,
        draft_sample_method=method,
        **more,
    )


def requests(sampling, speculation, count=4):
    return [request(f"r{i}", speculation, sampling, length=5 + 3 * i, seed=i) for i in range(count)]


def engine(draft_noise=HALF_RIGHT, **more):
    return tiny_engine(draft_noise=draft_noise, **more)


def grown(growth, model) -> tuple[DraftTree, int]:
    """The finished tree and the number of rounds; `model` maps a path to a law, or to None."""
    num_rounds = 0
    while wanted := growth.wanted():
        growth.take([model(tuple(growth.path_tokens(node))) for node in wanted])
        num_rounds += 1
    tree = growth.tree("toy")
    tree.check()
    return tree, num_rounds


def trees_of(used):
    """The drafts of every step."""
    made = []
    draft = drafter_of(used).draft

    def noted(rows, plan):
        trees = draft(rows, plan)
        made.extend(zip([list(row.seq.tokens) for row in rows], plan, trees, strict=True))
        return trees

    drafter_of(used).draft = noted
    return made


# What grows, on toy models.


def values_below(model, width, depth, path=()):
    """{path: product of probabilities} of the tree of all top-`width` children."""
    if len(path) == depth:
        return {}
    best = model(path).topk(width)
    found = {}
    for token, weight in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        child = (*path, token)
        found[child] = weight
        below = values_below(model, width, depth, child)
        found |= {longer: weight * value for longer, value in below.items()}
    return found


def prefix_closed_sets(paths, size):
    """All sets of `size` paths that hold the parent of each of their members."""
    sets = {frozenset()}
    for _ in range(size):
        sets = {
            chosen | {path}
            for chosen in sets
            for path in paths
            if path not in chosen and (len(path) == 1 or path[:-1] in chosen)
        }
    return sets


@pytest.mark.parametrize(("vocab", "width", "depth", "size"), [
    (2, 2, 3, 4), (3, 2, 3, 5), (3, 3, 2, 5), (4, 3, 2, 4), (5, 2, 4, 4), (4, 4, 1, 3),
])  # fmt: skip
def test_best_first_is_the_best_of_all_prefix_closed_sets(vocab, width, depth, size):
    for seed in range(5):
        model = ToyModel(f"q{seed}", vocab)
        tree, num_rounds = grown(BestFirst(width, depth, size), model)
        values = values_below(model, width, depth)
        best = max(sum(values[p] for p in chosen) for chosen in prefix_closed_sets(values, size))
        paths = [tree.path_tokens(node) for node in range(len(tree))]
        assert len(set(paths)) == size
        assert sum(values[path] for path in paths) == pytest.approx(best, abs=1e-12)
        assert num_rounds <= depth


def test_best_first_of_a_large_tree_is_its_best_nodes():
    """A node is worth no more than its parent: the best nodes of all are prefix-closed."""
    model = ToyModel("q", 8)
    tree, _ = grown(BestFirst(4, 5, 40), model)
    values = values_below(model, 4, 5)
    paths = {tree.path_tokens(node) for node in range(len(tree))}
    assert paths == set(sorted(values, key=values.get, reverse=True)[:40])


def test_best_first_asks_for_laws_below_its_best_nodes_only():
    asked = []

    def model(path):
        asked.append(path)
        return ToyModel("q", 6)(path)

    tree, _ = grown(BestFirst(6, 4, 7), model)
    assert len(asked) < 1 + 4 * 7, "a beam would expand all of them at each depth"
    inner = {tree.path_tokens(parent) for parent in tree.parents}
    assert inner <= set(asked)


def test_a_confident_model_gets_a_deep_tree_and_a_doubtful_one_a_broad_one():
    sure = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)
    unsure = torch.tensor([0.28, 0.26, 0.24, 0.22], dtype=torch.float64)
    deep, _ = grown(BestFirst(4, 6, 6), lambda path: sure)
    broad, _ = grown(BestFirst(4, 6, 4), lambda path: unsure)
    assert deep.is_chain
    assert len(deep) == 6
    assert set(broad.parents) == {-1}


def test_best_first_stops_below_a_node_without_a_law():
    model = ToyModel("q", 3)
    tree, _ = grown(BestFirst(2, 3, 20), lambda path: None if path[:1] == (0,) else model(path))
    assert not any(
        len(path) > 1 and path[0] == 0 for path in map(tree.path_tokens, range(len(tree)))
    )
    assert len(grown(BestFirst(2, 3, 20), lambda path: None)[0]) == 0


def test_best_first_leaves_out_what_cannot_be():
    certain = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    tree, _ = grown(BestFirst(3, 4, 9), lambda path: certain)
    assert tree.tokens == (1, 1, 1, 1)


def test_the_first_branch_of_a_coupled_tree_is_what_the_target_draws_from_the_same_law():
    for seed in range(30):
        stream, model = PositionStream(seed, 7), ToyModel("q", 9)
        noise = stream.noise
        tree, _ = grown(BestFirst(3, 4, 12, lambda level, size: noise(7 + level, size)), model)  # noqa: B023
        node, path = -1, ()
        while children := tree.children(node):
            drawn = stream.pick(model(path))
            assert tree.tokens[children[0]] == drawn, "siblings stand best first"
            node, path = children[0], (*path, drawn)


def test_coupled_siblings_are_those_of_largest_log_q_plus_noise():
    model, noise = ToyModel("q", 9), PositionStream(3, 0).noise
    tree, _ = grown(BestFirst(4, 1, 4, noise), model)
    scores_V = model(()).log() + noise(0, 9)
    assert tree.tokens == tuple(scores_V.topk(4).indices.tolist())


def drawing(grow, q, width, depth, num_nodes):
    """The production growth as a toy draft: in the enumerator every draw is tried."""

    def draft(context, stream):
        if grow is Chains:
            growth = Chains(width, min(depth, num_nodes // width), stream)
        else:
            growth = Siblings(width, depth, num_nodes, stream)
        return grown(growth, lambda path: q(context + path))[0]

    return draft


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "width", "depth", "num_nodes"), [
    (2, 2, 2, 4), (3, 2, 2, 4), (3, 2, 2, 3), (3, 3, 1, 3),
])  # fmt: skip
@pytest.mark.parametrize(("rule", "grow"), DRAWING)
def test_drawn_trees_leave_the_target_law_alone(rule, grow, size, width, depth, num_nodes, zeros):
    for p, q in toys(size, zeros, 3):
        call = speculate(rule(), p, drawing(grow, q, width, depth, num_nodes))
        assert bias(call, p, depth + 2) < EXACT


@pytest.mark.parametrize(("rule", "grow"), DRAWING)
def test_dead_ends_of_the_draft_model_leave_the_target_law_alone(rule, grow):
    """It may have no law after some paths; which chains go on then depends on what was drawn."""
    for p, q in toys(3, count=3):
        dead = lambda path, q=q: None if path[:1] == (1,) else q(path)  # noqa: E731
        call = speculate(rule(), p, drawing(grow, dead, 2, 2, 4))
        assert bias(call, p, 4) < EXACT


def test_the_enumeration_sees_siblings_recorded_with_the_law_of_the_first():
    def mutant(q):
        def draft(context, stream):
            tree = drawing(Siblings, q, 2, 1, 2)(context, stream)
            laws = (q(context),) * 2
            return DraftTree(tokens=tree.tokens, parents=tree.parents, laws=laws)

        return draft

    biases = [bias(speculate(TreeVerifier(), p, mutant(q)), p, 3) for p, q in toys(3, count=3)]
    assert max(biases) > 1e-2


def test_the_enumeration_sees_a_shape_that_looks_at_what_was_drawn():
    """Trap 2: a second sibling that is dropped when it is token 0."""

    def mutant(q):
        def draft(context, stream):
            tree = drawing(Siblings, q, 2, 1, 2)(context, stream)
            kept = 1 if tree.tokens[1] == 0 else 2
            return DraftTree(tokens=tree.tokens[:kept], parents=(-1,) * kept, laws=tree.laws[:kept])

        return draft

    biases = [bias(speculate(TreeVerifier(), p, mutant(q)), p, 3) for p, q in toys(3, count=3)]
    assert max(biases) > 1e-3


@pytest.mark.parametrize(("width", "depth", "num_nodes", "parents"), [
    (3, 3, 9, (-1, -1, -1, 0, 1, 2, 3, 4, 5)),
    (3, 3, 6, (-1, -1, -1, 0, 1, 3)),  # two more for the first sibling, one for the second
    (3, 4, 3, (-1, -1, -1)),
    (3, 4, 2, (-1, -1)),
    (9, 2, 8, (-1, -1, -1, -1, 0, 1, 2, 3)),  # four tokens are all there are
])  # fmt: skip
def test_the_shape_of_drawn_siblings_is_known_before_they_are_drawn(
    width, depth, num_nodes, parents
):
    model = ToyModel("q", 4)
    for seed in range(20):
        stream = RootStream(seed, 0, "draft")
        tree, num_rounds = grown(Siblings(width, depth, num_nodes, stream), model)
        assert tree.parents == parents
        assert num_rounds <= depth
        siblings = [tree.tokens[node] for node in tree.children(-1)]
        assert len(set(siblings)) == len(siblings)


def test_siblings_are_drawn_one_after_another_each_from_what_is_left():
    q_V = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    law = exact_law(lambda stream: tuple(t for t, _ in draw_siblings(q_V, 2, stream)))
    assert law[0, 1] == pytest.approx(0.5 * 0.3 / 0.5)
    assert law[2, 1] == pytest.approx(0.2 * 0.3 / 0.8)
    assert sum(law.values()) == pytest.approx(1.0)
    first, second = draw_siblings(q_V, 2, RootStream(1, 0, "draft"))
    assert torch.equal(first[1], q_V)
    assert float(second[1][first[0]]) == 0.0
    assert float(second[1].sum()) == pytest.approx(1.0)


def test_independent_chains_are_equally_long_and_keep_their_duplicates():
    model = ToyModel("q", 2)
    for seed in range(20):
        stream = RootStream(seed, 0, "draft")
        tree, _ = grown(Chains(4, 3, stream), model)
        assert [len(path) for path in tree.paths] == [3] * 4
        assert len(set(tree.paths)) <= 4
        for path in tree.paths:
            assert tree.path(path[-1]) == path
        for node in range(len(tree)):
            assert torch.equal(tree.law(node), model(tree.path_tokens(node)[:-1]))
    assert len(tree) < 12, "with two tokens some prefixes are shared"


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_no_growth_exceeds_its_bounds(width, depth, num_nodes, seed):
    depth = min(depth, num_nodes)
    model, stream = ToyModel(f"q{seed}", 5, 0.2), RootStream(seed, 0, "draft")
    chains = min(width, num_nodes)
    for growth in (
        BestFirst(width, depth, num_nodes),
        BestFirst(width, depth, num_nodes, PositionStream(seed, 0).noise),
        Siblings(width, depth, num_nodes, stream),
        Chains(chains, min(depth, num_nodes // chains), stream),
        Line(depth, stream),
    ):
        tree, num_rounds = grown(growth, model)
        assert 0 < len(tree) <= num_nodes
        assert max(tree.depth(node) for node in range(len(tree))) <= depth
        assert len(tree.children(-1)) <= width
        assert num_rounds <= depth


# What the draft model makes of it, in an engine.


@pytest.fixture(scope="module")
def plain():
    return {kind: run(tiny_engine(), requests(s, OFF)) for kind, s in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_same_tokens_as_plain_decoding(plain, method, kind):
    used = engine()
    assert run(used, requests(KINDS[kind], tree_of(method))) == plain[kind]
    assert 0 < used.stats.num_accepted_tokens < used.stats.num_draft_tokens
    assert drafter_of(used).manager.num_used == 0


@pytest.mark.parametrize("kind", ["greedy", "shaped"])
@pytest.mark.parametrize("method", METHODS)
def test_same_tokens_with_preemption_chunks_and_few_nodes(plain, method, kind):
    used = engine(
        num_blocks=24,
        options={
            "max_num_batched_tokens": 24,
            "max_num_seqs": 4,
            "max_model_len": 90,
            "long_prefill_token_threshold": 7,
        },
    )
    spec = tree_of(method, k=5, width=4, num_nodes=7)
    assert run(used, requests(KINDS[kind], spec)) == plain[kind]
    assert used.stats.num_preemptions > 0
    assert used.manager.num_used == drafter_of(used).manager.num_used == 0


@pytest.mark.parametrize("kind", ["greedy", "penalized"])
@pytest.mark.parametrize(("verifier", "method"), [*PAIRS, ("greedy", "greedy"), ("tree", "greedy")])
def test_every_rule_gives_greedy_tokens_at_temperature_0(plain, verifier, method, kind):
    spec = tree_of(method, verifier=verifier)
    used = engine()
    assert run(used, requests(KINDS[kind], spec)) == plain[kind]
    assert used.stats.num_accepted_tokens > 0


def test_at_temperature_0_every_method_drafts_the_greedy_tree():
    made = []
    for method in METHODS:
        used = engine()
        trees = trees_of(used)
        run(used, requests(GREEDY, tree_of(method)))
        made.append([(tree.tokens, tree.parents, tree.laws) for _, _, tree in trees])
    assert len(made[0]) > 10
    assert all(trees == made[0] for trees in made)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_greedy_tree_is_the_best_first_tree_of_the_draft_models_laws(sampling):
    used = tiny_engine(draft_seed=2)
    made = trees_of(used)
    run(used, [request("r", tree_of("greedy", k=3), sampling)])
    network, temperature = tiny_decoder(2), sampling.temperature or 1.0
    for tokens, plan, tree in made[:4]:
        laws = lambda path, t=tokens: (  # noqa: E731
            (last_logits(network, [*t, *path]).double() / temperature).softmax(dim=0)
        )
        expected, _ = grown(BestFirst(3, plan.depth, plan.num_nodes), laws)
        assert (tree.tokens, tree.parents) == (expected.tokens, expected.parents)
        assert not tree.is_chain


@pytest.mark.parametrize("method", ["probabilistic", "independent"])
def test_recorded_laws_are_those_of_the_draft_model_after_each_path(method):
    """Penalties count the path too."""
    sampling = SamplingParams(max_tokens=8, temperature=1.3, frequency_penalty=1.5, ignore_eos=True)
    used = tiny_engine(draft_seed=2)
    made = trees_of(used)
    asked = request("r", tree_of(method, k=3), sampling)
    used.add(asked)
    used.step()
    (seq,) = used.scheduler.running
    shaper, network = seq.shaper, tiny_decoder(2)
    ((tokens, _, tree),) = made
    assert len(tree.laws) == len(tree) > 4
    for node in range(len(tree)):
        *path, _ = tree.path_tokens(node)
        law_V = shaper.shape(last_logits(network, [*tokens, *path]), tokens, path).softmax(dim=0)
        if method == "probabilistic" and tree.parents[node] < 0:
            for earlier in tree.children(-1)[: tree.children(-1).index(node)]:
                law_V[tree.tokens[earlier]] = 0.0
            law_V /= law_V.sum()
        assert torch.allclose(tree.law(node), law_V, atol=1e-9)


def assert_draft_kv_follows_the_log(used) -> int:
    drafter, num_compared = drafter_of(used), 0
    for seq in used.scheduler.running:
        state = seq.drafter_state.get("draft_model")
        if state is not None and state.num_cached:
            fresh = prefilled(drafter.runner, seq.tokens[: state.num_cached])
            found = kv(drafter.runner, state.table, state.num_cached)
            assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True)), seq.id
            num_compared += state.num_cached
    return num_compared


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_after_every_step_the_draft_kv_is_that_of_a_fresh_prefill(method, sampling, monkeypatch):
    used = engine()
    pool, moved = drafter_of(used).runner.pool, []
    copy_slots = pool.copy_slots

    def noting(sources, destinations):
        moved.extend(sources)
        copy_slots(sources, destinations)

    monkeypatch.setattr(pool, "copy_slots", noting)
    for asked in requests(sampling, tree_of(method), 3):
        used.add(asked)
    num_compared, lags = 0, Counter()
    while used.has_work():
        used.step()
        num_compared += assert_draft_kv_follows_the_log(used)
        for seq in used.scheduler.running:
            lags[len(seq.tokens) - seq.drafter_state["draft_model"].num_cached] += 1
    assert num_compared > 300
    assert max(lags) <= 2, "only the bonus token, and a leaf that was never run, stand behind"
    assert moved, "an accepted path ran through nodes that do not stand in their places"


def test_as_many_passes_as_the_tree_is_deep_for_all_sequences_together():
    used = engine()
    for asked in requests(GREEDY, tree_of("probabilistic", k=3), 5):
        used.add(asked)
    for count in range(1, 4):
        used.step()
        assert drafter_of(used).num_forwards == 3 * count


def test_a_tree_is_accepted_further_than_a_chain():
    def length(width):
        used = tiny_engine(draft_noise=0.03)
        told = events(used, requests(SAMPLED, tree_of("coupled", width=width)))
        metrics = [es[-1].metrics for es in told.values()]
        return sum(m.num_accepted_tokens for m in metrics) / sum(m.num_drafts for m in metrics)

    assert length(4) > length(1) + 0.2


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_perfect_drafter_is_accepted_down_its_first_branch(temperature):
    sampling = SamplingParams(max_tokens=24, temperature=temperature, ignore_eos=True)
    used = engine(draft_noise=0.0)
    made = trees_of(used)
    asked = request("r", tree_of("coupled", k=4, width=3), sampling)
    truth = [*asked.prompt_token_ids, *run(used, [asked])["r", 0]]
    for tokens, _, tree in made:
        node, depth = -1, len(tokens)
        while depth < len(truth) and (children := tree.children(node)):
            assert tree.tokens[children[0]] == truth[depth]
            node, depth = children[0], depth + 1


def test_mixed_methods_share_passes():
    specs = [tree_of(method) for method in METHODS]
    specs += [tree_of("probabilistic", width=1), OFF]
    mixed = [requests(SAMPLED, spec, 6)[i] for i, spec in enumerate(specs)]
    used = engine()
    assert run(used, mixed) == run(tiny_engine(), requests(SAMPLED, OFF, 6))
    assert drafter_of(used).num_forwards <= 4 * used.stats.num_steps


def test_completions_of_one_prompt_and_a_stop():
    sampling = SamplingParams(max_tokens=24, temperature=1.0, n=3, stop_token_ids=tuple(range(20)))
    expected = run(tiny_engine(), requests(sampling, OFF, 2))
    for method in METHODS:
        assert run(engine(), requests(sampling, tree_of(method), 2)) == expected


def test_a_pool_too_small_for_a_tree_means_plain_decoding():
    target = tiny_decoder()
    drafter = ModelDrafter(*pooled(tiny_decoder(), num_blocks=3), 256)
    used = Engine(*pooled(target), EngineConfig(block_size=4), drafters=[drafter])
    told = events(used, [request("r", tree_of(width=2), GREEDY)])["r", 0]
    assert told[-1].metrics.num_drafts == 0
    assert [t for e in told for t in e.token_ids] == run(tiny_engine(), [request()])["r", 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("draft_size", [100, 300])
def test_padded_vocabularies_of_other_sizes(draft_size, method):
    prompt = (255, 40, 254, 41, 253)
    asked = [
        Request(id="r", prompt_token_ids=prompt, sampling=SAMPLED, speculation=s, seed=3)
        for s in (tree_of(method), OFF)
    ]

    def pair():
        drafter = ModelDrafter(*pooled(tiny_decoder(1, vocab_size=draft_size)), 256)
        return Engine(*pooled(tiny_decoder()), EngineConfig(block_size=4), drafters=[drafter])

    assert run(pair(), asked[:1]) == run(pair(), asked[1:])


class Bytes(ByteTokenizer):
    """What a grammar must know of the byte tokenizer."""

    def token_bytes(self):
        return [bytes([i]) if i > 3 else b"" for i in range(256)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_under_a_grammar_every_node_keeps_to_it(method, temperature):
    sampling = SamplingParams(max_tokens=24, temperature=temperature, regex="(cat|dog|horse){4}")

    def constrained():
        return engine(draft_noise=0.05, grammars=GrammarCompiler(Bytes(), 256, (3,)))

    expected = run(constrained(), requests(sampling, OFF, 3))
    used = constrained()
    made = trees_of(used)
    assert run(used, requests(sampling, tree_of(method), 3)) == expected
    letters = set(b"catdoghorse") | {3}
    drafted = {token for _, _, tree in made for token in tree.tokens}
    assert len(drafted) > 3
    # An independent chain that has come to its end goes on: it must be as long as the others.
    assert drafted <= letters | ({0} if method == "independent" else set())


@pytest.mark.parametrize(("verifier", "method"), PAIRS)
def test_output_has_the_targets_law(verifier, method):
    """Chi-square over all outputs of two tokens, with seeds 0 .. 699."""
    num_samples, prompt, temperature = 700, (1, 0, 2, 1), 2.0
    target, draft = tiny_decoder(9, vocab_size=4), tiny_decoder(7, vocab_size=4)
    drafter = ModelDrafter(*pooled(draft), 4)
    used = Engine(*pooled(target), EngineConfig(block_size=4, max_num_seqs=64), drafters=[drafter])
    spec = tree_of(method, k=2, width=2, verifier=verifier)
    sampling = SamplingParams(max_tokens=3, temperature=temperature, ignore_eos=True)
    seen = run(used, [
        Request(id=f"{i}", prompt_token_ids=prompt, sampling=sampling, speculation=spec, seed=i)
        for i in range(num_samples)
    ])  # fmt: skip
    counts = Counter(tuple(tokens[:2]) for tokens in seen.values())
    law = exact_output_law(target, prompt, 2, temperature)
    assert math.isclose(sum(law.values()), 1.0)
    cells = [(counts[path], num_samples * law[path]) for path in product(range(4), repeat=2)]
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
    assert statistic < 37.7, "chi-square, 15 degrees of freedom, p = 0.001"
    assert 0.02 < used.stats.num_accepted_tokens / used.stats.num_draft_tokens < 0.98
