"""Heads that draft from the target's own KV, as they are trained: `KVNetwork` again, for autograd.

Row t stands for a draft that begins when positions 0 to t have KV. Step k of it is given the token
at t + 1 + k and stands at that position; it sees keys 0 to t of the target, whatever k, and of its
own at most those of steps 0 to k. So all steps of all rows have one causal mask. That the target
is run once for all of them is exact, for a draft never sees KV of positions behind t.

Shape legend: N rows, R rows, H hidden width of the target, h of the head, J heads, D width of
one, X of all, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.errors import ConfigError
from outrider.models.checkpoint import load_tensors
from outrider.models.decoder import Decoder
from outrider.models.heads.kv_head import KVHeadShape, KVHeadSpec, write_config
from outrider.models.heads.kv_network import KVNetwork, as_lean, check_kv
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Conventions, Family, Widths
from outrider.models.weights import FINAL_NORM
from outrider.ops.base import Window
from outrider.train.export import write_weights
from outrider.train.heads.files import to_store, write_json, write_sidecar
from outrider.train.heads.layers import Course, Layer, RMSNorm, Seen, Turn, attend, rotated
from outrider.train.heads.pieces import Packed
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.student import HeadStudent, reset
from outrider.train.heads.teacher import Taught, Teacher
from outrider.train.heads.timing import kv_pass

DEPTHS = 4
NUM_LAYERS = 2
# Of a layer of the target, what a layer of the head begins as a copy of.
COPIED = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.q_norm",
    "self_attn.k_proj",
    "self_attn.k_norm",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class KVHead(HeadStudent):
    """One head.

    Args:
        depths: steps that are trained; the head itself runs on for as many as one likes.

    Raises:
        ConfigError: the target is not run by the lean decoder, or has sliding windows.
        PairError: its KV is of another shape.
    """

    kind = "kv"
    layouts = ("outrider",)
    lead = 1
    max_depth = None
    spec: KVHeadSpec

    def __init__(
        self,
        spec: KVHeadSpec,
        teacher: Teacher,
        ids_D: Tensor | None,
        *,
        depths: int = DEPTHS,
    ) -> None:
        super().__init__()
        target = as_lean(teacher.network, "kv_draft")
        check_kv(spec, target)
        self.spec = spec
        self.depths = depths
        self.boundaries = (teacher.spec.num_layers,)
        self._teacher = teacher
        self._rope = target.config.rope
        widths, eps = spec.widths, spec.kv.norm_eps
        self.embedding_norm = RMSNorm(widths.target_hidden, eps)
        self.feature_norm = RMSNorm(widths.target_hidden, eps)
        self.fc = nn.Linear(2 * widths.target_hidden, widths.hidden, bias=False)
        self.layers = nn.ModuleList(
            self._layer(Attention(spec.kv, widths.hidden, has_rope=_has_rope(target, layer)))
            for layer in spec.kv.kv_layers
        )
        self.norm = RMSNorm(widths.hidden, eps)
        if widths.hidden != widths.target_hidden:
            self.output = nn.Linear(widths.hidden, widths.target_hidden, bias=False)
        if spec.conventions.lm_head == "own":
            self.lm_head = nn.Linear(widths.target_hidden, widths.draft_vocab, bias=False)
        else:  # gradients pass through it, so it must be a matrix
            self.register_buffer("_lm_head_VH", teacher.head_weight(), persistent=False)
        self.keep_ids(ids_D)

    @classmethod
    def fresh(cls, teacher: Teacher, settings: DraftTraining, ids_D: Tensor | None) -> Self:
        """Its layers begin as copies of those whose KV they read, where the target has files.

        The LM head is the target's, and stays so, unless there is a draft vocabulary: then it
        begins as the target's rows.
        """
        spec = new_spec(teacher, settings.num_layers or NUM_LAYERS, ids_D)
        head = cls(spec, teacher, ids_D, depths=settings.depths or DEPTHS)
        reset(head, settings.seed)
        folder = teacher.target.folder
        head.copy_layers({} if folder is None else load_tensors(folder))
        with torch.no_grad():
            head.norm.weight.copy_(teacher.final_gain())
            if ids_D is not None:
                head.lm_head.weight.copy_(teacher.head_weight(ids_D))
        return head

    @classmethod
    def load(cls, folder: Path, teacher: Teacher) -> Self:
        spec, tensors = load_head(folder, teacher.target)
        if not isinstance(spec, KVHeadSpec):
            raise ConfigError(f"{str(folder)!r} is of the family {spec.family}, not {Family.KV}")
        tensors = dict(tensors)
        head = cls(spec, teacher, tensors.pop("target_ids", None))
        head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return head

    @torch.no_grad()
    def copy_layers(self, tensors: Mapping[str, Tensor]) -> None:
        """Starts layers from the target's tensors, by their names in its files, where they fit."""
        for name, weight in self.named_parameters():
            found = tensors.get(self._origin(name))
            if found is not None and found.shape == weight.shape:
                weight.copy_(found)

    def states(self, batch: Packed, taught: Taught, num_depths: int) -> Iterator[Tensor]:
        """What is handed on, in the target's width, step by step."""
        course = Course(batch, self._rope, len(self.layers))
        for layer, seen in zip(self.spec.kv.kv_layers, course.seen, strict=True):
            for pool, kept in zip(taught.kv[layer], seen, strict=True):
                kept.append(pool[taught.slots_N].float())
        is_raw = self.spec.conventions.input_state == "raw"
        fed_NH = taught.tapped[self.boundaries[0]] if is_raw else taught.final_NH
        for step in range(num_depths):
            course.begin(1 + step)
            hidden_Nh = self._enter(batch.tokens_after(1 + step), fed_NH.float())
            for module, seen in zip(self.layers, course.seen, strict=True):
                hidden_Nh = module(hidden_Nh, course, seen)
            state_NH = self._hand_on(self.norm(hidden_Nh))
            yield state_NH
            is_normed = self.spec.conventions.feedback == "post-norm"
            fed_NH = state_NH if is_normed else self._hand_on(hidden_Nh)

    def logits(self, depth: int, states_RD: Tensor) -> Tensor:
        is_own = self.spec.conventions.lm_head == "own"
        weight_VH = self.lm_head.weight if is_own else self._lm_head_VH
        assert isinstance(weight_VH, Tensor)
        return F.linear(states_RD, weight_VH).float()

    def num_passes(self, depth: int) -> int:
        return depth

    def serving_pass(self, num_sequences: int) -> Callable[[], object]:
        network = KVNetwork(self.head(), as_lean(self._teacher.network, "kv_draft"))
        return kv_pass(network, num_sequences)

    def write(
        self, folder: Path, layout: str, about: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = to_store(self.state_dict(), dtype)
        if self.ids_D is not None:
            tensors["target_ids"] = self.ids_D.cpu()
        write_json(folder / "config.json", write_config(self.spec))
        write_weights(tensors, folder / "model.safetensors")
        write_sidecar(folder, {}, about)

    def _layer(self, attention: "Attention") -> Layer:
        kv = self.spec.kv
        return Layer(attention, self.spec.widths.hidden, kv.intermediate_size, kv.norm_eps)

    def _enter(self, tokens_N: Tensor, fed_NH: Tensor) -> Tensor:
        embedded_NH = self._teacher.embed(tokens_N).float()
        both = self.embedding_norm(embedded_NH), self.feature_norm(fed_NH)
        is_embedding_first = self.spec.conventions.concatenation == "embedding-first"
        entered_Nh: Tensor = self.fc(torch.cat(both if is_embedding_first else both[::-1], dim=-1))
        return entered_Nh

    def _hand_on(self, hidden_Nh: Tensor) -> Tensor:
        if self.spec.widths.hidden == self.spec.widths.target_hidden:
            return hidden_Nh
        handed_NH: Tensor = self.output(hidden_Nh)
        return handed_NH

    def _origin(self, name: str) -> str:
        """The tensor of the target that one of the head's may begin as a copy of, or ""."""
        if name == "norm.weight":
            return FINAL_NORM
        room, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        if room != "layers" or part.removesuffix(".weight") not in COPIED:
            return ""
        return f"model.layers.{self.spec.kv.kv_layers[int(index)]}.{part}"


class Attention(nn.Module):
    """Queries, and perhaps keys and values of the row itself; `seen` begins with the target's."""

    def __init__(self, shape: KVHeadShape, hidden: int, *, has_rope: bool) -> None:
        super().__init__()
        self._shape = shape
        self._has_rope = has_rope
        num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
        self.q_proj = nn.Linear(hidden, num_heads * shape.key_width, bias=False)
        self.o_proj = nn.Linear(num_heads * shape.value_width, hidden, bias=False)
        if shape.sees_drafts:
            self.k_proj = nn.Linear(hidden, num_kv_heads * shape.key_width, bias=False)
            self.v_proj = nn.Linear(hidden, num_kv_heads * shape.value_width, bias=False)
        self.q_norm = RMSNorm(shape.key_width, shape.norm_eps) if shape.has_qk_norm else None
        has_key_norm = shape.has_qk_norm and shape.sees_drafts
        self.k_norm = RMSNorm(shape.key_width, shape.norm_eps) if has_key_norm else None

    def forward(self, normed_Nh: Tensor, course: Course, seen: Seen) -> Tensor:
        query_NJD = self._turned(self.q_proj(normed_Nh), self.q_norm, course.turn)
        if self._shape.sees_drafts:
            seen.keys.append(self._turned(self.k_proj(normed_Nh), self.k_norm, course.turn))
            values_NX = self.v_proj(normed_Nh)
            seen.values.append(values_NX.unflatten(1, (-1, self._shape.value_width)))
        out_Nh: Tensor = self.o_proj(attend(query_NJD, seen, course.chunks).flatten(1))
        return out_Nh

    def _turned(self, flat_NX: Tensor, norm: nn.Module | None, turn: Turn) -> Tensor:
        heads_NJD = flat_NX.unflatten(1, (-1, self._shape.key_width))
        if norm is not None:
            heads_NJD = norm(heads_NJD).to(flat_NX.dtype)
        return rotated(heads_NJD, turn) if self._has_rope else heads_NJD


def new_spec(
    teacher: Teacher, num_layers: int, ids_D: Tensor | None, *, sees_drafts: bool = True
) -> KVHeadSpec:
    """A head as wide as its target, over the last layers of it.

    Raises:
        ConfigError: it has more layers than the target.
    """
    target = as_lean(teacher.network, "kv_draft")
    config, num_all = target.config, target.spec.num_layers
    if num_layers > num_all:
        raise ConfigError(
            f"num_layers={num_layers}: each layer reads another of the target's, which has "
            f"{num_all}: lower it"
        )
    layers = tuple(range(num_all - num_layers, num_all))
    return KVHeadSpec(
        family=Family.KV,
        widths=Widths(
            target_hidden=config.hidden_size,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            draft_vocab=config.vocab_size if ids_D is None else len(ids_D),
        ),
        conventions=Conventions(
            feedback="post-norm",
            rope_origin="target",
            lm_head="target" if ids_D is None else "own",
            vocabulary_map="none" if ids_D is None else "absolute",
        ),
        kv=KVHeadShape(
            kv_layers=layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            key_width=config.head_dim,
            value_width=config.head_dim,
            intermediate_size=config.intermediate_size,
            norm_eps=config.norm_eps,
            has_qk_norm=config.has_qk_norm,
            sees_drafts=sees_drafts,
        ),
    )


def _has_rope(target: Decoder, layer: int) -> bool:
    """ConfigError for a layer that does not see all positions: training has no such mask."""
    read = target.config.layers[layer]
    if read.window != Window():
        raise ConfigError(
            f"layer {layer} of target {target.spec.name!r} has a window ({read.window}), which "
            "heads over its KV cannot be trained with: train another kind"
        )
    return read.has_rope
