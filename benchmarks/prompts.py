"""Prompts for benchmarks: pieces of documents that the demo pair was never trained on."""

from pathlib import Path

from outrider.tokenizer import Tokenizer
from outrider.train.corpus import read_corpus

PIECE = 600  # characters; a long document gives several prompts


def held_out_prompts(
    tokenizer: Tokenizer, corpus: Path | None, *, per_domain: int, length: int = 48
) -> dict[str, list[list[int]]]:
    """Token ids of beginnings of held-out documents (or of their pieces), by domain.

    Args:
        corpus: folder with the optional sources; None reads the standard library only.
        length: tokens per prompt.
    """
    found = {}
    for domain in read_corpus(corpus).domains:
        texts = [
            d.text[at : at + PIECE]
            for d in domain.held_out
            for at in range(0, len(d.text), 4 * PIECE)
        ]
        stride = max(1, len(texts) // (2 * per_domain))
        encoded = [tokenizer.encode(text)[:length] for text in texts[::stride]]
        found[domain.name] = [ids for ids in encoded if len(ids) == length][:per_domain]
    return found
