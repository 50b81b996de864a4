"""Perplexity of quantised models, paired window by window with the model as it is stored.

python -m benchmarks.quantization --data FOLDER --windows 32

Shape legend: T tokens of a window, S of them scored (its later half), V vocabulary.
"""

import argparse
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.bench.provenance import as_markdown, provenance
from outrider.bench.statistics import paired_ratio
from outrider.engine.llm import LLM
from outrider.models.checkpoint import load_tensors
from outrider.models.decoder import Decoder
from outrider.models.hub import resolve
from outrider.models.network import load_network
from outrider.ops.base import GROUP, LayerKV, Linear, Span, Weight
from outrider.ops.quantized import dequantized
from outrider.ops.torch import TorchOps
from outrider.quant.schemes import SCHEMES
from outrider.request import SamplingParams
from outrider.tokenizer import load_tokenizer
from outrider.train.corpus import read_corpus

WIKITEXT = "text/wikitext2_valid.txt"
SHARES = [0.8 + 0.01 * step for step in range(21)]  # of a row's maximum, where it is clipped
OTHERS = ("weights/stories260K", "weights/chars940K")


class Scores(NamedTuple):
    """Of every window the mean loss in nats, and of every scored token the likeliest one."""

    losses: list[float]
    likeliest_S: Tensor


class WeighingOps(TorchOps):
    """Notes every weight it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Weight] = []

    def linear(self, weight: Weight, bias_O: Tensor | None = None) -> Linear:
        self.weights.append(weight)
        return super().linear(weight, bias_O)


def score(network: Decoder, windows: list[list[int]]) -> Scores:
    """Every window by itself, from its first token on."""
    losses, likeliest = [], []
    for window in windows:
        start = len(window) // 2
        logits_SV = later_logits(network, window, start)
        losses.append(F.cross_entropy(logits_SV, torch.tensor(window[start:])).item())
        likeliest.append(logits_SV.argmax(dim=-1))
    return Scores(losses, torch.cat(likeliest))


def later_logits(network: Decoder, window: list[int], start: int) -> Tensor:
    """What is said of the tokens from `start` on."""
    length = len(window) - 1
    layout = network.ops.layout([Span(range(length), 0, length)], network.spec.device)
    kv = [
        LayerKV(
            torch.zeros(length, shape.num_heads, shape.key_width),
            torch.zeros(length, shape.num_heads, shape.value_width),
        )
        for shape in network.spec.kv_shapes
    ]
    wanted_S = torch.arange(start - 1, length)
    return network.forward(torch.tensor(window[:-1]), layout, kv, wanted_S)


def cut(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """Windows that overlap by half, so that scored halves join; at most `count`, spread evenly."""
    starts = list(range(0, len(tokens) - length + 1, length // 2))
    chosen = [starts[i * len(starts) // count] for i in range(min(count, len(starts)))]
    return [tokens[start : start + length] for start in dict.fromkeys(chosen)]


def texts(model: str, data: Path | None, length: int, count: int) -> Iterator[tuple[str, list]]:
    """Windows by the name of their text: held out of the demo's training, and WikiText-2."""
    tokenizer = load_tokenizer(resolve(model))
    if model == "demo":
        for domain in read_corpus(data).domains:
            ids = [[0, *tokenizer.encode(document.text)] for document in domain.held_out]
            yield domain.name, cut([*chain(*ids)], length, count)
    else:
        yield "its own samples", samples(model, length, count)
    if data is not None:
        text = (data / WIKITEXT).read_text(encoding="utf-8")
        yield "WikiText-2", cut(tokenizer.encode(text), length, count)


def samples(model: str, length: int, count: int) -> list[list[int]]:
    """Text drawn from the stored model at temperature 1."""
    sampling = SamplingParams(
        max_tokens=length - 1, temperature=1.0, seed=0, ignore_eos=True, n=count
    )
    (output,) = LLM(model).generate([[1]], sampling, "off")  # 1 begins a text
    return [[1, *completion.token_ids] for completion in output.completions]


