"""Product trees: best first trees of laws that depend on depth alone, from one law per depth."""

from dataclasses import replace

import pytest
import torch

from outrider.draft import feeding
from outrider.draft.draft_model import ModelDrafter
from outrider.draft.tree_search import BestFirst, ProductTree
from outrider.request import SamplingParams, SpeculationParams
from outrider.testing import run, tiny_decoder, tiny_engine
from tests.draft.draft_models import pooled, request
from tests.draft.heads import KINDS, head, loud_target
from tests.draft.test_medusa import best_paths, paths

AT_ONCE = ("medusa", "peagle", "dflash", "pard")  # whose drafts need one pass, whatever their depth
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SETTINGS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.9),
    "filtered": replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9, min_tokens=6),
    "penalized": replace(GREEDY, temperature=0.8, frequency_penalty=0.5),
}


@pytest.mark.parametrize("num_nodes", [1, 2, 5, 13, 40, 200])
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("has_noise", [False, True])
def test_a_product_tree_is_the_best_first_tree(num_nodes, width, has_noise):
    """The twin expands every node with a law of its own; here they are all alike."""
    generator = torch.Generator().manual_seed(num_nodes + width)
    laws = [(torch.randn(30, generator=generator).double() * 2).softmax(0) for _ in range(4)]
    noises = -torch.log(-torch.log(torch.rand(4, 30, generator=generator).double()))
    noise = (lambda level, size: noises[level, :size]) if has_noise else None
    fast = ProductTree(width, 4, num_nodes, noise)
    slow = BestFirst(width, 4, num_nodes, noise)
    while nodes := fast.wanted():
        fast.take([laws[len(fast.path_tokens(node))] for node in nodes])
    while nodes := slow.wanted():
        slow.take([laws[len(slow.path_tokens(node))] for node in nodes])
    fast.tree("").check()
    assert fast.tree("") == slow.tree("")
    if not has_noise:
        found = best_paths(torch.stack(laws), min(width, num_nodes), num_nodes)
        assert paths(fast.tree("")) == found


def test_noise_of_a_depth_is_made_once():
    """However many nodes ask for it, some of which no token can follow."""
    generator, asked = torch.Generator().manual_seed(3), []
    laws = (torch.randn(4, 9, 30, generator=generator).double() * 2).softmax(2)
    noises = torch.randn(4, 30, generator=generator).double()
    tree = BestFirst(3, 4, 9, lambda level, size: asked.append(level) or noises[level, :size])
    while nodes := tree.wanted():
        tree.take([None if node == 1 else laws[tree.level, i] for i, node in enumerate(nodes)])
    assert asked == [0, 1, 2, 3]
    assert len(tree.tree("")) == 9


def test_a_product_tree_ends_where_no_token_can_follow():
    tree = ProductTree(3, 4, 20)
    tree.take([torch.tensor([0.5, 0.0, 0.5])])
    tree.take([torch.tensor([0.0, 1.0, 0.0])])
    tree.take([None])
    assert tree.wanted() == []
    assert paths(tree.tree("")) == {(0,), (2,), (0, 1), (2, 1)}
    tree = ProductTree(3, 4, 20)
    tree.add([1, 2, 0], [float("nan")] * 3)
    assert tree.wanted() == []
    assert len(tree.tree("")) == 0


@pytest.mark.parametrize("num_nodes", [3, 5, 8, 20])
def test_of_equals_the_same_ones_are_taken(num_nodes):
    """Of laws with many equal products, those first that come first: shallow before deep."""
    laws = [torch.tensor(law).double() for law in ([0.5, 0.5, 0], [0.25, 0.5, 0.25], [0.5, 0, 0.5])]
    fast, slow = (kind(3, 3, num_nodes) for kind in (ProductTree, BestFirst))
    for tree in (fast, slow):
        while nodes := tree.wanted():
            tree.take([laws[len(tree.path_tokens(node))] for node in nodes])
    assert fast.tree("") == slow.tree("")


def drafted(kind, speculation, sampling):
    """Every draft, by the log it was made for; and how many laws were asked for."""
    if kind == "pard":
        target = tiny_decoder()
        drafter = ModelDrafter(*pooled(tiny_decoder(noise=0.01)), 256, mask_token_id=2)
        used = tiny_engine(target=target, drafters=[drafter], draft_seed=None)
    else:
        drafter = KINDS[kind].drafter
        heads = {drafter.name: head(kind)}
        used = tiny_engine(target=loud_target(), drafters=[drafter], heads=heads, draft_seed=None)
    name = drafter.name
    made, draft = {}, used.drafters[name].draft

    def noting(rows, plan):
        trees = draft(rows, plan)
        made.update({tuple(r.seq.tokens): tree for r, tree in zip(rows, trees, strict=True)})
        return trees

    used.drafters[name].draft = noting
    asked = replace(speculation, method=name)
    run(used, [request(f"r{i}", asked, sampling, seed=i, length=9 + i) for i in range(3)])
    return made


@pytest.mark.parametrize("method", ["greedy", "coupled", "probabilistic", "independent"])
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", AT_ONCE)
def test_drafts_are_those_that_ask_for_a_law_per_node(monkeypatch, kind, sampling, method):
    num_laws, laws_of = 0, feeding._grow

    def counting(asking, *more):
        nonlocal num_laws
        num_laws += sum(len(grower.asks()) for grower, _ in asking)
        return laws_of(asking, *more)

    monkeypatch.setattr(feeding, "_grow", counting)
    speculation = SpeculationParams(
        num_draft_tokens=3, width=3, num_nodes=10, draft_sample_method=method, policy="fixed"
    )
    fast, num_fast, num_laws = drafted(kind, speculation, sampling), num_laws, 0
    monkeypatch.setattr(feeding, "is_by_path", lambda seq: True)
    slow = drafted(kind, speculation, sampling)
    assert fast.keys() == slow.keys()
    for log, tree in fast.items():
        twin = slow[log]
        assert (tree.tokens, tree.parents, tree.paths) == (twin.tokens, twin.parents, twin.paths)
        for law_V, twin_V in zip(tree.laws, twin.laws, strict=True):
            torch.testing.assert_close(law_V, twin_V, atol=1e-12, rtol=1e-9)
    assert sum(len(tree) for tree in fast.values()) > 60
    is_by_path = sampling is SETTINGS["penalized"]
    assert num_fast == num_laws if is_by_path else num_fast < num_laws
