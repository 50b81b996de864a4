"""Cost of a linear layer by number of rows, and whether rows keep their bits.

python -m benchmarks.linear_rows --shape 2048 2048 --layers 16
"""

import argparse
import time

import torch

from outrider.bench.provenance import as_markdown, provenance
from outrider.ops.base import Linear
from outrider.ops.linear import CANDIDATES, PROBED_ROWS, is_invariant, plain

ROWS = (1, 2, 4, 8, 16, 32)


def milliseconds(linears: list[Linear], x_NI: torch.Tensor, repeats: int) -> float:
    """Best time of a pass over all layers; so many of them that weights come from memory."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for linear in linears:
            linear(x_NI)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 2048])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    facts = provenance()
    torch.manual_seed(0)
    weights = [torch.randn(*args.shape) for _ in range(args.layers)]
    probe_NI = torch.randn(max(PROBED_ROWS), args.shape[1])
    expected_NO = torch.nn.functional.linear(probe_NI, weights[0])
    print(f"| ms for {args.layers} layers | {' | '.join(map(str, ROWS))} | rows keep their bits |")
    for name, make in {"F.linear": plain, **CANDIDATES}.items():
        linears = [make(weight, None) for weight in weights]
        times = [milliseconds(linears, probe_NI[:n].clone(), args.repeats) for n in ROWS]
        kept = is_invariant(linears[0], probe_NI, expected_NO)
        print(f"| {name} | {' | '.join(f'{t:.2f}' for t in times)} | {'yes' if kept else 'no'} |")
    print("\n" + as_markdown(facts))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
