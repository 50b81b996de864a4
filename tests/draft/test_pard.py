"""Drafting in parallel with mask tokens, against one forward over the text and the masks."""

import pytest
import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.draft_model import ModelDrafter
from outrider.draft.tree_search import BestFirst
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import ModelError
from outrider.models.config import DecoderConfig
from outrider.models.loader import load_decoder
from outrider.models.runner import Piece, Runner
from outrider.ops.choose import choose
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.sampling.rng import PositionStream
from outrider.step import EMPTY_TREE
from outrider.testing import run, tiny_decoder
from outrider.testing.tiny import TINY
from tests.models.tiny import write_tiny

MASK = 2
OFF = SpeculationParams(method="off")
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, ignore_eos=True)
SHAPED = SamplingParams(
    max_tokens=24, temperature=1.2, top_k=30, repetition_penalty=1.3, ignore_eos=True
)
METHODS = ("greedy", "coupled", "probabilistic", "independent")


def asks(method="greedy", k=5, width=1, **more):
    return SpeculationParams(
        method="draft_model", num_draft_tokens=k, width=width, draft_sample_method=method, **more
    )


def request(name="r", speculation=OFF, sampling=GREEDY, length=9, seed=5):
    prompt = tuple((11 * seed + j * j) % 90 + 30 for j in range(length))
    return Request(
        id=name, prompt_token_ids=prompt, sampling=sampling, speculation=speculation, seed=seed
    )


def requests(sampling, speculation, count=4):
    return [request(f"r{i}", speculation, sampling, length=5 + 3 * i, seed=i) for i in range(count)]


def pooled(network, num_blocks=256, block_size=4):
    spec = network.spec
    pool = KVPool(spec.kv_shapes, num_blocks, block_size, spec.dtype, spec.device)
    return Runner(network, pool), BlockManager(num_blocks, block_size)


def draft_network():
    """Near the target, so that some of its guesses stand."""
    return tiny_decoder(0, noise=0.01, pard_token=MASK)


def engine(**options):
    drafter = ModelDrafter(*pooled(draft_network()), 256)
    config = EngineConfig(block_size=4, check_integrity=True, **{"max_num_seqs": 16, **options})
    num_blocks = options.get("max_model_len", 1024) // 4
    return Engine(*pooled(tiny_decoder(), num_blocks), config, drafters=[drafter])


def trees_of(used):
    """(log, tree) of every draft."""
    made = []
    drafter = used.drafters["draft_model"]
    draft = drafter.draft

    def noted(rows, plan):
        trees = draft(rows, plan)
        made.extend(zip([list(row.seq.tokens) for row in rows], plan, trees, strict=True))
        return trees

    drafter.draft = noted
    return made


def twin(tokens, k):
    """The slow twin: text and k - 1 masks as a text, one forward each; logits of the last k."""
    runner, manager = pooled(draft_network())
    text = [*tokens, *[MASK] * (k - 1)]
    rows = []
    for end in range(len(tokens), len(text) + 1):
        table, _ = manager.open([1])
        manager.reserve(table, end)
        rows.append(runner.run([Piece(table, 0, text[:end], EMPTY_TREE, True)]).logits_NV[0])
    return torch.stack(rows)


def test_greedy_drafts_are_the_twins_argmaxes_of_one_pass():
    used = engine()
    made = trees_of(used)
    run(used, requests(GREEDY, asks(k=5)))
    assert len(made) > 20
    for tokens, plan, tree in made:
        assert tree.is_chain
        assert list(tree.tokens) == twin(tokens, plan.depth).argmax(dim=1).tolist()


def test_later_mask_slots_cannot_change_earlier_ones():
    drafts = []
    for k in (1, 3, 7):
        used = engine()
        made = trees_of(used)
        used.add(request(speculation=asks(k=k)))
        used.step()
        drafts.append(made[0][2].tokens)
        assert len(drafts[-1]) == k
    assert drafts[2][:1] == drafts[0]
    assert drafts[2][:3] == drafts[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [1, 3])
def test_one_pass_per_step_however_the_draft_grows(method, width):
    used = engine()
    for asked in requests(SAMPLED, asks(method, width=width)):
        used.add(asked)
    for count in range(1, 5):
        used.step()
        assert used.drafters["draft_model"].num_forwards == count


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("method", ["probabilistic", "independent"])
def test_recorded_laws_are_those_of_the_mask_rows(method, width):
    used = engine()
    made = trees_of(used)
    run(used, [request(speculation=asks(method, k=3, width=width), sampling=SAMPLED)])
    for tokens, plan, tree in made[:5]:
        laws = (twin(tokens, plan.depth).double() / 0.9).softmax(dim=1)
        assert len(tree.laws) == len(tree)
        for node in range(len(tree)):
            law_V = laws[tree.depth(node) - 1].clone()
            if method == "probabilistic":
                siblings = tree.children(tree.parents[node])
                for earlier in siblings[: siblings.index(node)]:
                    law_V[tree.tokens[earlier]] = 0.0
            assert torch.allclose(tree.law(node), law_V / law_V.sum(), atol=1e-9)


