"""EAGLE drafters: drafts are what the plain recursion says, and outputs stay the target's."""

import math
from copy import copy
from dataclasses import replace

import pytest
import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.base import ModelParts, Surroundings
from outrider.draft.eagle import EagleDrafter
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import ConfigError
from outrider.models.base import KVShape
from outrider.models.heads.network import HeadOutput, HeadRunner
from outrider.models.runner import Runner
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import Row, RowPlan, StopRule
from outrider.stream.events import Committed
from outrider.testing import check_drafter, run, tiny_decoder
from tests.models.heads.heads_for_tests import eagle1, eagle3, peagle, states_of, target_decoder
from tests.models.heads.layouts import DRAFT_IDS, L, V
from tests.models.heads.test_eagle_network import features_of, reference_of

OFF = SpeculationParams(method="off")
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=20, temperature=0.9, ignore_eos=True)
K4 = SpeculationParams(method="eagle", num_draft_tokens=4)
TREE = SpeculationParams(
    method="eagle", num_draft_tokens=4, width=3, num_nodes=10, draft_sample_method="greedy"
)
MAKERS = {"eagle1": eagle1, "eagle3": eagle3, "peagle": peagle}


def make_pool(shapes, num_blocks=256, block_size=4, has_prefixes=True):
    pool = KVPool(shapes, num_blocks, block_size, torch.float32, torch.device("cpu"))
    return pool, BlockManager(num_blocks, block_size, has_prefixes)


class Told(EagleDrafter):
    """Keeps what it drafted, and for which log; writes to no block that others may read."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.told = []
        self.num_rows = 0

    def run_pass(self, pieces, depth):
        for table, num_cached, chain, tree, inputs, *_ in pieces:
            num_rows = len(chain) + len(tree)
            assert len(inputs) == num_rows
            self.num_rows += num_rows
            size = table.block_size
            for index in range(num_cached // size, -(-(num_cached + num_rows) // size)):
                assert not self.manager.is_guarded(table.blocks[index])
        return super().run_pass(pieces, depth)

    def draft(self, rows, plan):
        trees = super().draft(rows, plan)
        for row, tree in zip(rows, trees, strict=True):
            self.told.append((row.seq.id, list(row.seq.tokens), tree))
        return trees


def head_engine(head, *, target=None, kind=Told, num_blocks=256, num_head_blocks=None, **options):
    """An engine of the layouts' target with this head, without text."""
    target = target or target_decoder()
    config = EngineConfig(block_size=4, check_integrity=True, **{"max_num_seqs": 16, **options})
    pool, manager = make_pool(
        target.spec.kv_shapes, num_blocks, has_prefixes=config.enable_prefix_caching
    )
    parts = ModelParts(runner=Runner(target, pool), manager=manager)
    count = num_head_blocks or num_blocks

    def head_pool(shapes):
        return make_pool(shapes, count, has_prefixes=config.enable_prefix_caching)

    around = Surroundings(target=parts, heads={"eagle": head}, make_pool=head_pool)
    drafter = kind.build(around)
    return Engine(parts.runner, manager, config, drafters=[drafter], default_drafter="eagle")


def check_pools(engine):
    """No block of the head's pool is lost or held twice."""
    drafter = engine.drafters["eagle"]
    states = [seq.drafter_state.get("eagle") for seq in engine.scheduler.running]
    drafter.manager.check_integrity([state.table for state in states if state is not None])


def serve(engine, requests):
    """Tokens by request and index; the head's pool is checked after every step."""
    tokens = {}
    for asked in requests:
        engine.add(asked)
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Committed):
                tokens.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        check_pools(engine)
    assert engine.drafters["eagle"].manager.num_used == 0
    return tokens


def request(name="r", speculation=K4, sampling=GREEDY, seed=5, length=9, **more):
    prompt = tuple((11 * seed + 3 * j * j) % V for j in range(length))
    return Request(
        id=name,
        prompt_token_ids=prompt,
        sampling=sampling,
        speculation=speculation,
        seed=seed,
        **more,
    )


