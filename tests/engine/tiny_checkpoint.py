"""Tiny random checkpoints with a tokenizer beside them: what `LLM(folder)` takes."""

from pathlib import Path
from typing import Any

from outrider.train.vocabulary import train_tokenizer, write_tokenizer
from tests.models.tiny import write_tiny

TEXT = "def main(argv):\n    return [line.strip() for line in argv]\n# the quick brown fox\n"
MAX_POSITIONS = 128
VOCAB = 300
ENDS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 4}


def write_checkpoint(folder: Path, text: str = TEXT, **options: Any) -> Path:
    """A random Llama of two layers over a byte-level vocabulary learnt from `text`."""
    write_tiny(folder, **{"vocab_size": VOCAB, **ENDS, **options})
    tokenizer = train_tokenizer([text], vocab_size=VOCAB)
    write_tokenizer(tokenizer, folder, max_positions=MAX_POSITIONS)
    return folder
