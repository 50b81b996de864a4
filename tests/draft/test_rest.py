"""REST: what a request asks for, the folder's checks, and output that stays the same."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from outrider import LLM
from outrider.draft import rest
from outrider.draft.base import ModelParts, Surroundings
from outrider.draft.datastore import Datastore
from outrider.draft.rest import CPU_NODES, RestDrafter
from outrider.errors import ConfigError
from outrider.ops.cpu import build
from outrider.request import Request, SamplingParams, Speculation, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Row, RowPlan
from outrider.testing import check_drafter, run, tiny_engine
from tests.engine.tiny_checkpoint import write_checkpoint

OFF = SpeculationParams(method="off")
ON = SpeculationParams(method="rest", drafter_options={"min_match": 1})


def paths(tree):
    tree.check()
    return [tree.path_tokens(node) for node in range(len(tree))]


@pytest.fixture(params=["native", "plain"])
def each_kind(request, monkeypatch):
    """The search in C++, then its twin."""
    if request.param == "plain":
        monkeypatch.setattr(rest, "datastore_library", lambda: None)
    elif build.find_compiler() is None:
        pytest.skip("no C++ compiler on the PATH")


def draft(texts, tokens, depth=10, width=16, num_nodes=16, **options):
    drafter = RestDrafter(Datastore.build(texts, fingerprint="f", vocab_size=256))
    chosen = {name: option.default for name, option in drafter.options.items()} | options
    seq = Sequence(
        id="s",
        request=Request(id="s", prompt_token_ids=tuple(tokens)),
        index=0,
        tokens=list(tokens),
        seed=0,
        speculation=Speculation(drafter="rest", num_draft_tokens=depth, options=chosen),
    )
    (tree,) = drafter.draft([Row(seq, 1, num_nodes)], [RowPlan("rest", depth, width, num_nodes)])
    return tree


@pytest.mark.usefixtures("each_kind")
def test_the_longest_ending_decides():
    corpus = [[1, 2, 3, 7], [9, 2, 3, 8], [9, 2, 3, 8], [5, 3, 6]]
    assert paths(draft(corpus, [0, 1, 2, 3])) == [(7,)]
    assert paths(draft(corpus, [0, 2, 3])) == [(8,), (7,)]
    assert paths(draft(corpus, [0, 3])) == []
    assert paths(draft(corpus, [0, 3], min_match=1)) == [(8,), (6,), (7,)]
    assert paths(draft(corpus, [1, 2, 3], min_match=4)) == []


@pytest.mark.usefixtures("each_kind")
def test_depth_nodes_and_votes_are_limited():
    corpus = [[1, 2, *range(10, 40)], [1, 2, *range(50, 90)]]
    tree = draft(corpus, [1, 2], depth=4, num_nodes=7)
    assert len(tree) == 7
    assert max(tree.depth(node) for node in range(7)) == 4
    assert len(draft(corpus, [1, 2], num_nodes=50).children(-1)) == 2
    assert len(draft(corpus, [1, 2], num_nodes=50, max_occurrences=1).children(-1)) == 1
    assert draft(corpus, [1, 2], width=1).tokens == tuple(range(10, 20))


def surroundings(folder, vocab_size=256, fingerprint=None):
    spec = SimpleNamespace(vocab_size=vocab_size, device=torch.device("cpu"), name="tiny")
    runner = SimpleNamespace(network=SimpleNamespace(spec=spec))
    tokenizer = fingerprint and SimpleNamespace(fingerprint=lambda: fingerprint)
    parts = ModelParts(runner=runner, manager=None, tokenizer=tokenizer)
    return Surroundings(target=parts, datastore=None if folder is None else str(folder))


def test_build_reads_the_datastore(tmp_path):
    Datastore.build([[1, 2, 3]], fingerprint="f", vocab_size=200).save(tmp_path)
    for fingerprint in (None, "f"):
        drafter = RestDrafter.build(surroundings(tmp_path, fingerprint=fingerprint))
        assert drafter.datastore.search([1, 2])[0] == 2
        assert drafter.default_num_nodes == CPU_NODES


@pytest.mark.parametrize(
    ("folder", "target", "message"),
    [
        (None, {}, "needs a datastore.*outrider index build.*datastore=FOLDER"),
        ("nowhere", {}, "no datastore in .*nowhere.*outrider index build"),
        (".", {"fingerprint": "g"}, "another tokenizer than that of 'tiny'.*outrider index build"),
        (".", {"vocab_size": 199}, "another tokenizer"),
    ],
)
def test_a_datastore_that_does_not_fit_is_refused(tmp_path, folder, target, message):
    Datastore.build([[1, 2, 3]], fingerprint="f", vocab_size=200).save(tmp_path)
    with pytest.raises(ConfigError, match=message):
        RestDrafter.build(surroundings(folder and tmp_path / folder, **target))


@pytest.mark.usefixtures("each_kind")
def test_an_ending_with_nothing_behind_it_drafts_nothing():
    assert draft([[1, 2]], [1, 2]) is EMPTY_TREE
    assert draft([[1, 2]], [1, 3]) is EMPTY_TREE
    assert draft([[1, 2, 3]], [1, 2], depth=0) is EMPTY_TREE


def requests(speculation, temperature=0.0, count=8):
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple((11 * i + j * j) % 90 + 30 for j in range(5 + 3 * i)),
            sampling=SamplingParams(max_tokens=24, temperature=temperature, ignore_eos=True),
            speculation=speculation,
            seed=1000 + i,
        )
        for i in range(count)
    ]


def drafter_of(texts):
    return RestDrafter(Datastore.build(texts, fingerprint="f", vocab_size=256))


@pytest.fixture(scope="module")
def junk():
    rng = np.random.default_rng(0)
    return [rng.integers(4, 256, size=4000).tolist() for _ in range(3)]


def test_the_conformance_check(junk):
    check_drafter(lambda: drafter_of(junk))


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_corpus_that_holds_the_answers_is_accepted_and_changes_no_token(temperature, junk):
    plain = run(tiny_engine(draft_seed=None), requests(OFF, temperature))
    prompts = [list(request.prompt_token_ids) for request in requests(OFF)]
    answers = [prompt + plain[f"r{i}", 0] for i, prompt in enumerate(prompts)]
    steps = {}
    for name, texts in {"junk": junk, "truth": [*junk, *answers]}.items():
        engine = tiny_engine(
            drafters=[drafter_of(texts)], draft_seed=None, num_blocks=36,
            options={"max_num_seqs": 6, "max_model_len": 100, "max_num_batched_tokens": 64},
        )  # fmt: skip
        assert run(engine, requests(ON, temperature)) == plain
        assert engine.stats.num_preemptions > 0
        assert engine.stats.num_draft_tokens > 0
        steps[name] = engine.stats.num_steps
    assert steps["truth"] < 0.6 * steps["junk"]


def test_an_engine_loads_it_from_a_folder(tmp_path):
    model = str(write_checkpoint(tmp_path / "model"))
    llm = LLM(model)
    text = "def main(argv):\n    return [line.strip() for line in argv]\n"
    ids = llm.tokenizer.encode(text)
    kept = {"fingerprint": llm.tokenizer.fingerprint(), "vocab_size": llm.tokenizer.vocab_size}
    Datastore.build([ids], **kept).save(tmp_path / "store")
    sampling = SamplingParams(max_tokens=16, ignore_eos=True)
    expected = llm.generate("def main(", sampling)[0].token_ids
    with_store = LLM(model, datastore=str(tmp_path / "store"))
    output = with_store.generate("def main(", sampling, {"method": "rest"})[0]
    assert output.token_ids == expected
    assert output.metrics.num_draft_tokens > 0
    Datastore.build([ids], **{**kept, "fingerprint": "other"}).save(tmp_path / "other")
    with pytest.raises(ConfigError, match="another tokenizer"):
        LLM(model, drafters=["rest"], datastore=str(tmp_path / "other"))
