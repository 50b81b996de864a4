"""EAGLE-3 heads (Li et al. 2025) as they are trained: every step on the outputs of the one before.

Step k: row t is given the token at t + 1 + k and, in step 0, the features of the target at t; in
later steps its own last output. It stands at position t + k and learns the law at t + 1 + k. That
is what serving does at depth k of a draft.

Shape legend: N rows, R rows, D width of the head, F width of all features.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from outrider.errors import ConfigError
from outrider.models.heads.eagle_network import EagleNetwork
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Conventions, DecoderShape, Family, HeadSpec, Widths
from outrider.train.heads.eagle3_files import LAYOUTS, Written
from outrider.train.heads.layers import MLP, Attention, Course, Layer, RMSNorm, Seen
from outrider.train.heads.pieces import Packed
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.shape import decoder_shape, feature_layers
from outrider.train.heads.student import HeadStudent, reset
from outrider.train.heads.teacher import Taught, Teacher
from outrider.train.heads.timing import row_pass

DEPTHS = 3


class Eagle3(HeadStudent):
    """One head.

    Args:
        spec: which parts it has, and how they are run.
        depths: steps of training-time test.
    """

    kind = "eagle3"
    layouts = tuple(LAYOUTS)
    lead = 1
    max_depth = None

    def __init__(
        self,
        spec: HeadSpec,
        teacher: Teacher,
        ids_D: Tensor | None,
        *,
        depths: int = DEPTHS,
        has_fc_bias: bool = False,
    ) -> None:
        super().__init__()
        _check(spec)
        assert spec.decoder is not None
        self.spec = spec
        self.depths = depths
        self.boundaries = spec.conventions.feature_layers or (teacher.spec.num_layers,)
        self._teacher = teacher
        self._make(spec.decoder, spec.widths, has_fc_bias)
        self.keep_ids(ids_D)

    @classmethod
    def fresh(cls, teacher: Teacher, settings: DraftTraining, ids_D: Tensor | None) -> Self:
        """The embedding is the target's and stays so; the LM head starts from the target's rows."""
        spec = _new_spec(teacher, settings, ids_D)
        head = cls(spec, teacher, ids_D, depths=settings.depths or DEPTHS)
        reset(head, settings.seed)
        with torch.no_grad():
            head.lm_head.weight.copy_(teacher.head_weight(ids_D))
            head.norm.weight.copy_(teacher.final_gain())
        return head

    @classmethod
    def load(cls, folder: Path, teacher: Teacher) -> Self:
        spec, tensors = load_head(folder, teacher.target)
        if spec.family is not Family.EAGLE3:
            raise ConfigError(f"{str(folder)!r} is of the family {spec.family}, not EAGLE-3")
        ids_D = tensors.pop("target_ids", None)
        head = cls(spec, teacher, ids_D, has_fc_bias="fc.bias" in tensors)
        head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return head

    def states(self, batch: Packed, taught: Taught, num_depths: int) -> Iterator[Tensor]:
        """Normed outputs, step by step."""
        assert self.spec.decoder is not None
        course = Course(batch, self.spec.decoder.rope, len(self.layers))
        input_ND = self.fuse(taught)
        for step in range(num_depths):
            course.begin(step)
            output_ND = self._run(input_ND, batch.tokens_after(1 + step), course)
            normed_ND = self.norm(output_ND)
            yield normed_ND
            is_normed = self.spec.conventions.feedback == "post-norm"
            input_ND = normed_ND if is_normed else output_ND

    def logits(self, depth: int, states_RD: Tensor) -> Tensor:
        if self.spec.conventions.lm_head == "own":
            logits_RD: Tensor = self.lm_head(states_RD)
            return logits_RD.float()
        logits_RV = self._teacher.logits(states_RD)
        return logits_RV if self.ids_D is None else logits_RV[:, self.ids_D]

    def num_passes(self, depth: int) -> int:
        return depth

    def serving_pass(self, num_sequences: int) -> Callable[[], object]:
        network = EagleNetwork(self.head(), self._teacher.shown)
        return row_pass(network, num_sequences, self.spec.widths.hidden)

    def write(
        self, folder: Path, layout: str, about: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        tensors = self.state_dict()
        head = Written(self.spec, tensors, self.ids_D, self.depths, self._teacher, about, dtype)
        LAYOUTS[layout](folder, head)

    def fuse(self, taught: Taught) -> Tensor:
        """What rows of step 0 are fed with: the projected features."""
        kind, has_fc = self.spec.conventions.input_norm, self.spec.widths.num_features > 0
        if not has_fc:
            return taught.final_NH.float()
        features_NF = taught.feature(self.boundaries).float()
        if kind == "all":
            features_NF = self.input_norm(features_NF)
        if kind == "each":
            chunks = features_NF.chunk(len(self.boundaries), dim=-1)
            normed = [norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)]
            features_NF = torch.cat(normed, dim=-1)
        input_ND: Tensor = self.fc(features_NF)
        return input_ND

    def _run(self, input_ND: Tensor, tokens_N: Tensor, course: Course) -> Tensor:
        hidden_ND: Tensor = self.layers[0](
            self._embedded(tokens_N), input_ND, course, course.seen[0]
        )
        for layer, seen in zip(self.layers[1:], course.seen[1:], strict=True):
            hidden_ND = layer(hidden_ND, course, seen)
        return hidden_ND

    def _embedded(self, tokens_N: Tensor) -> Tensor:
        if self.spec.conventions.embedding == "own":
            embedded_ND: Tensor = self.embed_tokens(tokens_N)
            return embedded_ND
        return self._teacher.embed(tokens_N).float()

    def _make(self, shape: DecoderShape, widths: Widths, has_fc_bias: bool) -> None:
        """Modules by the canonical names of tensors, see `models.heads.load`."""
        chosen, hidden = self.spec.conventions, widths.hidden
        if widths.num_features:
            fused = widths.num_features * widths.target_hidden
            self.fc = nn.Linear(fused, hidden, bias=has_fc_bias)
            if chosen.input_norm == "all":
                self.input_norm = RMSNorm(fused, shape.norm_eps)
            if chosen.input_norm == "each":
                norms = (RMSNorm(widths.target_hidden, shape.norm_eps) for _ in self.boundaries)
                self.fc_norm = nn.ModuleList(norms)
        first = FirstLayer(shape, hidden, norm_before_residual=chosen.norm_before_residual)
        self.layers = nn.ModuleList(
            [first, *(_later_layer(shape, hidden) for _ in range(1, shape.num_layers))]
        )
        self.norm = RMSNorm(hidden, shape.norm_eps)
        if chosen.lm_head == "own":
            self.lm_head = nn.Linear(hidden, widths.draft_vocab, bias=False)
        if chosen.embedding == "own":
            self.embed_tokens = nn.Embedding(widths.vocab, hidden)
            self.embed_tokens.requires_grad_(False)


class FirstLayer(nn.Module):
    """Attention over embedding and feature, each normed; the residual stream is the feature's."""

    def __init__(self, shape: DecoderShape, hidden: int, *, norm_before_residual: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden, shape.norm_eps)
        self.hidden_norm = RMSNorm(hidden, shape.norm_eps)
        self.self_attn = Attention(shape, hidden, 2 * hidden)
        self.post_attention_layernorm = RMSNorm(hidden, shape.norm_eps)
        self.mlp = MLP(hidden, shape.intermediate_size)
        self._norm_before_residual = norm_before_residual

    def forward(self, embedded_ND: Tensor, input_ND: Tensor, course: Course, seen: Seen) -> Tensor:
        normed_ND = self.hidden_norm(input_ND)
        both_NX = torch.cat((self.input_layernorm(embedded_ND), normed_ND), dim=-1)
        residual_ND = normed_ND if self._norm_before_residual else input_ND
        hidden_ND = residual_ND + self.self_attn(both_NX, course, seen)
        out_ND: Tensor = hidden_ND + self.mlp(self.post_attention_layernorm(hidden_ND))
        return out_ND


