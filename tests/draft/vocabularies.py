"""Small real tokenizers of different vocabularies, and networks that speak them."""

import random
from dataclasses import replace

import torch
from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from outrider.testing import tiny_decoder
from outrider.tokenizer import Tokenizer, TransformersTokenizer
from outrider.train.vocabulary import END, PAD, train_tokenizer

TEXT = "the cat sat on the mat and the dog saw it, then the other cat sat there too. "
CODE = "def run(self, argv):\n    return [line.strip() for line in argv]\n# naïve café 🐈\n"
SYLLABLES = ["ba", "ke", "li", "mo", "nu", "pra", "ste", "wi"]
MANY_WORDS = " ".join(a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES) + " "
NEVER = -1e4  # a logit that no softmax sees


def merged(text: str = TEXT, size: int = 340) -> Tokenizer:
    """Byte-level merges learnt from a text, as many as it yields beside 256 bytes and 5 marks."""
    return _wrap(train_tokenizer([text], vocab_size=size))


def letters(seed: int = 0) -> Tokenizer:
    """One token per byte, in an order of its own; any text has one spelling only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    random.Random(seed).shuffle(alphabet)
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, PAD])
    return _wrap(backend)


class Renamed:
    """A network under other token ids: id i here is id `own[i]` there, or -1: it never comes up."""

    def __init__(self, network, own):
        self._network = network
        self._own_V = torch.tensor(own)
        self.spec = replace(network.spec, vocab_size=len(own), eos_token_ids=())
        self.ops = network.ops

    def forward(self, tokens_N, layout, kv, wanted_R):
        own_N = self._own_V[tokens_N].clamp(min=0)
        logits_RV = self._network.forward(own_N, layout, kv, wanted_R)
        renamed_RV = logits_RV[:, self._own_V.clamp(min=0)]
        return renamed_RV.masked_fill(self._own_V < 0, NEVER)


def speaker(tokenizer: Tokenizer, *, noise: float = 0.0, seed: int = 0) -> Renamed:
    """A random model of letters, the same under every vocabulary; of printing ASCII only."""
    own = [-1] * tokenizer.vocab_size
    for code in (*range(0x20, 0x7F), 0x0A):
        (token,) = tokenizer.encode(chr(code), add_special_tokens=False)
        own[token] = code
    return Renamed(tiny_decoder(seed, noise=noise), own)


def _wrap(backend: Backend) -> Tokenizer:
    return TransformersTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    )
