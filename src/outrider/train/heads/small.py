"""A small decoder of the target's vocabulary, distilled from it: a draft model of its own.

Shape legend: N rows, R rows, B pieces, T longest piece, D width of the draft model.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from outrider.errors import ConfigError
from outrider.models.checkpoint import read_config
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder as Served
from outrider.models.heads.detect import detect
from outrider.models.heads.files import HeadFiles
from outrider.models.heads.spec import Family
from outrider.train.export import config_of, load_decoder, write_weights
from outrider.train.heads.files import to_store, write_json, write_sidecar
from outrider.train.heads.pieces import Packed
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Taught, Teacher
from outrider.train.heads.timing import target_pass
from outrider.train.network import Decoder, DecoderShape

NUM_LAYERS = 2
WIDTH_SHARE = 0.4  # of the target's, as in the demo pair
STEP_OF_WIDTH = 32
WIDE = 1024  # from which on heads are as wide as is usual
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "*.tiktoken")
NOT_TOKENIZER = ("config.json", "generation_config.json", "*.index.json", "outrider.json")


class Small(Student):
    """A Llama with tied embeddings. It reads no states of the target, only its laws."""

    kind = "draft_model"
    layouts = ("llama",)
    lead = 0
    has_draft_vocabulary = False
    max_depth = None

    def __init__(self, decoder: Decoder, teacher: Teacher) -> None:
        super().__init__()
        self.decoder = decoder
        self.boundaries = ()
        self.depths = 1  # it is trained on the text itself, whatever the depth of a draft
        self._teacher = teacher
        self.keep_ids(None)

    @classmethod
    def fresh(cls, teacher: Teacher, settings: DraftTraining, ids_D: Tensor | None) -> Self:
        decoder = Decoder(_shape(teacher, settings.num_layers or NUM_LAYERS))
        decoder.reset_parameters(torch.Generator().manual_seed(settings.seed))
        return cls(decoder, teacher)

    @classmethod
    def load(cls, folder: Path, teacher: Teacher) -> Self:
        """One of ours. ConfigError for a decoder of another family or vocabulary."""
        values = read_config(folder)
        if detect(values, HeadFiles(folder).shapes) is not Family.DRAFT_MODEL or (
            values.get("model_type") != "llama" or not values.get("tie_word_embeddings")
        ):
            raise ConfigError(f"{str(folder)!r} is no draft model that this trainer has written")
        if values["vocab_size"] != teacher.target.vocab_size:
            raise ConfigError(
                f"{str(folder)!r} has {values['vocab_size']} tokens, the target "
                f"{teacher.target.vocab_size}: it was made for another model"
            )
        return cls(load_decoder(folder), teacher)

    def states(self, batch: Packed, taught: Taught, num_depths: int) -> Iterator[Tensor]:
        """At depth k row t holds the state of row t + k: its context is the text itself."""
        pieces = batch.tokens_N.split(list(batch.lengths))
        padded_BTD = self.decoder.model(pad_sequence(list(pieces), batch_first=True))
        own = [row_TD[:n] for row_TD, n in zip(padded_BTD, batch.lengths, strict=True)]
        state_ND = torch.cat(own)
        for depth in range(num_depths):
            yield state_ND[(batch.index_N + depth).clamp_max(len(batch) - 1)]

    def logits(self, depth: int, states_RD: Tensor) -> Tensor:
        logits_RV: Tensor = self.decoder.lm_head(states_RD)
        return logits_RV.float()

    def num_passes(self, depth: int) -> int:
        return depth

    def serving_pass(self, num_sequences: int) -> Callable[[], object]:
        return target_pass(self.served(), num_sequences)

    def served(self) -> Served:
        """As the engine would load it."""
        spec = self._teacher.spec
        return Served(
            DecoderConfig.from_dict(config_of(self.decoder.shape)),
            self._stored(spec.dtype),
            self._teacher.network.ops,
            dtype=spec.dtype,
            device=spec.device,
        )

    def write(
        self, folder: Path, layout: str, about: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        """A checkpoint that `transformers` loads too, with the target's tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        values = self._teacher.values
        config = config_of(self.decoder.shape, dtype=str(dtype).removeprefix("torch."))
        config |= {name: values[name] for name in TOKEN_IDS if name in values}
        write_json(folder / "config.json", config)
        write_weights(self._stored(dtype), folder / "model.safetensors")
        write_sidecar(folder, {}, about)
        if self._teacher.target.folder is not None:
            _copy_tokenizer(self._teacher.target.folder, folder)

    def _stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Without the LM head, which is the embedding."""
        weights = to_store(self.decoder.state_dict(), dtype)
        del weights["lm_head.weight"]
        return weights


def _shape(teacher: Teacher, num_layers: int) -> DecoderShape:
    target = teacher.target
    width = max(1, round(WIDTH_SHARE * target.hidden_size / STEP_OF_WIDTH)) * STEP_OF_WIDTH
    head_dim = 64 if width >= WIDE else 32
    num_heads = width // head_dim
    num_kv_heads = max(n for n in range(1, num_heads // 4 + 2) if num_heads % n == 0)
    return DecoderShape(
        vocab_size=target.vocab_size,
        hidden_size=width,
        intermediate_size=round(2.7 * width / STEP_OF_WIDTH) * STEP_OF_WIDTH,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=min(teacher.spec.max_positions, 1 << 17),
    )


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if not any(path.match(name) for name in NOT_TOKENIZER):
                shutil.copyfile(path, folder / path.name)