class Plain:
    """Drafts for a log by the definition: one pass over the whole text, then the recursion."""

    def __init__(self, head, target):
        self.head, self.target = head, target
        self.reference = reference_of(head, target)

    def inputs(self, log):
        tapped = states_of(self.target, log)[1]
        return self.reference.fuse(features_of(self.head, tapped))[: len(log) - 1]

    def logits_along(self, log, path):
        """logits_V of what follows `path` behind the log, over the target's vocabulary."""
        inputs, tokens = self.inputs(log), list(log[1:])
        if "mask_feature" in self.head.tensors:
            mask = self.reference.fuse(self.head.tensors["mask_feature"][None])
            inputs = torch.cat([inputs, mask.expand(len(path), -1)])
            tokens += [self.head.spec.mask_token_id] * len(path)
        rows = self.reference.rows(inputs, torch.tensor(tokens))
        if "mask_feature" not in self.head.tensors:
            for token in path:
                inputs = torch.cat([inputs, rows.feedback_TD[-1:]])
                tokens.append(token)
                rows = self.reference.rows(inputs, torch.tensor(tokens))
        ids = self.head.tensors.get("target_ids", torch.arange(V))
        logits = torch.full((V,), -torch.inf)
        logits[ids] = rows.logits_TV[-1]
        return logits


def assert_drafts_follow_the_definition(engine, head, *, at_least):
    """Every drafted token is the argmax behind its path, or among the likeliest of a tree."""
    plain, count = Plain(head, engine.runner.network), 0
    for _, log, tree in engine.drafters["eagle"].told:
        for node, parent in enumerate(tree.parents):
            path = list(tree.path_tokens(parent)) if parent >= 0 else []
            logits = plain.logits_along(log, path)
            rank = int((logits > logits[tree.tokens[node]] + 1e-4).sum())
            siblings = tree.children(parent)
            assert rank <= siblings.index(node), (log, tree.tokens, node)
            count += 1
    assert count >= at_least, count


ASKED = [("r0", 1, 6), ("r1", 2, 9), ("r2", 3, 13), ("r3", 4, 7)]


@pytest.mark.parametrize("speculation", [K4, TREE], ids=["chains", "trees"])
@pytest.mark.parametrize("kind", MAKERS)
def test_drafts_are_those_of_a_full_recompute(tmp_path, kind, speculation):
    """Batches of mixed lengths, after rejections, with prompts that come in chunks."""
    head = MAKERS[kind](tmp_path)
    engine = head_engine(head, max_num_batched_tokens=18, long_prefill_token_threshold=5)
    requests = [request(n, speculation, seed=s, length=k) for n, s, k in ASKED]
    serve(engine, requests)
    assert_drafts_follow_the_definition(engine, head, at_least=150)
    drafter = engine.drafters["eagle"]
    assert drafter.num_cold_starts == 0


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", MAKERS)
def test_outputs_are_those_without_a_head(tmp_path, kind, sampling):
    """Sampled ones, too: coupled drafts are verified by the target's own draws."""
    head = MAKERS[kind](tmp_path)
    for speculation in (K4, replace(TREE, draft_sample_method=None)):
        engine = head_engine(head)
        plain = run(engine, [request(n, OFF, sampling, s, k) for n, s, k in ASKED])
        drafted = serve(engine, [request(n, speculation, sampling, s, k) for n, s, k in ASKED])
        assert drafted == plain


def checked(head):
    """A class that an engine's makers show their models; it brings the head."""

    class Made(EagleDrafter):
        @classmethod
        def build(cls, surroundings):
            manager = surroundings.target.manager
            return EagleDrafter.build(
                replace(
                    surroundings,
                    heads={"eagle": head},
                    make_pool=lambda shapes: make_pool(
                        shapes, manager.num_blocks, 4, manager.enable_prefix_caching
                    ),
                )
            )

    return Made