def _later_layer(shape: DecoderShape, hidden: int) -> Layer:
    attention = Attention(shape, hidden, hidden)
    return Layer(attention, hidden, shape.intermediate_size, shape.norm_eps)


def _new_spec(teacher: Teacher, settings: DraftTraining, ids_D: Tensor | None) -> HeadSpec:
    """Conventions that every reader of such heads knows: no norm before `fc`, plain residual."""
    target = teacher.target
    layers = feature_layers(target.num_layers, settings.feature_layers)
    return HeadSpec(
        family=Family.EAGLE3,
        widths=Widths(
            target_hidden=target.hidden_size,
            hidden=target.hidden_size,
            vocab=target.vocab_size,
            draft_vocab=target.vocab_size if ids_D is None else len(ids_D),
            num_features=len(layers),
        ),
        conventions=Conventions(
            feature_layers=layers,
            lm_head="own",
            vocabulary_map="none" if ids_D is None else "offset",
        ),
        decoder=decoder_shape(teacher.values, settings.num_layers or 1),
    )


def _check(spec: HeadSpec) -> None:
    """ConfigError for conventions that only serving turns into the usual ones."""
    chosen = spec.conventions
    for name, usual in (
        ("rope_style", "half-split"),
        ("rope_origin", "own"),
        ("norm_gain", "weight"),
        ("input_state", "normed"),
    ):
        value = getattr(chosen, name)
        if value != usual:
            raise ConfigError(
                f"the head {spec.source!r} has {name}={value!r}; the trainer runs heads with "
                f"{usual!r} only"
            )
