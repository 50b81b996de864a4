"""Grammar states: masks along paths equal those of fresh replays; bad constraints are refused."""

import itertools
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from outrider.errors import RequestError
from outrider.request import SamplingParams
from outrider.sampling.grammar import GrammarCompiler, GrammarState
from outrider.sampling.laws import TargetLaws
from outrider.sampling.shaper import Shaper
from outrider.step import DraftTree

V = 448  # wider than the tokenizer: the rest is padding
EOS, PAD = 0, 1
TEXTS = ['{"name": "Ada", "age": 36}', '{"name": "Alan", "age": 41}', "true false null 12345"] * 5
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
CONSTRAINTS = [
    {"json_schema": SCHEMA},
    {"json_schema": json.dumps(SCHEMA)},
    {"json_schema": {}},
    {"regex": r"[a-z]{2,4}-\d+"},
    {"grammar": 'root ::= "yes" | "no" more*\nmore ::= [!?]'},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, V, [EOS])


def state(compiler: GrammarCompiler, **constraint) -> GrammarState:
    return compiler.compile(SamplingParams(**constraint))


def tokens_of(mask_V: torch.Tensor | None) -> list[int]:
    assert mask_V is not None
    assert mask_V.shape == (V,)
    assert mask_V.dtype == torch.bool
    return mask_V.nonzero().squeeze(1).tolist()


def walk(grammar: GrammarState, length: int, seed: int) -> list[int]:
    """Random allowed tokens, found by masks along the path."""
    rng, path = random.Random(seed), []
    for _ in range(length):
        path.append(rng.choice(tokens_of(grammar.mask(path))))
    return path


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_a_walk_equals_a_fresh_replay(compiler, constraint):
    for seed in range(3):
        grammar = state(compiler, **constraint)
        committed = walk(grammar, 3, seed)
        grammar.advance(committed)
        path = walk(grammar, 4, seed + 10)
        for length in (4, 0, 2, 1, 3):  # masks leave no trace, in any order
            fresh = state(compiler, **constraint)
            fresh.advance([*committed, *path[:length]])
            assert tokens_of(grammar.mask(path[:length])) == tokens_of(fresh.mask())
        assert grammar.tokens == committed


def test_masks_depend_on_the_path(compiler, tokenizer):
    grammar = state(compiler, regex="(ab|cd)")
    a, b, c, d = (tokenizer.convert_tokens_to_ids(x) for x in "abcd")
    assert tokens_of(grammar.mask((a,))) == [b]
    assert tokens_of(grammar.mask((c,))) == [d]
    assert {a, c} <= set(tokens_of(grammar.mask()))


def test_a_forbidden_path_allows_nothing_and_leaves_no_trace(compiler, tokenizer):
    grammar = state(compiler, regex="abc")
    a, b = (tokenizer.convert_tokens_to_ids(x) for x in "ab")
    before = tokens_of(grammar.mask())
    for path in [(b,), (a, a), (a, EOS), (PAD,), (V - 1,), (a, b, b, a)]:
        assert tokens_of(grammar.mask(path)) == []
    assert tokens_of(grammar.mask()) == before


def test_a_complete_output_may_only_be_followed_by_the_end(compiler, tokenizer):
    grammar = state(compiler, json_schema=SCHEMA)
    ids = tokenizer.encode('{"name": "Ada", "age": 36}')
    assert tokens_of(grammar.mask(ids)) == [EOS]
    assert tokens_of(grammar.mask([*ids, EOS])) == [EOS]
    assert tokens_of(grammar.mask([*ids, EOS, ids[0]])) == []
    grammar.advance(ids)
    assert not grammar.is_finished
    grammar.advance([EOS])
    assert grammar.is_finished
    grammar.advance([EOS])  # ignore_eos goes on
    assert grammar.tokens == [*ids, EOS, EOS]


def test_special_and_padding_tokens_are_never_allowed(compiler, tokenizer):
    inside_string = tokenizer.encode('{"name": "A')
    grammar = state(compiler, json_schema=SCHEMA)
    allowed = tokens_of(grammar.mask(inside_string))
    assert len(allowed) > 150
    assert {EOS, PAD}.isdisjoint(allowed)
    assert max(allowed) < len(tokenizer)
    assert tokens_of(grammar.mask([*inside_string, PAD])) == []