def test_penalties_count_the_tokens_drafted_before():
    """Unshaped marginals would often say the same token twice."""
    used = engine()
    made = trees_of(used)
    sampling = SamplingParams(max_tokens=24, frequency_penalty=2.0, presence_penalty=2.0)
    used.add(request(speculation=asks(k=6), sampling=sampling))
    used.step()
    (seq,) = used.scheduler.running
    ((tokens, _, tree),) = made
    for depth, logits_V in enumerate(twin(tokens, 6)):
        shaped_V = seq.shaper.shape(logits_V, tokens, tree.tokens[:depth])
        assert int(shaped_V.argmax()) == tree.tokens[depth]


@pytest.mark.parametrize("method", ["greedy", "coupled"])
def test_a_tree_is_the_best_first_tree_of_the_marginals(method):
    """The best nodes under a product law, as DDTree finds them, at no further pass."""
    used = engine()
    made = trees_of(used)
    spec = asks(method, k=4, width=3, num_nodes=9)
    run(used, [request(speculation=spec, sampling=SAMPLED)])
    for tokens, plan, tree in made[:5]:
        laws = (twin(tokens, plan.depth).double() / 0.9).softmax(dim=1)
        draws = PositionStream(5, 0).noise
        noise = None if method == "greedy" else lambda d, n, t=tokens: draws(len(t) + d, n)  # noqa: B023
        growth = BestFirst(3, plan.depth, plan.num_nodes, noise)
        while wanted := growth.wanted():
            growth.take([laws[len(growth.path_tokens(node))] for node in wanted])
        expected = growth.tree("")
        assert (tree.tokens, tree.parents) == (expected.tokens, expected.parents)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SHAPED], ids=["greedy", "drawn", "shaped"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [1, 3])
def test_same_tokens_as_plain_decoding(width, method, sampling):
    expected = run(engine(), requests(sampling, OFF))
    used = engine()
    assert run(used, requests(sampling, asks(method, width=width))) == expected
    assert used.stats.num_accepted_tokens > 0


def test_same_tokens_under_preemption():
    pressed = {"max_model_len": 80, "max_num_batched_tokens": 20, "max_num_seqs": 4}
    expected = run(engine(), requests(SAMPLED, OFF))
    used = engine(**pressed)
    assert run(used, requests(SAMPLED, asks("coupled"))) == expected
    assert used.stats.num_preemptions > 0
    assert used.drafters["draft_model"].manager.num_used == 0


def test_masks_leave_nothing_in_the_draft_kv():
    used = engine()
    for asked in requests(GREEDY, asks(k=4)):
        used.add(asked)
    num_compared = 0
    runner = used.drafters["draft_model"].runner
    while used.has_work():
        used.step()
        for seq in used.scheduler.running:
            state = seq.drafter_state["draft_model"]
            assert state.num_cached < len(seq.tokens)
            fresh, manager = pooled(runner.network)
            table, _ = manager.open([1])
            manager.reserve(table, state.num_cached)
            fresh.run([Piece(table, 0, seq.tokens[: state.num_cached], EMPTY_TREE, False)])
            places = torch.tensor(state.table.slots(0, state.num_cached))
            clean = torch.tensor(table.slots(0, state.num_cached))
            for mine, theirs in zip(runner.pool.layers, fresh.pool.layers, strict=True):
                assert torch.equal(mine.keys[places], theirs.keys[clean])
                assert torch.equal(mine.values[places], theirs.values[clean])
            num_compared += state.num_cached
    assert num_compared > 200


def test_the_mask_comes_from_the_checkpoint_or_from_the_caller():
    assert ModelDrafter(*pooled(draft_network()), 256).mask_token_id == MASK
    plain = pooled(tiny_decoder())
    assert ModelDrafter(*plain, 256).mask_token_id is None
    assert ModelDrafter(*plain, 256, mask_token_id=7).mask_token_id == 7
    assert "inner" not in ModelDrafter(*plain, 256, mask_token_id=7).options


def test_pard_token_is_read_from_a_folder(tmp_path):
    write_tiny(tmp_path, pard_token=11)
    assert load_decoder(tmp_path, ops=choose("torch")).spec.mask_token_id == 11


@pytest.mark.parametrize("token", [256, -1, "<mask>"])
def test_a_mask_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ModelError, match=r"pard_token=.* must be a token id below vocab_size=256"):
        DecoderConfig.from_dict({**TINY, "pard_token": token})
