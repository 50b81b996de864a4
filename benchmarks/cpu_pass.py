"""A decode or verify pass on the CPU: cost of rows, and bytes of weights read per second.

python -m benchmarks.cpu_pass --shapes 135m 1b --precisions float32 bfloat16 int8 int4
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from outrider.bench.provenance import as_markdown, provenance
from outrider.cache.pool import KVPool
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder
from outrider.models.weights import tensor_shapes
from outrider.ops.base import Int4Weight, Int8Weight, Span
from outrider.ops.choose import choose
from outrider.ops.cpu.library import library
from outrider.ops.cpu.memory import Arena
from outrider.quant.schemes import find_scheme

BLOCK_SIZE = 16
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
PRECISIONS = ("float32", "bfloat16", "int8", "int8-dynamic", "int8-weight-only", "int4")


class Subject:
    """A random model of one shape and precision with `context` tokens of KV."""

    def __init__(self, shape: str, precision: str, kernels: str, context: int) -> None:
        config = DecoderConfig.from_dict(
            {"model_type": "llama", "max_position_embeddings": 8192, **SHAPES[shape]}
        )
        make = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.ones(size) if len(size) == 1 else _random(size, precision, make)
            for name, size in tensor_shapes(config).items()
            if not (config.is_tied and name == "lm_head.weight")
        }
        scheme = find_scheme(precision if precision.startswith("int") else None)
        self.num_bytes = _product_bytes(tensors, config, precision)
        self.decoder = Decoder(config, tensors, choose(kernels), scheme=scheme)
        spec = self.decoder.spec
        num_blocks = -(-(context + 64) // BLOCK_SIZE)
        self.pool = KVPool(spec.kv_shapes, num_blocks, BLOCK_SIZE, spec.dtype, spec.device)
        self.blocks = list(range(num_blocks))
        self.context = context

    def run(self, rows: int) -> float:
        """Seconds of one pass over `rows` new tokens of one sequence, all of them predicted."""
        start = time.perf_counter()
        with torch.inference_mode():
            span = Span(self.blocks, self.context, rows, (), BLOCK_SIZE)
            layout = self.decoder.ops.layout([span], torch.device("cpu"))
            tokens = torch.arange(5, 5 + rows)
            self.decoder.forward(tokens, layout, self.pool.layers, torch.arange(rows))
        return time.perf_counter() - start


def _random(size: tuple[int, ...], precision: str, make: torch.Generator) -> torch.Tensor:
    weight = torch.empty(size).normal_(0, 0.02, generator=make)
    return weight.bfloat16().float() if precision == "bfloat16" else weight


def _product_bytes(tensors: dict[str, torch.Tensor], config: Any, precision: str) -> int:
    """Bytes of all weights that a pass reads: those of products, with their scales."""
    total = 0
    for name, tensor in tensors.items():
        is_head = name == "lm_head.weight" or (config.is_tied and "embed" in name)
        if len(tensor.shape) == 1 or ("embed" in name and not config.is_tied):
            continue
        total += _bytes_of(tensor, precision, is_head)
    return total


def _bytes_of(weight: torch.Tensor, precision: str, is_head: bool) -> int:
    if precision in ("float32", "bfloat16"):
        return weight.numel() * (4 if precision == "float32" else 2)
    scheme = find_scheme(precision)
    made = (scheme.head if is_head else scheme.layer)(weight[:8])
    assert isinstance(made, Int8Weight | Int4Weight)
    values = made.values if isinstance(made, Int8Weight) else made.packed
    return (values.nbytes + made.scales.nbytes) * weight.shape[0] // 8


def read_bandwidth(num_bytes: int = 1 << 30) -> Callable[[], float]:
    """A function that reads a buffer larger than any cache; bytes per second."""
    kernels = library()
    assert kernels is not None, "the C++ kernels could not be compiled"
    buffer = Arena().place(torch.ones(num_bytes // 4))  # in large pages, as weights are

    def measure() -> float:
        start = time.perf_counter()
        kernels.read(buffer.data_ptr(), buffer.numel(), torch.get_num_threads())
        return num_bytes / (time.perf_counter() - start)

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS[:3])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--kernels", default="cpu")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    facts = provenance()
    bandwidth = read_bandwidth()
    columns = " | ".join(f"{n} rows" for n in args.rows)
    print(f"| shape, precision | ms, 1 row | GB/s | share of read bandwidth | {columns} |")
    for shape in args.shapes:
        for precision in args.precisions:
            subject = Subject(shape, precision, args.kernels, args.context)
            reads: list[float] = []
            times: dict[int, list[float]] = {n: [] for n in [1, *args.rows]}
            for _ in range(args.rounds):  # bandwidth and all row counts in turn
                reads.append(bandwidth())
                for n in times:
                    subject.run(n)  # after a read of other memory; in decoding, pass follows pass
                    times[n].append(subject.run(n))
            shares = [subject.num_bytes / t / r for t, r in zip(times[1], reads, strict=True)]
            costs = (
                statistics.median(t / o for t, o in zip(times[n], times[1], strict=True))
                for n in args.rows
            )
            one = statistics.median(times[1])
            print(
                f"| {shape}, {precision} | {one * 1e3:.2f} | {subject.num_bytes / one / 1e9:.1f} | "
                f"{statistics.median(shares):.2f} | {' | '.join(f'{c:.2f}' for c in costs)} |",
                flush=True,
            )
            del subject
    print(f"\nread bandwidth: {statistics.median(reads) / 1e9:.1f} GB/s (last subject)\n")
    print(as_markdown(facts))


if __name__ == "__main__":
    main()