def num_bytes(weight: Weight) -> int:
    parts = (weight,) if isinstance(weight, Tensor) else (v for v in weight if torch.is_tensor(v))
    return sum(part.numel() * part.element_size() for part in parts)


def megabytes(network: Decoder, ops: WeighingOps) -> tuple[float, float]:
    """What a pass over the products reads, and what lies in memory, lookups included."""
    products = sum(num_bytes(weight) for weight in ops.weights)
    others = network.spec.num_parameters - sum(weight.shape.numel() for weight in ops.weights)
    head = ops.weights[-1]
    if network.config.is_tied and not isinstance(head, Tensor):
        others += head.shape.numel()  # the lookup keeps the embedding as stored
    return products / 1e6, (products + 4 * others) / 1e6


def report(model: str, data: Path | None, length: int, count: int) -> None:
    by_text = dict(texts(model, data, length, count))
    stored: dict[str, Scores] = {}
    print(f"\n**{Path(model).name}**, windows of {length} tokens\n")
    columns = ("weights", "MB per pass", "MB in all", "text", "windows", "perplexity")
    print(f"| {' | '.join((*columns, 'ratio (95 %)', 'same'))} |\n|{'---|' * 8}")
    for scheme in SCHEMES:
        ops = WeighingOps()
        network = load_network(model, ops=ops, quantization=scheme)
        assert isinstance(network, Decoder)
        sizes = " | ".join(f"{size:.2f}" for size in megabytes(network, ops))
        for name, windows in by_text.items():
            scores = score(network, windows)
            base = stored.setdefault(name, scores)
            print(f"| {scheme} | {sizes} | {name} | {line(scores, base)} |", flush=True)
    print(errors(model))


def errors(model: str) -> str:
    """Squared error of the layers' weights: what a search over the clipping of rows would save."""
    plain = clipped = int4_error = int4_plain = 0.0
    for name, weight_OI in load_tensors(resolve(model)).items():
        if weight_OI.dim() == 2 and "embed" not in name:
            weight_OI = weight_OI.float()
            tops_O1 = weight_OI.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
            rows = [rounding_error(weight_OI, tops_O1 * share / 127, 127) for share in SHARES]
            plain += rows[-1].sum().item()
            clipped += torch.stack(rows).amin(dim=0).sum().item()
            found_OI = dequantized(SCHEMES["int4"].layer(weight_OI))
            int4_error += (found_OI - weight_OI).square().sum().item()
            groups = F.pad(weight_OI, (0, -weight_OI.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
            tops_OG1 = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
            int4_plain += rounding_error(groups, tops_OG1 / 7, 7).sum().item()
    return (
        "\nSquared error of weights: int8 with the best clipping of each row "
        f"{clipped / plain:.3f} of that without; int4 {int4_error / int4_plain:.3f} of rounding to "
        "max / 7."
    )


def rounding_error(weight: Tensor, step: Tensor, limit: int) -> Tensor:
    """Of each row (or group) the squared error of clipped rounding."""
    rounded = (weight / step).round().clamp(-limit, limit) * step
    return (rounded - weight).square().sum(dim=-1)


def line(scores: Scores, base: Scores) -> str:
    pairs = zip(scores.losses, base.losses, strict=True)
    perplexity = paired_ratio([[loss] for loss in scores.losses]).ratio
    same = (scores.likeliest_S == base.likeliest_S).float().mean()
    ratio = paired_ratio([[ours - theirs] for ours, theirs in pairs])
    return (
        f"{len(scores.losses)} | {perplexity:.3f} | {ratio.ratio:.4f} "
        f"({ratio.low:.4f} to {ratio.high:.4f}) | {100 * same:.2f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("OUTRIDER_DATA"))
    parser.add_argument("--windows", type=int, default=32, help="most windows of a text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window at most")
    parser.add_argument("--model", nargs="*", help="demo, or folders of other lean models")
    args = parser.parse_args()
    facts = provenance()
    others = [str(args.data / name) for name in OTHERS] if args.data else []
    for model in args.model or ["demo", *others]:
        spec = load_network(model, ops=TorchOps()).spec
        report(model, args.data, min(args.length, spec.max_positions), args.windows)
    print("\n" + as_markdown(facts))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
