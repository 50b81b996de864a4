"""The block drafter: its context follows the log, its drafts and laws are the reference's.

Shape legend: B sequences, K depths, U vocabulary of the head, V of the target.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from outrider.draft.block import BlockDrafter
from outrider.errors import ConfigError
from outrider.models.heads.block_network import BlockOutput
from outrider.models.heads.spec import (
    Conventions,
    DecoderShape,
    Family,
    Head,
    HeadSpec,
    MarkovShape,
    Widths,
)
from outrider.models.rope_scaling import RopeConfig
from outrider.request import SamplingParams, SpeculationParams
from outrider.step import EMPTY_TREE, Row, RowPlan, StopRule
from outrider.testing import check_drafter, events, run, tiny_decoder, tiny_engine
from tests.draft.draft_models import OFF, request
from tests.models.heads.block_reference import ReferenceBlock
from tests.models.heads.layouts import Random

H, V, L, BLOCK, RANK = 32, 256, 4, 6, 5
FEATURES = (3, 1)
IDS = tuple(range(1, V, 3))
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9)
SHAPED = replace(GREEDY, temperature=1.2, top_k=30, repetition_penalty=1.3)
METHODS = ("greedy", "coupled", "probabilistic", "independent")
FINISHES = (None, "vanilla", "gated", "rnn")
KINDS = (None, "rnn")


def the_head(
    *,
    finish=None,
    confidence="none",
    masks=("bidirectional", "bidirectional"),
    windows=(0, 0),
    ids=None,
    anchor=False,
    block=BLOCK,
    seed=0,
    sharp=0.3,
    max_positions=256,
):
    """A random head of two layers on a target of H, V and L."""
    random = Random(seed)
    tensors = {"fc.weight": random(H, 2 * H), "hidden_norm.weight": random.gain(H)}
    for index in range(2):
        start = f"layers.{index}."
        shapes = {
            "self_attn.q_proj": (32, H),
            "self_attn.k_proj": (16, H),
            "self_attn.v_proj": (16, H),
            "self_attn.o_proj": (H, 32),
            "mlp.gate_proj": (48, H),
            "mlp.up_proj": (48, H),
            "mlp.down_proj": (H, 48),
        }
        tensors |= {f"{start}{name}.weight": random(*shape) for name, shape in shapes.items()}
        for name, width in (("input_layernorm", H), ("post_attention_layernorm", H)):
            tensors[f"{start}{name}.weight"] = random.gain(width)
        tensors |= {f"{start}self_attn.{n}_norm.weight": random.gain(8) for n in "qk"}
    tensors["norm.weight"] = random.gain(H)
    num_ids = V if ids is None else len(ids)
    tensors["lm_head.weight"] = random(num_ids, H) * sharp / 0.3
    if ids is not None:
        tensors["target_ids"] = torch.tensor(ids)
    if finish is not None:
        tensors |= {"markov.w1": random(V, RANK) * 3, "markov.w2": random(num_ids, RANK) * 3}
    if finish == "gated":
        tensors["markov.gate.weight"] = random(RANK, H + RANK)
    if finish == "rnn":
        tensors["markov.joint.weight"] = random(3 * RANK, 2 * RANK + H)
    if confidence != "none":
        reads = H + (RANK if confidence == "state-and-token" else 0)
        tensors |= {"confidence.weight": random(1, reads), "confidence.bias": random(1)}
    rope = RopeConfig(
        kind="default",
        theta=700.0,
        width=8,
        max_positions=max_positions,
        original_max_positions=max_positions,
    )
    spec = HeadSpec(
        family=Family.BLOCK,
        widths=Widths(target_hidden=H, hidden=H, vocab=V, draft_vocab=num_ids, num_features=2),
        conventions=Conventions(
            feature_layers=FEATURES,
            lm_head="own",
            block_masks=masks,
            sample_from_anchor=anchor,
        ),
        decoder=DecoderShape(
            family="qwen3",
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=48,
            has_qkv_bias=False,
            has_output_bias=False,
            has_qk_norm=True,
            norm_eps=1e-5,
            rope=rope,
            windows=windows,
        ),
        markov=finish and MarkovShape(kind=finish, rank=RANK, confidence=confidence),
        mask_token_id=2,
        block_size=block,
        source="tiny-block",
    )
    return Head(spec, tensors)


HEADS = {
    "dflash": {},
    "causal": {"masks": ("causal", "causal")},
    "mixed": {"masks": ("bidirectional", "causal"), "windows": (0, 7)},
    "anchor": {"anchor": True},
    "few tokens": {"ids": IDS},
    "vanilla": {"finish": "vanilla"},
    "gated": {"finish": "gated", "anchor": True},
    "rnn": {"finish": "rnn", "ids": IDS},
}


@pytest.fixture(scope="module")
def target():
    return tiny_decoder(num_hidden_layers=L)


def asks(method="coupled", k=5, width=1, **more):
    return SpeculationParams(
        method="block", num_draft_tokens=k, width=width, draft_sample_method=method, **more
    )


def requests(sampling, speculation, count=4):
    return [request(f"r{i}", speculation, sampling, length=5 + 3 * i, seed=i) for i in range(count)]


def engine(target, head, drafter=BlockDrafter, *, num_blocks=256, **options):
    return tiny_engine(
        target=target,
        heads={"block": head},
        drafters=[drafter],
        draft_seed=None,
        num_blocks=num_blocks,
        options=options,
    )


class Steered(BlockDrafter):
    """Drafts the true text for some tokens, and goes its own way after that; notes what it made.

    Attributes:
        truths: whole texts, by prompt and place among completions.
        made: (log, logits over the head's vocabulary of each depth) before they were steered.
        num_right: from the length of the log and the depth, how many tokens are to be true.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.truths, self.made = {}, []
        self.num_right = lambda length, depth: (5 * length) % (depth + 2)

    def _run_block(self, drafts, depth):
        states_RD, logits_RU = super()._run_block(drafts, depth)
        output = BlockOutput(states_RD, logits_RU.clone())
        for at, draft in enumerate(drafts):
            seq, rows = draft.grower.seq, output.logits_RU[at * depth : (at + 1) * depth]
            self.made.append((list(seq.tokens), draft.depth, rows.clone()))
            truth = self.truths.get(seq.id, ())[len(seq.tokens) :]
            for row, token in zip(
                rows[: self.num_right(len(seq.tokens), depth)], truth, strict=False
            ):
                known = IDS if len(row) < V else range(V)
                if token in known:
                    row[known.index(token)] += 200.0
        return output


def steer(used, target, asked):
    """Tells the drafter the texts that plain decoding makes; returns its tokens."""
    plain = run(
        tiny_engine(target=target, draft_seed=None),
        [replace(each, speculation=OFF) for each in asked],
    )
    prompts = {each.id: list(each.prompt_token_ids) for each in asked}
    used.drafters["block"].truths = {
        f"{name}#{index}": prompts[name] + tokens for (name, index), tokens in plain.items()
    }
    return plain


def check_made(head, target, made, stride=1):
    """All of it is what the reference says of that log."""
    reference = ReferenceBlock(head, target)
    assert len(made) > 10
    for tokens, depth, logits_KU in made[::stride]:
        _, expected_TU = reference.block(tokens)
        for at in range(depth):
            expected_U = expected_TU[reference.slot(at + 1)]
            scale = max(float(expected_U.abs().max()), 1.0)
            assert float((logits_KU[at] - expected_U).abs().max()) < 1e-5 * scale, len(tokens)


@pytest.mark.parametrize("name", HEADS)
def test_every_draft_is_the_references_of_the_whole_log(target, name):
    """Lengths differ, some drafts are rejected early and some stand; nothing cached is stale."""
    head = the_head(**HEADS[name])
    used, asked = engine(target, head, Steered), requests(SAMPLED, asks(k=5))
    plain = steer(used, target, asked)
    assert run(used, asked) == plain
    assert 0 < used.stats.num_accepted_tokens < used.stats.num_draft_tokens
    check_made(head, target, used.drafters["block"].made)


def test_trees_too_leave_no_trace(target):
    """Kept nodes stand anywhere among the rows of the pass."""
    head = the_head(finish="rnn")
    used, asked = engine(target, head, Steered), requests(GREEDY, asks("greedy", width=3))
    plain = steer(used, target, asked)
    assert run(used, asked) == plain
    assert used.stats.num_accepted_tokens > 20
    check_made(head, target, used.drafters["block"].made)


def test_under_preemption_and_in_chunks(target):
    head = the_head()
    pressed = {
        "max_model_len": 80,
        "max_num_batched_tokens": 20,
        "max_num_seqs": 4,
        "long_prefill_token_threshold": 6,
    }
    used, asked = engine(target, head, Steered, num_blocks=20, **pressed), requests(SAMPLED, asks())
    plain = steer(used, target, asked)
    assert run(used, asked) == plain
    assert used.stats.num_preemptions > 0
    drafter = used.drafters["block"]
    check_made(head, target, drafter.made)
    assert drafter.manager.num_used == 0


def test_completions_of_one_request(target):
    head = the_head()
    used = engine(target, head, Steered)
    asked = [request("r", asks(), replace(SAMPLED, n=3), length=11)]
    plain = steer(used, target, asked)
    assert run(used, asked) == plain
    drafter = used.drafters["block"]
    assert {tuple(tokens[:11]) for tokens, _, _ in drafter.made} == {asked[0].prompt_token_ids}
    check_made(head, target, drafter.made)
    assert drafter.num_cold_starts == 0


def test_a_cached_prefix_brings_its_context(target):
    """A turn that goes on from another's text drafts in its first step after the prompt."""
    head = the_head()
    used = engine(target, head, Steered)
    first = request("a", asks(), GREEDY, length=21)
    answer = run(used, [first])["a", 0]
    longer = (*first.prompt_token_ids, *answer, 41, 42, 43, 44, 45)
    second = replace(first, id="b", prompt_token_ids=longer)
    drafter = used.drafters["block"]
    drafter.made.clear()
    rows, write = [], drafter.runner.run
    drafter.runner.run = lambda pieces: (
        rows.append(sum(len(p.chain) for p in pieces)) or write(pieces)
    )
    (seq,) = standing(used, [second], 1).values()
    assert seq.num_prefix_hits > 30
    while used.has_work():
        used.step()
    assert drafter.num_cold_starts == 0
    assert sum(rows) < 24 + 20, "rows of the prefix are not run again"
    check_made(head, target, drafter.made)


def test_features_wait_while_nobody_drafts(target, monkeypatch):
    monkeypatch.setattr("outrider.draft.head_rows.MAX_WAITING", 9)
    head = the_head()
    used = engine(target, head, Steered)
    asked = requests(SAMPLED, asks())
    steer(used, target, asked)
    for each in asked:
        used.add(each)
    make, drafter = used.controller.plan, used.drafters["block"]
    used.controller.plan = lambda batch: [RowPlan() for _ in batch.rows]
    for _ in range(14):
        used.step()
    assert not drafter.made
    assert all(s.drafter_state["block"].num_rows for s in used.scheduler.running)
    assert all(s.drafter_state["block"].num_waiting <= 9 for s in used.scheduler.running)
    used.controller.plan = make
    waiting = list(used.scheduler.running)
    while used.has_work():
        used.step()
    assert {seq.id: seq.tokens for seq in waiting} == drafter.truths
    check_made(head, target, drafter.made)


def test_a_first_token_may_be_all_there_is(target):
    """Then there is no context yet, and the block sees itself alone."""
    head = the_head()
    used = engine(target, head, Steered)
    asked = [request(f"r{i}", asks(), SAMPLED, length=1 + 8 * i, seed=i) for i in range(2)]
    plain = steer(used, target, asked)
    assert run(used, asked) == plain
    made = used.drafters["block"].made
    assert len(made[0][0]) == 1
    check_made(head, target, made)


@pytest.mark.parametrize("finish", KINDS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SHAPED], ids=["greedy", "drawn", "shaped"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [1, 3])
def test_same_tokens_as_plain_decoding(target, width, method, sampling, finish):
    used = engine(target, the_head(finish=finish), Steered)
    asked = requests(sampling, asks(method, width=width), 3)
    plain = steer(used, target, asked)
    assert run(used, asked) == plain
    assert used.stats.num_accepted_tokens > 0


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_head_that_knows_the_target_is_accepted_fully(target, sampling, finish):
    used = engine(target, the_head(finish=finish), Steered)
    drafter = used.drafters["block"]
    drafter.num_right = lambda length, depth: depth
    asked = requests(sampling, asks("coupled"))
    steer(used, target, asked)
    told = events(used, asked)
    for es in told.values():
        metrics = es[-1].metrics
        # The prompt's step, and then 5 guesses and one more in each.
        assert [len(e.token_ids) for e in es][:4] == [1, 6, 6, 6]
        assert metrics.num_accepted_tokens == metrics.num_draft_tokens


@pytest.mark.parametrize(("finish", "width"), [(None, 1), (None, 3), ("rnn", 1), ("rnn", 3)])
def test_one_pass_per_step_and_one_for_context(target, finish, width):
    used = engine(target, the_head(finish=finish))
    for each in requests(SAMPLED, asks(width=width)):
        used.add(each)
    used.step()
    drafter = used.drafters["block"]
    before = drafter.num_forwards
    assert before <= 1, "context of the prompt, for others that come with it"
    for count in range(1, 5):
        used.step()
        assert drafter.num_forwards == before + 2 * count


def standing(used, asked, num_steps=3):
    """Sequences in mid-flight, by id."""
    for each in asked:
        used.add(each)
    for _ in range(num_steps):
        used.step()
    return {seq.id: seq for seq in used.scheduler.running}


def draft(used, seq, depth, width=1, num_nodes=None, stop=None):
    plan = RowPlan("block", depth, width, num_nodes or depth * width, stop)
    (tree,) = used.drafters["block"].draft([Row(seq, 1, plan.num_nodes)], [plan])
    return tree


@pytest.mark.parametrize("name", ["dflash", "few tokens", "gated", "rnn"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("method", ["probabilistic", "independent"])
def test_recorded_laws_are_the_references_along_the_path(target, name, method, width):
    head = the_head(**HEADS[name])
    reference = ReferenceBlock(head, target)
    used = engine(target, head)
    for seq in standing(used, requests(SAMPLED, asks(method, width=width), 2)).values():
        tree = draft(used, seq, 3, width)
        assert len(tree.laws) == len(tree) >= 3
        for node in range(len(tree)):
            path = tree.path_tokens(node)[:-1]
            logits_V = reference.logits(seq.tokens, list(path))
            law_V = (logits_V.double() / 0.9).softmax(dim=0)
            if method == "probabilistic":
                siblings = tree.children(tree.parents[node])
                for earlier in siblings[: siblings.index(node)]:
                    law_V[tree.tokens[earlier]] = 0.0
            assert torch.allclose(tree.law(node), law_V / law_V.sum(), atol=1e-5)


def test_penalties_count_the_tokens_drafted_before(target):
    head = the_head(finish="vanilla")
    reference = ReferenceBlock(head, target)
    used = engine(target, head)
    sampling = replace(GREEDY, frequency_penalty=2.0, presence_penalty=2.0)
    (seq,) = standing(used, requests(sampling, asks(), 1)).values()
    tree = draft(used, seq, 5)
    for depth, token in enumerate(tree.tokens):
        path = tree.tokens[:depth]
        shaped_V = seq.shaper.shape(reference.logits(seq.tokens, list(path)), seq.tokens, path)
        assert int(shaped_V.argmax()) == token


def test_a_tree_holds_the_best_nodes_of_all(target):
    """DDTree: the likeliest prefixes under the product of the marginals, by trying all."""
    head = the_head(sharp=2.0)
    reference, num_nodes = ReferenceBlock(head, target), 9
    used = engine(target, head)
    for seq in standing(used, requests(GREEDY, asks("greedy", width=9), 3)).values():
        tree = draft(used, seq, 3, 9, num_nodes)
        logs = [
            reference.logits(seq.tokens, [0] * depth).double().log_softmax(dim=0)
            for depth in range(3)
        ]
        best = [log.topk(num_nodes).indices.tolist() for log in logs]
        value = {
            path: sum(float(log[token]) for log, token in zip(logs, path, strict=False))
            for depth in range(1, 4)
            for path in itertools.product(*best[:depth])
        }
        expected = sorted(value, key=value.__getitem__, reverse=True)[:num_nodes]
        found = [tree.path_tokens(node) for node in range(len(tree))]
        assert sorted(found) == sorted(expected)
        assert max(tree.depth(node) for node in range(len(tree))) > 1


def test_a_tree_of_corrected_laws_expands_the_likeliest(target):
    """Every node's children are the likeliest by the law that follows its own path."""
    head = the_head(finish="rnn", sharp=2.0)
    reference = ReferenceBlock(head, target)
    used = engine(target, head)
    (seq,) = standing(used, requests(GREEDY, asks("greedy", width=2), 1)).values()
    tree = draft(used, seq, 4, 2, 8)
    inner = [node for node in (-1, *range(len(tree))) if tree.children(node)]
    assert len(inner) > 2
    for node in inner:
        children = [tree.tokens[child] for child in tree.children(node)]
        logits_V = reference.logits(seq.tokens, list(tree.path_tokens(node)))
        assert children == logits_V.topk(len(children)).indices.tolist()


@pytest.mark.parametrize(("anchor", "most"), [(False, BLOCK - 1), (True, BLOCK)])
def test_drafts_are_no_deeper_than_a_block(target, anchor, most):
    used = engine(target, the_head(anchor=anchor))
    assert used.drafters["block"].default_draft_tokens == most
    (seq,) = standing(used, requests(GREEDY, asks("greedy"), 1)).values()
    assert len(draft(used, seq, 30)) == most
    assert draft(used, seq, 2).tokens == draft(used, seq, 30).tokens[:2]
    deep = requests(GREEDY, asks("greedy", k=most), 2)
    used = engine(target, the_head(anchor=anchor), Steered)
    plain = steer(used, target, deep)
    assert run(used, deep) == plain
    assert used.resolve(asks("greedy", k=40), GREEDY).num_draft_tokens == most


def test_drafts_end_where_the_heads_positions_do(target):
    head = the_head(max_positions=20)
    used = engine(target, head, Steered)
    asked = requests(GREEDY, asks("greedy"), 1)
    plain = steer(used, target, asked)
    assert run(used, asked) == plain
    reach = [len(tokens) - 1 + depth for tokens, depth, _ in used.drafters["block"].made]
    assert max(reach) == 20


RULE = StopRule(0.3, 1.0, 1.0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("confidence", ["state", "state-and-token"])
def test_a_chains_confidence_is_what_the_head_says(target, confidence, sampling):
    head = the_head(finish="rnn", confidence=confidence)
    reference = ReferenceBlock(head, target)
    used = engine(target, head)
    ended = set()
    for seq in standing(used, requests(sampling, asks("probabilistic"), 4)).values():
        whole = draft(used, seq, 5, stop=StopRule(0.0, 1.0, 0.0))
        told = [reference.told(seq.tokens, list(whole.tokens[:at]))[1] for at in range(5)]
        assert whole.confidence == pytest.approx(told, abs=1e-6)
        assert draft(used, seq, 5).confidence == ()
        short, survival, expected = draft(used, seq, 5, stop=RULE), 1.0, 0
        while expected < 5 and survival >= RULE.floor:
            survival *= RULE.acceptance(told[expected], expected + 1)
            expected += 1
        assert short.tokens == whole.tokens[:expected]
        assert len(short.laws) == (expected if sampling is SAMPLED else 0)
        ended.add(expected)
    assert len(ended) > 1, "all chains end at one depth: the rule was not put to the test"


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_without_an_estimate_it_is_the_largest_probability(target, finish, sampling):
    head = the_head(finish=finish)
    reference = ReferenceBlock(head, target)
    used = engine(target, head)
    (seq,) = standing(used, requests(sampling, asks("coupled"), 1)).values()
    tree = draft(used, seq, 4, stop=StopRule(0.0, 1.0, 0.0))
    for node, told in enumerate(tree.confidence):
        logits_V = reference.logits(seq.tokens, list(tree.tokens[:node])).double()
        peak = (logits_V / (sampling.temperature or 1.0)).softmax(dim=0).max()
        assert told == pytest.approx(float(peak), rel=1e-4)


@pytest.mark.parametrize("stop", [None, RULE], ids=["whole", "stopped"])
@pytest.mark.parametrize("confidence", ["none", "state-and-token"])
@pytest.mark.parametrize("finish", FINISHES[1:])
def test_argmax_chains_ask_the_device_once(target, monkeypatch, finish, confidence, stop):
    """Several at once, one of which meets logits that are no numbers; as if round after round."""
    used = engine(target, the_head(finish=finish, confidence=confidence, ids=IDS))
    drafter, network = used.drafters["block"], used.drafters["block"].network
    seqs = standing(used, requests(GREEDY, asks("greedy"), 4), 4).values()
    rows, plan = [Row(seq, 1, 5) for seq in seqs], [RowPlan("block", 5, 1, 5, stop) for _ in seqs]
    plan[1] = plan[1]._replace(depth=3)
    run_block = drafter._run_block

    def broken(drafts, depth):
        states_RD, logits_RU = run_block(drafts, depth)
        broken_RU = logits_RU.clone()
        broken_RU[2 * depth + 1] = float("nan")
        return BlockOutput(states_RD, broken_RU)

    drafter._run_block = broken
    argmax, num_asked = network.ops.argmax, []
    monkeypatch.setattr(network.ops, "argmax", lambda x: num_asked.append(1) or argmax(x))
    trees = drafter.draft(rows, plan)
    assert not num_asked
    monkeypatch.setattr(drafter, "_follow_argmax", lambda *parts: None)
    expected = drafter.draft(rows, plan)
    assert num_asked
    assert [tree.tokens for tree in trees] == [tree.tokens for tree in expected]
    assert len(trees[2]) == 1
    for tree, other in zip(trees, expected, strict=True):
        assert tree.confidence == pytest.approx(other.confidence, abs=1e-6)
        assert len(tree.confidence) == (0 if stop is None else len(tree))


def test_nothing_is_drafted_while_features_are_missing(target, monkeypatch):
    """As where a prefix of the target is cached that was run without the head, and is too long."""
    monkeypatch.setattr("outrider.draft.head_drafter.MAX_RERUN", 0)
    head = the_head()
    used = engine(target, head, Steered)
    plain = request("plain", OFF, GREEDY, length=40)
    run(used, [plain])
    used.add(replace(plain, id="r", speculation=asks()))
    used.step()
    drafter = used.drafters["block"]
    (seq,) = used.scheduler.running
    assert seq.num_prefix_hits > 30
    assert draft(used, seq, 4) is not EMPTY_TREE
    assert drafter.num_cold_starts == 1
    other = engine(target, head)
    other.add(replace(plain, id="r", speculation=asks()))
    (waiting,) = other.scheduler.waiting()
    other.drafters["block"].open(waiting)
    assert len(draft(other, waiting, 4)) == 0
    other.drafters["block"].close(waiting)


def test_a_short_way_back_is_gone_for_features(target):
    """The last block of a cached prefix is run again where its context is not there."""
    used = engine(target, the_head(), Steered)
    first = request("a", asks(), GREEDY, length=21)
    run(used, [first])
    drafter = used.drafters["block"]
    again = replace(first, id="b")
    used.add(again)
    (seq,) = used.scheduler.waiting()
    position = drafter.first_missing(seq)
    assert position is None or position <= used.manager.match(seq.tokens)
    while used.has_work():
        used.step()
    assert drafter.num_cold_starts == 0


@pytest.mark.parametrize("length", [30, 60])
def test_who_outgrows_the_head_is_neither_read_nor_drafted_for(target, length):
    """A text of 64 tokens with a head of 40 positions; a prefix is not run again for it either."""
    head = the_head(max_positions=40)
    used = engine(target, head, Steered)
    sampling = replace(GREEDY, max_tokens=34)
    asked = request("r", asks(), sampling, length=length)
    plain = run(tiny_engine(target=target, draft_seed=None), [replace(asked, speculation=OFF)])
    drafter = used.drafters["block"]
    num_read, read = [], drafter.rows._read
    drafter.rows._read = lambda tapped: num_read.append(tapped.shape[1]) or read(tapped)
    assert run(used, [asked]) == plain
    assert all(len(tokens) <= 40 for tokens, _, _ in drafter.made)
    assert bool(drafter.made) == (length < 40)
    assert sum(num_read) <= 39
    assert drafter.manager.num_used == 0
    again = replace(asked, id="again", prompt_token_ids=asked.prompt_token_ids[:1] * 50)
    used.add(again)
    (seq,) = used.scheduler.waiting()
    assert drafter.first_missing(seq) is None


def test_a_snapshot_is_the_whole_context(target):
    head = the_head(finish="rnn")
    used, heir = engine(target, head), engine(target, head)
    for seq in standing(used, requests(SAMPLED, asks(), 3), 4).values():
        snapshot = used.drafters["block"].snapshot(seq)
        assert snapshot.num_tokens == len(seq.tokens) - 1
        before = draft(used, seq, 5)
        taken = heir.drafters["block"]
        state = seq.drafter_state.pop("block")
        taken.open(seq)
        assert taken.restore(seq, snapshot) == len(seq.tokens) - 1
        assert draft(heir, seq, 5).tokens == before.tokens
        taken.close(seq)
        assert taken.manager.num_used == 0
        seq.drafter_state["block"] = state


def test_what_it_needs_is_asked_for(target):
    with pytest.raises(ConfigError, match="drafter 'block' runs a draft head"):
        tiny_engine(target=target, drafters=[BlockDrafter], draft_seed=None)
    wrong = the_head()
    wrong = Head(replace(wrong.spec, family=Family.MEDUSA), wrong.tensors)
    with pytest.raises(ConfigError, match="'tiny-block' is of the family medusa, which drafter"):
        engine(target, wrong)
    used = engine(target, the_head())
    assert used.drafters.taps() == ()
    used.add(request("r", asks()))
    assert used.drafters.taps() == tuple(sorted(FEATURES))


@pytest.mark.parametrize(
    "head",
    [{"sharp": 1.0}, pytest.param({"finish": "rnn", "anchor": True}, marks=pytest.mark.slow)],
    ids=["dflash", "dspark"],
)
def test_it_keeps_the_contract(target, head):
    check_drafter(BlockDrafter, target=target, draft_seed=None, heads={"block": the_head(**head)})