def test_a_clone_goes_its_own_way(compiler):
    grammar = state(compiler, json_schema=SCHEMA)
    grammar.advance(walk(grammar, 2, 0))
    clone, before = grammar.clone(), tokens_of(grammar.mask())
    assert clone.tokens == grammar.tokens
    clone.advance(walk(clone, 3, 5))
    assert tokens_of(grammar.mask()) == before
    replayed = state(compiler, json_schema=SCHEMA)
    replayed.advance(clone.tokens)
    assert tokens_of(replayed.mask()) == tokens_of(clone.mask())


def test_committing_against_the_grammar_is_our_bug(compiler):
    with pytest.raises(AssertionError, match="against the grammar"):
        state(compiler, regex="a").advance([EOS])


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        ({"regex": "[a-"}, r"regex='\[a-' does not compile: Regex parsing error"),
        ({"regex": "(?=a)b"}, "Lookahead is not supported"),
        ({"json_schema": '{"type": "foo"}'}, "json_schema=.*foo.* does not compile: Unsupported"),
        ({"json_schema": "not json"}, "json_schema='not json' does not compile"),
        ({"json_schema": {"type": {1, 2}}}, "json_schema=.*not JSON serializable"),
        ({"grammar": "root ::= x"}, 'Rule "x" is not defined'),
        ({"grammar": "root ::= " + "x " * 200}, "grammar='root ::= x.*'... does not compile"),
    ],
)
def test_a_constraint_that_does_not_compile_is_refused_in_one_line(compiler, constraint, named):
    with pytest.raises(RequestError, match=named) as refusal:
        state(compiler, **constraint)
    assert "\n" not in str(refusal.value)
    assert ".cc:" not in str(refusal.value)


def test_a_model_without_an_end_cannot_be_constrained(tokenizer):
    with pytest.raises(RequestError, match="regex='a': this model has no end-of-sequence"):
        state(GrammarCompiler(tokenizer, V, []), regex="a")


class Bytes:
    """A tokenizer of single bytes; ids 256 and 257 are special."""

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)] + [b"", b""]


def test_a_byte_vocabulary_serves_as_well():
    grammar = GrammarCompiler(Bytes(), 260, [256]).compile(SamplingParams(regex="aé?"))
    assert grammar.mask().nonzero().squeeze(1).tolist() == [ord("a")]
    assert grammar.mask([ord("a")]).nonzero().squeeze(1).tolist() == ["é".encode()[0], 256]


def test_a_failure_inside_xgrammar_fails_the_request(compiler, monkeypatch):
    grammar = state(compiler, regex="abc")
    monkeypatch.setattr(grammar, "_matcher", Failing())
    with pytest.raises(RequestError, match="the grammar failed: out of states"):
        grammar.mask()


class Failing:
    """A matcher with a bug."""

    def is_terminated(self) -> bool:
        raise RuntimeError("[00:00:00] /project/cpp/matcher.cc:7: out of states")

    def rollback(self, num_tokens: int) -> None:
        pass


def test_greedy_decoding_along_trees_yields_valid_json(compiler, tokenizer):
    """Laws masked per node: whatever the logits want, the walk stays inside the grammar."""
    sampling = SamplingParams(json_schema=SCHEMA, logit_bias={tokenizer.encode('"')[0]: 3.0})
    shaper = Shaper(sampling, vocab_size=V, eos_token_ids=[EOS], bad_words_ids=(), num_prompt=1)
    grammar, tokens, rng = compiler.compile(sampling), [5], torch.Generator().manual_seed(0)
    for _ in itertools.takewhile(lambda _: not grammar.is_finished, range(400)):
        rows = torch.randn(1, V, generator=rng)
        rows[0, EOS] = 9.0
        tree = DraftTree()
        laws = TargetLaws(shaper, rows, [int(rows.argmax())], tokens, tree.path_tokens, grammar)
        tokens.append(laws.argmax(-1))
        grammar.advance(tokens[-1:])
    assert grammar.is_finished
    assert set(json.loads(tokenizer.decode(tokens[1:-1]))) == {"name", "age"}
