"""Medusa: the state it reads is the right one, its laws are those of its heads, its trees the best.

Shape legend: T positions, D hidden width, V vocabulary, K heads.
"""

import itertools
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from outrider.control.base import Facts
from outrider.control.policies import make_controller
from outrider.draft import feeding
from outrider.draft.base import ModelParts, Surroundings
from outrider.draft.drawing import draft_law
from outrider.draft.feeding import make_ranker
from outrider.draft.growth import plant
from outrider.draft.medusa import MedusaDrafter
from outrider.engine.resolve import _say_less
from outrider.errors import ConfigError
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder
from outrider.models.heads.spec import Conventions, Family, Head, HeadSpec, MedusaShape, Widths
from outrider.models.runner import Piece
from outrider.models.weights import tensor_shapes
from outrider.ops.choose import choose
from outrider.request import SamplingParams, SpeculationParams
from outrider.step import EMPTY_TREE, Row, RowPlan, StopRule
from outrider.testing import check_drafter, run, tiny_decoder, tiny_engine
from outrider.testing.tiny import TINY
from tests.draft.draft_models import OFF, pooled, request

K = 3
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "penalized": replace(GREEDY, repetition_penalty=1.4, frequency_penalty=0.5),
    "sampled": replace(GREEDY, temperature=0.9),
    "filtered": replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9, min_tokens=6),
    "shaped": replace(GREEDY, temperature=0.9, presence_penalty=0.5, min_p=0.01),
}
METHODS = ("greedy", "coupled", "probabilistic", "independent")


def head_of(tensors, target, num_heads, **conventions):
    """A head of these tensors, with one block."""
    spec = target.spec
    return Head(
        HeadSpec(
            family=Family.MEDUSA,
            widths=Widths(
                target_hidden=spec.hidden_size,
                hidden=spec.hidden_size,
                vocab=spec.vocab_size,
                draft_vocab=spec.vocab_size,
            ),
            conventions=Conventions(**{"lm_head": "own", **conventions}),
            medusa=MedusaShape(num_heads=num_heads, num_blocks=1, has_bias=False),
        ),
        tensors,
    )


def with_lm_heads(lm_heads, target):
    """Heads whose blocks add nothing."""
    width = target.spec.hidden_size
    tensors = {f"heads.{i}.lm_head.weight": weight for i, weight in enumerate(lm_heads)}
    blocks = {f"heads.{i}.blocks.0.weight": torch.zeros(width, width) for i in range(len(lm_heads))}
    return head_of(tensors | blocks, target, len(lm_heads))


