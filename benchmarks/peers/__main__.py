"""Outrider beside what a CPU user would take instead: same checkpoint, same prompts, in turns.

python -m benchmarks.peers --corpus FOLDER

A worker process per arm, all loaded at the start, one busy at a time. A round visits every arm
with the same prompts; the order turns round each time. A visit asks for one token, for all, and for
one again: all less the faster of the two is decoding. Round 0 warms up and is not counted.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from benchmarks.peers.arms import BASELINE, Arm, Setting, all_arms
from benchmarks.peers.models import MODELS, PEERS
from benchmarks.peers.protocol import Worker
from benchmarks.peers.report import Visit, decode_speed, mismatches, table
from benchmarks.prompts import held_out_prompts
from outrider.bench.provenance import as_markdown, provenance
from outrider.tokenizer import load_tokenizer

SETTLE_S = 0.5  # the last arm's threads stop spinning


def main() -> None:
    args = _arguments()
    command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
    facts = {**provenance(), "command": command}
    arms = _chosen(args)
    prompts = _prompts(args.corpus)
    workers = {arm.name: _start(arm, args.threads) for arm in arms}
    visits: list[Visit] = []
    for concurrency in args.concurrency:
        able = [arm.name for arm in arms if arm.max_concurrency >= concurrency]
        for number in range(args.rounds + 1):
            chosen = _turn(prompts, number, max(concurrency, args.prompts))
            for name in able if number % 2 else reversed(able):
                time.sleep(SETTLE_S)
                visit = _visit(workers[name], name, number, concurrency, chosen, args.num_tokens)
                print(f"{concurrency=} round {number}: {name} {visit.speed:.1f}", file=sys.stderr)
                if number:
                    visits.append(visit)
        ordered = [visit for name in able for visit in visits if visit.arm == name]
        print("\n".join(table(ordered, concurrency, BASELINE)), "", sep="\n", flush=True)
    _print_facts(facts, args, workers)
    exact = {arm.name for arm in arms if arm.is_fp32}
    found = list(mismatches(visits, exact, BASELINE))
    print(f"- float32 answers that differ from {BASELINE}: {len(found)}", *found, sep="\n  - ")
    if args.json:
        args.json.write_text(json.dumps([visit._asdict() for visit in visits]) + "\n")
    for worker in workers.values():
        worker.close()


def _visit(
    worker: Worker,
    name: str,
    number: int,
    concurrency: int,
    prompts: list[list[int]],
    num_tokens: int,
) -> Visit:
    before = worker.ask(prompts, 1, concurrency)
    whole = worker.ask(prompts, num_tokens, concurrency)
    after = worker.ask(prompts, 1, concurrency)
    prefill_s = min(before.seconds, after.seconds)  # a hiccup in it would count as speed
    speed = decode_speed(len(prompts), num_tokens, whole.seconds, prefill_s)
    return Visit(name, number, concurrency, speed, whole.tokens)


def _chosen(args: argparse.Namespace) -> list[Arm]:
    setting = Setting(
        threads=args.threads,
        max_num_seqs=max(args.concurrency),
        k=args.k,
        lookup_k=args.lookup_k,
        llm=tuple(json.loads(text) for text in ["{}", *args.llm]),
    )
    wanted = [BASELINE, *args.arms]
    found = [arm for arm in all_arms(setting) if any(arm.name.startswith(w) for w in wanted)]
    for arm in found:
        if not arm.python(sys.executable).exists():
            print(f"left out, for benchmarks/peers/setup.sh {arm.peer} has not run: {arm.name}")
    return [arm for arm in found if arm.python(sys.executable).exists()]


def _start(arm: Arm, threads: int) -> Worker:
    started = time.perf_counter()
    env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **arm.env}
    log = PEERS / "logs" / f"{arm.name.replace(' ', '-')}.log"
    worker = Worker(arm.python(sys.executable), arm.module, arm.options, env, log)
    print(f"{arm.name} is up after {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return worker


def _prompts(corpus: Path | None) -> list[list[int]]:
    """Domains in turn, so that any few of them are of all kinds."""
    found = held_out_prompts(load_tokenizer(MODELS / "target"), corpus, per_domain=16)
    fewest = min(len(prompts) for prompts in found.values())
    return [prompts[i] for i in range(fewest) for prompts in found.values()]


def _turn(prompts: list[list[int]], number: int, count: int) -> list[list[int]]:
    """The prompts of a round: the next `count`, and from the start again at the end."""
    return [prompts[(number * count + i) % len(prompts)] for i in range(count)]


def _print_facts(
    facts: dict[str, str], args: argparse.Namespace, workers: dict[str, Worker]
) -> None:
    print(as_markdown(facts))
    print(f"- {args.threads} threads an arm, {args.rounds} rounds of {args.prompts} prompts or as")
    print(f"  many as are concurrent, {args.num_tokens} tokens each, decoding only (a call for one")
    print(f"  token taken off); draft model K={args.k}, lookup K={args.lookup_k}")
    for line in dict.fromkeys(_versions(worker.facts) for worker in workers.values()):
        print(f"- {line}")


def _versions(facts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, help="folder of texts, as for the other benchmarks")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4, help="a visit's least")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--k", type=int, default=4, help="drafted tokens of a draft model")
    parser.add_argument("--lookup-k", type=int, default=6, help="drafted tokens of prompt lookup")
    parser.add_argument("--arms", nargs="+", default=[""], help="beginnings of their names")
    parser.add_argument(
        "--llm", nargs="+", default=[], help='further Outrider arms: \'{"quantization": "int8"}\''
    )
    parser.add_argument("--json", type=Path, help="file for every visit, tokens too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