@pytest.mark.parametrize("kind", MAKERS)
def test_the_contract_of_drafters(tmp_path, kind):
    target = tiny_decoder(3, hidden_size=16, intermediate_size=24, num_hidden_layers=L)
    head = widened(MAKERS[kind](tmp_path))
    check_drafter(checked(head), target=target)


def widened(head):
    """For the 256 tokens of the target that checks use."""
    size, widths = 256, head.spec.widths
    tensors = dict(head.tensors)
    draft_vocab = widths.draft_vocab if "target_ids" in tensors else size
    if "embed_tokens.weight" in tensors:
        generator = torch.Generator().manual_seed(1)
        width = tensors["embed_tokens.weight"].shape[1]
        tensors["embed_tokens.weight"] = torch.randn(size, width, generator=generator) * 0.3
    widths = replace(widths, vocab=size, draft_vocab=draft_vocab)
    return head._replace(spec=replace(head.spec, widths=widths), tensors=tensors)


class Seer:
    """A network that knows the text: row t says what stands at t + 2, whatever it is fed with."""

    def __init__(self, target, text):
        self.text = text
        self.ops = target.ops
        self.boundaries = (L,)
        self.spec = replace(target.spec, kv_shapes=(KVShape(1, 1, 1),))

    def read(self, tapped_ARH):
        return tapped_ARH[0]

    def forward(self, tokens_N, inputs_ND, layout, kv, wanted_R):
        positions = layout.positions_N.tolist()
        for token, position in zip(tokens_N.tolist(), positions, strict=True):
            assert token == self.text[position + 1]
        logits = torch.zeros(len(wanted_R), V)
        for row, at in enumerate(wanted_R.tolist()):
            if positions[at] + 2 < len(self.text):
                logits[row, self.text[positions[at] + 2]] = 9.0
        return HeadOutput(logits, inputs_ND)


