"""Which tokens of two vocabularies are one and the same, and that colliding ones add up."""

import base64
import math

import pytest
import torch
from tokenizers import Tokenizer as Backend, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from outrider.draft.vocabulary_map import Dialect, VocabularyMap
from outrider.errors import TokenizerError
from outrider.testing import ToyModel, bias, draw_chain, speculate
from outrider.tokenizer import TransformersTokenizer, load_tokenizer
from outrider.verify.rejection import RejectionVerifier
from tests.draft.vocabularies import CODE, TEXT, letters, merged
from tests.test_tokenizer import write_sentencepiece

CPU = torch.device("cpu")


def dialect(tokenizer, num_ids=None):
    return Dialect(tokenizer, num_ids or tokenizer.vocab_size)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return dialect(load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("pieces"))))


@pytest.fixture(scope="module")
def words():
    return dialect(merged(TEXT))


def between(draft, target):
    return VocabularyMap.between(draft, target, CPU)


def test_equal_strings_are_mapped_and_special_ones_are_not(words):
    other = dialect(merged(CODE + TEXT, 330))
    made = between(other, words)
    ours, theirs = other.tokenizer.vocabulary(), words.tokenizer.vocabulary()
    common = {text for text in ours.keys() & theirs.keys() if not text.startswith("<|")}
    assert made.num_common == len(common) > 256
    expected = [-1] * other.num_ids
    for text in common:
        expected[ours[text]] = theirs[text]
        assert made.target_to_draft[theirs[text]] == ours[text]
    assert made.draft_to_target_D.tolist() == expected
    assert made.draft_to_target_D.dtype == torch.int64
    assert sum(id_ >= 0 for id_ in made.target_to_draft) == len(common)


def test_markers_of_word_starts_and_bytes_are_read(pieces, words):
    """SentencePiece writes U+2581 and <0xNN>, GPT-2 writes U+0120 and a letter per byte."""
    made = between(pieces, words)
    ours, theirs = pieces.tokenizer.vocabulary(), words.tokenizer.vocabulary()
    place = made.draft_to_target_D
    assert place[ours["▁the"]] == theirs["Ġthe"]
    assert place[ours["<0x0A>"]] == theirs["Ċ"]
    assert place[ours["<0xF0>"]] == theirs["ð"]
    assert place[ours["t"]] == place[ours["<0x74>"]] == theirs["t"], "a collision"
    assert made.target_to_draft[theirs["t"]] == ours["t"], "a piece is read rather than a byte"
    assert all(place[token] == -1 for token in pieces.tokenizer.special_ids)
    assert made.num_common < int((place >= 0).sum())


def test_of_two_target_ids_the_piece_is_drafted(pieces, words):
    made = between(words, pieces)
    ours, theirs = words.tokenizer.vocabulary(), pieces.tokenizer.vocabulary()
    assert made.draft_to_target_D[ours["t"]] == theirs["t"]
    assert made.target_to_draft[theirs["<0x74>"]] == -1


def test_ids_that_only_one_of_model_and_tokenizer_has(words):
    wide, narrow = dialect(words.tokenizer, 400), dialect(words.tokenizer, 290)
    made = between(wide, narrow)
    assert made.draft_to_target_D.shape == (400,)
    assert made.draft_to_target_D[340:].tolist() == [-1] * 60
    assert max(made.draft_to_target_D.tolist()) == 289
    assert narrow.encode(TEXT) == [i for i in words.encode(TEXT) if i < 290]


def test_a_dialect_goes_on_in_the_middle_of_a_text(pieces, words):
    assert pieces.adds_space
    assert not words.adds_space
    assert pieces.opening == [pieces.tokenizer.vocabulary()["<s>"]]
    for each in (pieces, words):
        for text in ("the cat", " the cat", "\n\nthe", ".\n the"):
            ids = each.go_on(text)
            assert b"".join(map(each.bytes_of, ids)) == text.encode()
    assert pieces.bytes_of(-1) == pieces.bytes_of(pieces.num_ids) == b""