def random_head(target, num_heads=K, seed=3, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    width, size = target.spec.hidden_size, target.spec.vocab_size
    tensors = {}
    for i in range(num_heads):
        tensors[f"heads.{i}.blocks.0.weight"] = torch.randn(width, width, generator=generator) * 0.2
        tensors[f"heads.{i}.lm_head.weight"] = torch.randn(size, width, generator=generator) * scale
    return head_of(tensors, target, num_heads)


def passed(target, tokens):
    """logits_TV and the raw last states_TD of one fresh pass over a text."""
    runner, manager = pooled(target)
    table, _ = manager.open(tokens)
    manager.reserve(table, len(tokens))
    # As nodes of a chain, every token has logits.
    parents = tuple(range(-1, len(tokens) - 2))
    tree = replace(EMPTY_TREE, tokens=tuple(tokens[1:]), parents=parents)
    output = runner.run([Piece(table, 0, tokens[:1], tree, True)], (target.spec.num_layers,))
    return output.logits_NV, output.states.tapped_AND[0]


def fitted_head(target, num_heads=K, sampling=GREEDY):
    """Heads fitted by least squares to what the target says of its own text: often right."""
    texts = run(
        tiny_engine(target=target, draft_seed=None),
        [request(f"{i}", OFF, replace(sampling, max_tokens=60), seed=i) for i in range(12)],
    )
    states, laws = [], [[] for _ in range(num_heads)]
    for i in range(12):
        tokens = [*request(seed=i).prompt_token_ids, *texts[f"{i}", 0]]
        logits_TV, states_TD = passed(target, tokens)
        kept = len(tokens) - num_heads
        states.append(target.final_norm(states_TD)[:kept])
        for head in range(num_heads):
            laws[head].append(logits_TV[1 + head : 1 + head + kept])
    x_TD = torch.cat(states).double()
    ridge_DD = x_TD.T @ x_TD + 1e-3 * torch.eye(x_TD.shape[1], dtype=torch.float64)
    lm_heads = [
        torch.linalg.solve(ridge_DD, x_TD.T @ torch.cat(law).double()).T.float().contiguous()
        for law in laws
    ]
    return with_lm_heads(lm_heads, target)


@pytest.fixture(scope="module")
def target():
    return tiny_decoder()


@pytest.fixture(scope="module")
def fitted(target):
    return fitted_head(target)


def engine(target, head, **options):
    return tiny_engine(
        target=target, drafters=[MedusaDrafter], heads={"medusa": head}, draft_seed=None, **options
    )


def asks(k=K, width=1, method=None, **more):
    return SpeculationParams(
        method="medusa",
        num_draft_tokens=k,
        width=width,
        draft_sample_method=method,
        policy="fixed",
        **more,
    )


def drafter_of(used):
    return used.drafters["medusa"]


def rate(used):
    return used.stats.num_accepted_tokens / used.stats.num_draft_tokens


def drafts_of(used, **plans):
    """Notes every (log, plan, tree, sequence) to come; `plans` are set in every plan."""
    drafter, made = drafter_of(used), []
    draft = drafter.draft

    def noted(rows, plan):
        plan = [part._replace(**plans) for part in plan]
        trees = draft(rows, plan)
        for row, part, tree in zip(rows, plan, trees, strict=True):
            tree.check()
            made.append((list(row.seq.tokens), part, tree, row.seq))
        return trees

    drafter.draft = noted
    return made


def logits_after(used, tokens, num_heads=K):
    """logits_KV of the heads where the last token is the root."""
    _, states_TD = passed(used.runner.network, tokens[:-1])
    return drafter_of(used).network.forward(states_TD[-1:], num_heads)[0]


def test_the_conformance_suite(target, fitted):
    check_drafter(MedusaDrafter, target=target, heads={"medusa": fitted})


def markov_target(hidden=288):
    """The next token depends on the last alone: no layer adds anything to the embedding."""
    config = DecoderConfig.from_dict({**TINY, "hidden_size": hidden, "tie_word_embeddings": False})
    generator = torch.Generator().manual_seed(4)
    tensors = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * ("o_proj" not in name and "down" not in name)
        for name, shape in tensor_shapes(config).items()
    }
    return Decoder(config, tensors, choose(), name="markov", eos_token_ids=(3,))


@torch.inference_mode()
def oracle_head(target, num_heads):
    """After token v, head i says what the target says after v's successor of order i + 1."""
    x_VD = target.final_norm(target.embed(torch.arange(target.spec.vocab_size)))
    logits_VV = target.head(x_VD)
    successor_V = logits_VV.argmax(dim=1)
    inverse_DV = torch.linalg.pinv(x_VD.double())
    lm_heads, after_V = [], successor_V
    for _ in range(num_heads):
        lm_heads.append((inverse_DV @ logits_VV[after_V].double()).T.float().contiguous())
        after_V = successor_V[after_V]
    return with_lm_heads(lm_heads, target)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_heads_that_know_the_target_are_accepted_whole_on_every_call(k, width):
    """Of a greedy text; a head that is one token off is not."""
    target = markov_target()
    used = engine(target, oracle_head(target, 4))
    made = drafts_of(used)
    long = replace(GREEDY, max_tokens=41)
    tokens = run(used, [request(speculation=asks(k, width), sampling=long)])["r", 0]
    text = [*request().prompt_token_ids, *tokens]
    assert made.pop(0)[2] is EMPTY_TREE, "before the first pass there is no state"
    for log, _, tree, _ in made:
        rest = text[len(log) :][:k]
        assert longest(tree, rest) == rest
        assert len(tree) == min(k, len(text) - len(log) - 1) * width or width > 1
    assert len(made) == math.ceil(40 / (k + 1))