@pytest.mark.parametrize("depth", [1, 4, 7])
def test_a_head_that_knows_the_text_is_accepted_whole(depth):
    target = target_decoder()
    asked = request(speculation=SpeculationParams(method="eagle", num_draft_tokens=depth))
    pool, manager = make_pool(target.spec.kv_shapes)
    plain = Engine(Runner(target, pool), manager, EngineConfig(block_size=4))
    text = [*asked.prompt_token_ids, *run(plain, [replace(asked, speculation=OFF)])["r", 0]]
    seer = Seer(target, text)
    pool, manager = make_pool(seer.spec.kv_shapes)
    drafter = Told(HeadRunner(seer, pool), manager)
    pool, manager = make_pool(target.spec.kv_shapes)
    config = EngineConfig(block_size=4, check_integrity=True)
    engine = Engine(
        Runner(target, pool), manager, config, drafters=[drafter], default_drafter="eagle"
    )
    assert serve(engine, [asked])["r", 0] == text[9:]
    # The first pass has no features of the prompt; all later ones yield depth + 1 tokens.
    assert engine.stats.num_steps == 1 + -(-19 // (depth + 1))
    assert drafter.num_forwards <= 1 + depth * (engine.stats.num_steps - 1)


def test_drafted_tokens_are_of_the_draft_vocabulary(tmp_path):
    engine = head_engine(eagle3(tmp_path))
    serve(engine, [request(n, TREE, GREEDY, s, k) for n, s, k in ASKED])
    drafted = {token for _, _, tree in engine.drafters["eagle"].told for token in tree.tokens}
    assert drafted <= set(DRAFT_IDS)
    assert len(drafted) > 4


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_recorded_laws_are_those_of_the_head_at_the_requests_temperature(tmp_path, kind, width):
    head = MAKERS[kind](tmp_path)
    speculation = SpeculationParams(
        method="eagle", num_draft_tokens=3, width=width, draft_sample_method="independent"
    )
    engine = head_engine(head)
    serve(engine, [request(n, speculation, SAMPLED, s, k) for n, s, k in ASKED])
    plain, count = Plain(head, target_decoder()), 0
    for _, log, tree in engine.drafters["eagle"].told[:12]:
        for node, parent in enumerate(tree.parents):
            path = list(tree.path_tokens(parent)) if parent >= 0 else []
            expected = (plain.logits_along(log, path).double() / 0.9).softmax(0)
            torch.testing.assert_close(tree.law(node), expected, rtol=1e-4, atol=1e-6)
            count += 1
    assert count > 20


@pytest.mark.parametrize("kind", MAKERS)
def test_a_stop_rule_ends_chains_and_hears_how_sure_the_head_is(tmp_path, kind):
    head = MAKERS[kind](tmp_path)
    engine = head_engine(head)
    engine.add(request(speculation=K4))
    engine.step()
    (seq,) = engine.scheduler.running
    drafter = engine.drafters["eagle"]
    plain, row = Plain(head, target_decoder()), Row(seq, 1, 8)
    rule = StopRule(floor=0.0, slope=1.0, intercept=0.0)
    twin = copy(seq)  # drafting runs what waits, so each of the two has its own state
    snapshot = drafter.snapshot(seq)
    twin.drafter_state = {}
    drafter.restore(twin, snapshot)
    (tree,) = drafter.draft([row], [RowPlan("eagle", 4, 1, 4, rule)])
    sure = [plain.logits_along(seq.tokens, tree.tokens[:n]).softmax(0).max() for n in range(4)]
    assert tree.confidence == pytest.approx([float(p) for p in sure], rel=1e-4)
    survival = [math.prod(rule.acceptance(c) for c in tree.confidence[: n + 1]) for n in range(4)]
    stop = rule._replace(floor=(survival[1] + survival[2]) / 2)
    (short,) = drafter.draft([Row(twin, 1, 8)], [RowPlan("eagle", 4, 1, 4, stop)])
    assert short.tokens == tree.tokens[:3]
    drafter.close(twin)


def test_a_later_request_finds_the_rows_of_a_shared_prefix(tmp_path):
    """The target runs one block of its hit again; the head runs what is new and no more."""
    head = eagle3(tmp_path)
    engine = head_engine(head)
    drafter = engine.drafters["eagle"]
    first = request("a", length=21)
    tokens = serve(engine, [first])["a", 0]
    before, drafter.told = drafter.num_rows, []
    longer = replace(first, id="b", prompt_token_ids=(*first.prompt_token_ids, *tokens, 1, 2, 3))
    serve(engine, [longer])
    assert drafter.num_cold_starts == 0
    assert_drafts_follow_the_definition(engine, head, at_least=20)
    num_drafted = sum(len(tree) for *_, tree in drafter.told)
    assert drafter.num_rows - before < 12 + 20 + num_drafted


def test_rows_are_found_while_their_sequence_still_runs(tmp_path):
    engine = head_engine(eagle3(tmp_path))
    engine.add(request("a", length=21))
    for _ in range(2):
        engine.step()
    (seq,) = engine.scheduler.running
    rows = engine.drafters["eagle"].rows
    assert rows.num_known(replace(seq, tokens=seq.tokens[:20])) == 16


def test_a_prefix_without_features_makes_a_cold_start_and_no_other_output(tmp_path, monkeypatch):
    monkeypatch.setattr("outrider.draft.head_drafter.MAX_RERUN", 8)
    head = eagle3(tmp_path)
    plain = head_engine(head)
    asked = request("b", length=40)
    expected = run(plain, [replace(asked, speculation=OFF)])
    engine = head_engine(head)
    serve(engine, [request("a", OFF, length=40)])
    assert serve(engine, [asked]) == expected
    drafter = engine.drafters["eagle"]
    assert drafter.num_cold_starts == 1
    assert drafter.told[-1][2].tokens
    assert len(drafter.manager.tree) == 0, "rows behind a gap are nobody else's"


@pytest.mark.parametrize("length", [10, 60])
def test_the_way_back_is_taken_rather_than_a_cold_start(tmp_path, length):
    """The prompt is run again for its features."""
    head = eagle3(tmp_path)
    engine = head_engine(head)
    serve(engine, [request("a", OFF, length=length)])
    serve(engine, [request("b", length=length)])
    assert engine.drafters["eagle"].num_cold_starts == 0
    assert_drafts_follow_the_definition(engine, head, at_least=20)


@pytest.mark.parametrize("length", [9, 12, 13, 2, 1])
def test_further_completions_start_from_the_rows_of_the_prompt(tmp_path, length):
    head = eagle3(tmp_path)
    sampling = replace(SAMPLED, n=3)
    expected = run(head_engine(head), [request("r", OFF, sampling, length=length)])
    engine = head_engine(head)
    method = replace(K4, draft_sample_method="greedy")
    assert serve(engine, [request("r", method, sampling, length=length)]).keys() == expected.keys()
    assert engine.drafters["eagle"].num_cold_starts == 0
    assert_drafts_follow_the_definition(engine, head, at_least=60)
    engine = head_engine(head)
    assert serve(engine, [request("r", K4, sampling, length=length)]) == expected


@pytest.mark.parametrize("kind", MAKERS)
def test_long_prompts_do_not_wait_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("outrider.draft.head_rows.MAX_WAITING", 6)
    monkeypatch.setattr("outrider.draft.head_drafter.MAX_ROWS", 5)
    head = MAKERS[kind](tmp_path)
    engine = head_engine(head, max_num_batched_tokens=24)
    for asked in (request("a", length=50), request("b", length=33, seed=2)):
        engine.add(asked)
    most = 0
    while engine.has_work():
        engine.step()
        for seq in engine.scheduler.running:
            state = seq.drafter_state["eagle"]
            most = max(most, state.num_waiting if state else 0)
    assert most <= 7
    assert_drafts_follow_the_definition(engine, head, at_least=40)


def test_a_full_pool_costs_drafts_and_nothing_else(tmp_path):
    head = eagle3(tmp_path)
    requests = [request(n, K4, GREEDY, s, k) for n, s, k in ASKED]
    expected = run(head_engine(head), [replace(r, speculation=OFF) for r in requests])
    engine = head_engine(head, num_head_blocks=12)
    assert serve(engine, requests) == expected
    trees = [len(tree) for *_, tree in engine.drafters["eagle"].told]
    assert 0 in trees
    assert max(trees) == 4


def test_a_restored_log_that_goes_another_way_drafts_by_what_is_common(tmp_path):
    head = eagle3(tmp_path)
    engine = head_engine(head)
    engine.add(request("a", length=21))
    for _ in range(3):
        engine.step()
    (seq,) = engine.scheduler.running
    drafter = engine.drafters["eagle"]
    snapshot = drafter.snapshot(seq)
    other = head_engine(head)
    prompt = (*seq.tokens[:18], 5, 6, 7, 8)
    other.add(replace(request("b"), prompt_token_ids=prompt))
    (heir,) = other._groups["b"]
    assert other.drafters["eagle"].restore(heir, snapshot) == 17
    while other.has_work():
        other.step()
    assert_drafts_follow_the_definition(other, head, at_least=20)
    assert other.drafters["eagle"].num_cold_starts == 0
    assert other.drafters["eagle"].num_rows < 5 + 20 + sum(
        len(tree) for *_, tree in other.drafters["eagle"].told
    )


def test_without_a_head_or_states_it_cannot_be_had(tmp_path):
    target = target_decoder()
    pool, manager = make_pool(target.spec.kv_shapes)
    parts = ModelParts(runner=Runner(target, pool), manager=manager)
    with pytest.raises(ConfigError, match="'eagle' runs a draft head trained for the target"):
        EagleDrafter.build(Surroundings(target=parts))
    silent = copy(target)
    silent.spec = replace(target.spec, hidden_size=0)
    parts = ModelParts(runner=Runner(silent, pool), manager=manager)
    around = Surroundings(target=parts, heads={"eagle": eagle3(tmp_path)})
    with pytest.raises(ConfigError, match="hidden states of the target, which 'tiny-3' does not"):
        EagleDrafter.build(around)