def test_tokens_written_in_an_unknown_manner_are_refused():
    backend = Backend(models.BPE(vocab={"a</w>": 0, "b</w>": 1, "a": 2, "b": 3}, merges=[]))
    backend.model.end_of_word_suffix = "</w>"
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = TransformersTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(TokenizerError, match=r"writes 'a b' as .*</w>.* of the same family"):
        dialect(tokenizer)


COLLIDING = {0: 2, 1: 0, 2: 2, 4: 0, 5: 2}  # draft ids 0, 2 and 5 are one; the target's 1 is none


def overwritten(logits_D):
    """The mistake: the last of the colliding ids wins."""
    mapped_T = torch.full((3,), -math.inf, dtype=logits_D.dtype)
    for draft, target in COLLIDING.items():
        mapped_T[target] = logits_D[draft]
    return mapped_T


def test_colliding_probabilities_add_up():
    made = VocabularyMap(COLLIDING.items(), 6, 3)
    logits_RD = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * 3
    law_RD = logits_RD[:, list(COLLIDING)].softmax(dim=1)
    expected_RT = torch.zeros(5, 3)
    expected_RT.index_add_(1, torch.tensor(list(COLLIDING.values())), law_RD)
    law_RT = made.translate(logits_RD).softmax(dim=1)
    torch.testing.assert_close(law_RT, expected_RT)
    torch.testing.assert_close(law_RT.sum(dim=1), torch.ones(5))
    assert (law_RT[:, 1] == 0).all()
    torch.testing.assert_close(made.translate(logits_RD[2]), made.translate(logits_RD)[2])
    assert made.num_common == 2
    assert made.target_to_draft == [1, -1, 0]


def test_without_collisions_logits_are_copied_bit_by_bit():
    made = VocabularyMap([(2, 0), (0, 1)], 3, 3)
    logits_D = torch.tensor([0.1, -math.inf, 3e-7])
    assert made.translate(logits_D).tolist() == [logits_D[2], logits_D[0], -math.inf]


@pytest.mark.parametrize("seed", range(4))
def test_the_law_is_exact_with_collisions_and_only_because_they_add(seed):
    """Tokens are drawn as draft ids; the law must be of target ids."""
    made = VocabularyMap(COLLIDING.items(), 6, 3)
    p, q = ToyModel(f"p{seed}", 3), ToyModel(f"q{seed}", 6)
    common = torch.tensor(list(COLLIDING))

    def drafting(translate):
        class Draws:
            """The stream of draws, in draft ids; others are the verifier's own."""

            def __init__(self, stream, context):
                self.stream, self.context = stream, context

            def pick(self, law_T):
                law_C = q(self.context)[common]
                target = COLLIDING[int(common[self.stream.pick(law_C / law_C.sum())])]
                self.context = (*self.context, target)
                return target

        def law(context):
            return translate(q(context).log()).softmax(dim=0)

        return lambda context, stream: draw_chain(law, 2)(context, Draws(stream, context))

    rule = RejectionVerifier()
    right = bias(speculate(rule, p, drafting(made.translate)), p, 4)
    wrong = bias(speculate(rule, p, drafting(overwritten)), p, 4)
    assert right < 1e-10
    assert wrong > 1e-3


def read_tiktoken(path):
    lines = path.read_text().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}


def from_tiktoken(path):
    """The vocabulary alone, without merges: a text becomes bytes."""
    letter = {data: text for text, data in letter_of_byte()}
    vocabulary = {
        "".join(letter[bytes([byte])] for byte in data): rank
        for data, rank in read_tiktoken(path).items()
    }
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return TransformersTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def letter_of_byte():
    each = dialect(letters())
    return [(each.tokenizer.token_text(i), data) for i, data in enumerate(each.spellings) if data]


@pytest.mark.slow
def test_two_real_vocabularies(shared_data):
    folder = shared_data / "tokenizers"
    ours, theirs = (read_tiktoken(folder / f"{n}.tiktoken") for n in ("gpt2", "multilingual"))
    draft, target = (
        dialect(from_tiktoken(folder / f"{n}.tiktoken")) for n in ("gpt2", "multilingual")
    )
    made = between(draft, target)
    common = ours.keys() & theirs.keys()
    assert made.num_common == len(common) > 10_000
    assert all(made.draft_to_target_D[ours[data]] == theirs[data] for data in common)