def longest(tree, tokens):
    """The path from the root that follows these tokens as far as it can."""
    node, path = -1, []
    for token in tokens:
        found = [child for child in tree.children(node) if tree.tokens[child] == token]
        if not found:
            break
        node = found[0]
        path.append(token)
    return path


@pytest.mark.parametrize("sampling", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("speculation", [asks(), asks(width=3), OFF], ids=["chain", "tree", "off"])
def test_after_every_step_the_state_is_that_of_a_fresh_pass(target, fitted, sampling, speculation):
    """Bit for bit: after rejections, off the first branch, in chunks, resumed, and for forks."""
    used = engine(
        target,
        fitted,
        num_blocks=30,
        options={
            "max_num_batched_tokens": 24,
            "max_num_seqs": 5,
            "max_model_len": 60,
            "long_prefill_token_threshold": 5,
        },
    )
    medusa = asks(width=2)
    for i in range(5):
        asked = medusa if i == 0 else speculation
        used.add(request(f"r{i}", asked, sampling, length=6 + 5 * i, seed=i))
    used.add(request("three", medusa, replace(sampling, n=3), seed=9))
    num_compared = 0
    while used.has_work():
        used.step()
        for seq in used.scheduler.running:
            state = seq.drafter_state.get("medusa")
            if state is None or state.state_D is None:
                continue
            assert state.position == len(seq.tokens) - 2
            _, states_TD = passed(target, seq.tokens[:-1])
            assert torch.equal(state.state_D, states_TD[-1]), seq.id
            num_compared += 1
    assert num_compared > 40
    assert used.stats.num_preemptions > 0
    assert used.stats.num_accepted_tokens > 0


def test_drafts_are_the_likeliest_tokens_of_each_head(target, fitted):
    used = engine(target, fitted)
    chains, wide = drafts_of(used), []
    run(used, [request(f"r{i}", asks(), seed=i) for i in range(4)])
    for log, _, tree, _ in chains:
        if tree:
            logits_KV = logits_after(used, log)
            expected = logits_KV.argmax(dim=1).tolist()[: len(tree)]
            assert (tree.is_chain, list(tree.tokens)) == (True, expected)
            assert (tree.source, tree.laws) == ("medusa", ())
    used = engine(target, fitted)
    wide = drafts_of(used)
    run(used, [request(f"r{i}", asks(width=4), seed=i) for i in range(4)])
    for log, plan, tree, _ in wide:
        if tree:
            laws_KV = logits_after(used, log)[: plan.depth].softmax(dim=1)
            assert paths(tree) == best_paths(laws_KV, plan.width, plan.num_nodes)
    assert sum(len(tree) for *_, tree, _ in wide) > 100


def paths(tree):
    return {tree.path_tokens(node) for node in range(len(tree))}


def best_paths(laws_KV, width, num_nodes):
    """All products of the `width` likeliest tokens of each depth, and of those the best."""
    ranked = [law_V.double().topk(width) for law_V in laws_KV]
    worth = {}
    for depth in range(1, len(ranked) + 1):
        for ranks in itertools.product(range(width), repeat=depth):
            path = tuple(int(ranked[d].indices[rank]) for d, rank in enumerate(ranks))
            worth[path] = math.prod(float(ranked[d].values[rank]) for d, rank in enumerate(ranks))
    return set(sorted(worth, key=lambda path: -worth[path])[:num_nodes])


@pytest.mark.parametrize(
    ("width", "stop"),
    [(1, None), (1, StopRule(0.3, 1.0, 1.0, 0.2)), (3, None)],
    ids=["chain", "stopped", "tree"],
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_those_of_one_law_per_node(target, fitted, kind, method, width, stop):
    """The twin takes no short cut: each node's law is the head's row, shaped along its path."""
    used, num_compared = engine(target, fitted), 0
    drafter = drafter_of(used)
    draft = drafter.draft

    def compared(rows, plan):
        nonlocal num_compared
        plan = [part._replace(stop=stop) for part in plan]
        trees = draft(rows, plan)
        for row, part, tree in zip(rows, plan, trees, strict=True):
            if tree:
                twin = by_laws(used, row.seq, part)
                assert paths(tree) == paths(twin)
                if width == 1 or tree.laws:
                    assert (tree.tokens, tree.parents, tree.paths) == (
                        twin.tokens, twin.parents, twin.paths)  # fmt: skip
                assert len(tree.laws) == len(twin.laws)
                for law_V, twin_V in zip(tree.laws, twin.laws, strict=True):
                    torch.testing.assert_close(law_V, twin_V, atol=1e-12, rtol=1e-9)
                assert tree.confidence == pytest.approx(twin.confidence, abs=1e-5)
                num_compared += 1
        return trees

    drafter.draft = compared
    is_drawn = method in ("probabilistic", "independent")
    rule = {1: "rejection", 3: "tree"}[width] if is_drawn else None
    run(
        used,
        [
            request(f"r{i}", asks(k, width, method, verifier=rule), other_temperature(kind, i))
            for i, k in enumerate((K, 2))
        ],
    )
    assert num_compared > 5


def other_temperature(kind, index):
    """Side by side with one another: a mixed-up temperature would tell."""
    sampling = KINDS[kind]
    return replace(
        sampling, temperature=sampling.temperature * (0.15, 1.5)[index], max_tokens=16 - 8 * index
    )


def by_laws(used, seq, plan):
    """The draft that the request asks for, grown node by node."""
    growth, shaper = plant(seq, plan._replace(depth=min(plan.depth, K))), seq.shaper
    if shaper.is_greedy and (plan.width > 1 or plan.stop is not None):
        shaper = make_ranker(seq, used.spec.vocab_size, used.spec.eos_token_ids)
    logits_KV = logits_after(used, seq.tokens)
    while nodes := growth.wanted():
        above = [growth.path_tokens(node) for node in nodes]
        growth.take([draft_law(seq, logits_KV[len(path)], path, shaper) for path in above])
    return growth.tree("medusa")


def test_penalties_shape_trees_along_their_paths(target, fitted):
    """A token that was drafted above weighs less below, so no one law serves a whole depth."""
    used = engine(target, fitted)
    made, differ = drafts_of(used), 0
    asked = asks(width=3, method="greedy")
    run(used, [request(f"r{i}", asked, KINDS["penalized"], seed=i) for i in range(4)])
    for log, plan, tree, _ in made:
        if tree:
            laws_KV = logits_after(used, log)[: plan.depth].softmax(dim=1)
            differ += paths(tree) != best_paths(laws_KV, plan.width, plan.num_nodes)
    assert differ > 10


@pytest.mark.parametrize(
    ("method", "num_laws", "num_argmax"),
    [("greedy", 0, 1), ("coupled", 1, 0), ("probabilistic", 1, 0)],
)
def test_nothing_is_made_that_no_draft_is_made_of(
    target, fitted, monkeypatch, method, num_laws, num_argmax
):
    """Laws of all depths in one go, or argmax tokens that a temperature cannot change."""
    used = engine(target, fitted)
    used.add(request("r", asks(method=method), KINDS["sampled"]))
    for _ in range(4):
        used.step()
    (seq,) = used.scheduler.running
    plan = RowPlan("medusa", K, 1, K)
    expected = by_laws(used, seq, plan)
    made, network = {"laws": 0, "argmax": 0}, drafter_of(used).network

    def counted(kind, plain):
        def call(*parts):
            made[kind] += 1
            return plain(*parts)

        return call

    monkeypatch.setattr(feeding, "laws_together", counted("laws", feeding.laws_together))
    monkeypatch.setattr(network.ops, "argmax", counted("argmax", network.ops.argmax))
    tree = drafted(used, seq, plan)
    assert (tree.tokens, tree.parents) == (expected.tokens, expected.parents)
    assert (made["laws"], made["argmax"]) == (num_laws, num_argmax)


def test_a_step_is_one_pass_of_the_heads_that_are_wanted(target, fitted):
    used = engine(target, fitted)
    network, asked = drafter_of(used).network, []
    forward = network.forward

    def noted(states_RD, num_heads):
        asked.append((len(states_RD), num_heads))
        return forward(states_RD, num_heads)

    network.forward = noted
    for i, k in enumerate((1, 2, 1)):
        used.add(request(f"r{i}", asks(k), seed=i))
    used.step()
    used.step()
    assert asked == [(3, 2)]
    assert drafter_of(used).num_forwards == 1


def test_no_draft_is_deeper_than_there_are_heads(target, fitted, caplog):
    used = engine(target, fitted)
    made = drafts_of(used)
    run(used, [request(f"r{w}", asks(K, w, num_nodes=w * 8), seed=w) for w in (1, 4)])
    _say_less.cache_clear()
    deeper = used.resolve(asks(8), GREEDY)
    assert deeper.num_draft_tokens == K
    assert f"a K of 8: medusa guesses at most {K} " in caplog.text
    named = SpeculationParams(method="medusa", policy="table", policy_options={"table": "1-:9"})
    used = engine(target, fitted, controller=make_controller(1024, Facts()))
    assert used.resolve(named, GREEDY).num_draft_tokens == K
    assert f"a K of 9: medusa guesses at most {K} " in caplog.text
    assert drafter_of(used).default_draft_tokens == K
    deepest = {plan.width: 0 for _, plan, *_ in made}
    for _, plan, tree, _ in made:
        depths = [tree.depth(node) for node in range(len(tree))]
        deepest[plan.width] = max([deepest[plan.width], *depths])
    assert deepest == {1: K, 4: K}


def test_a_sequence_is_drafted_for_from_its_second_pass_on(target, fitted):
    """In chunks, after preemption, and when all of the prompt was cached but its last block."""
    used = engine(target, fitted, options={"long_prefill_token_threshold": 7})
    made = drafts_of(used)
    run(used, [request("r", asks(), length=20)])
    assert [bool(tree) for *_, tree, _ in made[:2]] == [False, True]
    assert all(tree for *_, tree, _ in made[1:])
    made.clear()
    run(used, [request("again", asks(), length=20)])
    assert used.manager.hits > 0
    assert [bool(tree) for *_, tree, _ in made[:2]] == [False, True]
    pressed = engine(
        target, fitted, num_blocks=16, options={"max_model_len": 40, "enable_prefix_caching": False}
    )
    made = drafts_of(pressed)
    run(pressed, [request(f"r{i}", asks(), seed=i) for i in range(3)])
    assert pressed.stats.num_preemptions > 0
    num_empty = sum(not tree for *_, tree, _ in made)
    assert num_empty == 3 + pressed.stats.num_preemptions


def test_what_is_kept_is_one_row_per_sequence(target, fitted):
    used = engine(target, fitted)
    for i in range(3):
        used.add(request(f"r{i}", asks(), length=20, seed=i))
    used.step()
    for seq in used.scheduler.running:
        kept = seq.drafter_state["medusa"].state_D.untyped_storage().nbytes()
        assert kept == 3 * target.spec.hidden_size * 4


def in_flight(used, num_steps=4, **asked):
    used.add(request("r", asks(**asked)))
    for _ in range(num_steps):
        used.step()
    (seq,) = used.scheduler.running
    return seq


def drafted(used, seq, plan=RowPlan("medusa", K, 1, K)):
    return drafter_of(used).draft([Row(seq, 1, plan.num_nodes)], [plan])[0]


def test_a_snapshot_is_the_state_and_no_more(target, fitted):
    used = engine(target, fitted)
    seq, drafter = in_flight(used), drafter_of(used)
    expected = drafted(used, seq)
    snapshot = drafter.snapshot(seq)
    assert snapshot.num_tokens == len(seq.tokens)
    saved = pickle.dumps(snapshot)
    assert len(saved) < 1500
    drafter.close(seq)
    assert "medusa" not in seq.drafter_state
    drafter.open(seq)
    assert drafter.snapshot(seq) is None
    assert drafted(used, seq) is EMPTY_TREE
    assert drafter.restore(seq, pickle.loads(saved)) == len(seq.tokens)
    assert drafted(used, seq) == expected
    seq.tokens.append(7)  # the log went on elsewhere
    assert drafted(used, seq) is EMPTY_TREE
    assert drafter.restore(seq, pickle.loads(saved)) == 0
    assert drafted(used, seq) is EMPTY_TREE


def test_logits_that_are_no_numbers_end_the_draft(target, fitted):
    used = engine(target, fitted)
    seq, network = in_flight(used), drafter_of(used).network
    forward = network.forward

    def broken(states_RD, num_heads):
        logits_RKV = forward(states_RD, num_heads).clone()
        logits_RKV[:, 1] = float("nan")
        return logits_RKV

    whole = drafted(used, seq)
    network.forward = broken
    assert drafted(used, seq).tokens == whole.tokens[:1]
    tree = drafted(used, seq, RowPlan("medusa", K, 3, 9))
    assert tree.parents == (-1, -1, -1)


@pytest.mark.parametrize("width", [1, 3])
def test_a_truncated_vocabulary_drafts_its_own_tokens_alone(target, width):
    ids = torch.tensor([40, 33, 90, 77])
    generator = torch.Generator().manual_seed(0)
    whole = random_head(target)
    tensors = {**whole.tensors, "target_ids": ids}
    for i in range(K):
        made = torch.randn(len(ids), target.spec.hidden_size, generator=generator)
        tensors[f"heads.{i}.lm_head.weight"] = made
    used = engine(target, Head(whole.spec, tensors))
    made = drafts_of(used)
    run(used, [request("r", asks(K, width, num_nodes=40))])
    drafted_ids = {token for *_, tree, _ in made for token in tree.tokens}
    assert drafted_ids <= set(ids.tolist())
    assert max(len(tree) for *_, tree, _ in made) == (K if width == 1 else 3 + 9 + 27)


def test_a_target_in_bfloat16(fitted):
    """Tokens are those of plain decoding there, and the heads are as good as in float32."""
    config = DecoderConfig.from_dict(TINY)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.25
        for name, shape in tensor_shapes(config).items()
        if name != "lm_head.weight"
    }
    ops = choose("torch", dtype="bfloat16")
    half = Decoder(config, tensors, ops, eos_token_ids=(3,), dtype=torch.bfloat16)
    for width in (1, 3):
        used = engine(half, fitted)
        run(used, [request(f"r{i}", asks(width=width), seed=i) for i in range(4)])
        assert used.stats.num_accepted_tokens > 10
        seq = in_flight(used)
        assert seq.drafter_state["medusa"].state_D.dtype == torch.bfloat16
        assert drafter_of(used).snapshot(seq).state.dtype == torch.bfloat16


def surroundings(network, heads):
    runner = SimpleNamespace(network=network, pool=None)
    return Surroundings(target=ModelParts(runner=runner, manager=None), heads=heads)


def test_it_is_built_from_heads_and_a_target_that_shows_its_states(target, fitted):
    built = MedusaDrafter.build(surroundings(target, {"medusa": fitted}))
    assert (built.boundaries, built.default_draft_tokens) == ((2,), K)
    with pytest.raises(ConfigError, match="'medusa' runs a draft head trained for the target"):
        MedusaDrafter.build(surroundings(target, {"eagle": fitted}))
    adapted = SimpleNamespace(spec=SimpleNamespace(name="their model"))
    with pytest.raises(ConfigError, match=r"'medusa' reads hidden states.*'their model'"):
        MedusaDrafter.build(surroundings(adapted, {"medusa": fitted}))
