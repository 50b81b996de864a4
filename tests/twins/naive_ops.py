"""The slow twin of every kernel: loops over rows, heads and positions, as the definitions say."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.ops.base import DecoderParts, DecoderPass, LayerKV, Layout, Linear, Span, Window


@dataclass(frozen=True)
class Path:
    """What one row may see: slots from position 0 to its own, itself last."""

    slots: list[int]

    @property
    def position(self) -> int:
        return len(self.slots) - 1


class NaiveOps:
    """`Ops` by definition; batch-invariant, because no row ever meets another."""

    name = "naive"
    is_batch_invariant = True

    def layout(self, spans: list[Span], device: torch.device) -> Layout:
        paths = [path for span in spans for path in paths_of(span)]
        return Layout(
            spans=spans,
            positions_N=torch.tensor([path.position for path in paths], device=device),
            slots_N=torch.tensor([path.slots[-1] for path in paths], device=device),
            plan=paths,
        )

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
        def apply(x_NI: Tensor) -> Tensor:
            rows = [weight_OI @ x_I + (0 if bias_O is None else bias_O) for x_I in x_NI]
            return torch.stack(rows) if rows else x_NI.new_empty(0, weight_OI.shape[0])

        return apply

    def write_kv(self, kv: LayerKV, keys_NGD: Tensor, values_NGE: Tensor, layout: Layout) -> None:
        for row, slot in enumerate(layout.slots_N.tolist()):
            kv.keys[slot] = keys_NGD[row]
            kv.values[slot] = values_NGE[row]

    def attend(
        self,
        query_NHD: Tensor,
        kv: LayerKV,
        layout: Layout,
        *,
        scale: float,
        window: Window = Window(),
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(layout.plan, list)
        rows = [
            _attend_row(query_HD, kv, seen_slots(path, window), scale, softcap, sinks_H)
            for query_HD, path in zip(query_NHD, layout.plan, strict=True)
        ]
        return torch.stack(rows).to(query_NHD.dtype)

    def argmax(self, logits_RV: Tensor) -> list[int]:
        return [likeliest(row) for row in logits_RV.tolist()]

    def fuse(self, parts: DecoderParts) -> DecoderPass | None:
        return None


def likeliest(logits: list[float]) -> int:
    """Index of the first of the largest; -1 where one is NaN, or the largest is infinite."""
    if any(math.isnan(logit) for logit in logits) or math.isinf(max(logits)):
        return -1
    return logits.index(max(logits))


def paths_of(span: Span) -> list[Path]:
    """The path of each new row of a sequence: chain rows in order, then the tree's nodes."""
    num_context = span.num_cached + span.num_chain
    slots = span.slots()
    chain = [Path(slots[: end + 1]) for end in range(span.num_cached, num_context)]
    nodes: list[Path] = []
    for node, parent in enumerate(span.parents):
        above = chain[-1] if parent < 0 else nodes[parent]
        nodes.append(Path([*above.slots, slots[num_context + node]]))
    return chain + nodes


def seen_slots(path: Path, window: Window) -> list[int]:
    """Slots of the path that a window leaves visible to its last row."""
    return [
        slot
        for position, slot in enumerate(path.slots)
        if (not window.sliding or position > path.position - window.sliding)
        and (not window.chunk or position // window.chunk == path.position // window.chunk)
    ]


def _attend_row(
    query_HD: Tensor,
    kv: LayerKV,
    slots: list[int],
    scale: float,
    softcap: float,
    sinks_H: Tensor | None,
) -> Tensor:
    """softmax(q k / scale) v of every head, out_HE in float32."""
    num_heads, num_groups = query_HD.shape[0], kv.keys.shape[1]
    heads = []
    for head in range(num_heads):
        group = head * num_groups // num_heads
        sink = None if sinks_H is None else float(sinks_H[head])
        scores = [scale * float(query_HD[head].float() @ kv.keys[s, group].float()) for s in slots]
        weights = softmax([squash(score, softcap) for score in scores], sink)
        values = [kv.values[slot, group].float() for slot in slots]
        heads.append(sum((w * v for w, v in zip(weights, values, strict=True)), torch.tensor(0.0)))
    return torch.stack(heads)


def squash(score: float, softcap: float) -> float:
    return softcap * math.tanh(score / softcap) if softcap else score


def softmax(scores: list[float], sink: float | None) -> list[float]:
    """Shares of each score; a sink takes its share and gives nothing."""
    top = max(scores + ([] if sink is None else [sink]))
    exponentials = [math.exp(score - top) for score in scores]
    total = sum(exponentials) + (0.0 if sink is None else math.exp(sink - top))
    return [exponential / total for exponential in exponentials]
