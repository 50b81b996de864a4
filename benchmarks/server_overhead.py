"""What the server adds to the bare engine, per request and per token, by way of asking.

python -m benchmarks.server_overhead
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.prompts import held_out_prompts
from outrider.bench.provenance import as_markdown, provenance
from outrider.engine.async_llm import AsyncLLM
from outrider.engine.llm import LLM
from outrider.request import SamplingParams
from outrider.serve.app import create_app
from outrider.serve.config import ServeConfig
from outrider.serve.process import Process
from outrider.stream.events import Committed

BARE, AGAIN = "bare engine", "bare engine again"  # against itself: the machine's noise
STREAM: dict[str, Any] = {"stream": True}
USAGE = {"include_usage": True}
TAILS = {"outrider": {"visibility": "provisional"}}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat, whole": ("/v1/chat/completions", {}),
    "chat, stream": ("/v1/chat/completions", {**STREAM, "stream_options": USAGE}),
    "chat, stream with tails": (
        "/v1/chat/completions",
        {**STREAM, "stream_options": {**USAGE, **TAILS}},
    ),
    "responses, stream": ("/v1/responses", STREAM),
}
SHORT, LONG = 1, 128  # tokens of an answer
NUM_RESAMPLES = 2000
Ask = Callable[[str, int], Coroutine[Any, Any, int]]  # what is said, tokens -> tokens that came
Batch = Callable[[list[str], int], Coroutine[Any, Any, float]]  # -> seconds, all begin together


class Round(NamedTuple):
    """Seconds of a closed batch of short answers, and of long ones."""

    short: float
    long: float


def bare(engine: AsyncLLM) -> Ask:
    tokenizer = engine.llm.tokenizer
    assert tokenizer is not None

    async def ask(said: str, num_tokens: int) -> int:
        prompt = [{"role": "user", "content": said}]
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        count = 0
        async for event in engine.generate(prompt, sampling):
            count += len(event.token_ids) if isinstance(event, Committed) else 0
        return count

    return ask


def http(port: int, arm: str) -> Ask:
    """As little of a client as there can be: its cost is not the server's."""
    path, more = ARMS[arm]

    async def ask(said: str, num_tokens: int) -> int:
        body = json.dumps({**_body(path, said, num_tokens), **more}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        found = re.findall(rb'"(?:completion_tokens|output_tokens)":(\d+)', answer)
        return int(found[-1])

    return ask


def _body(path: str, said: str, num_tokens: int) -> dict[str, Any]:
    common = {"model": "demo", "temperature": 0, "ignore_eos": True}
    if path == "/v1/responses":
        return {**common, "input": said, "max_output_tokens": num_tokens}
    messages = [{"role": "user", "content": said}]
    return {**common, "messages": messages, "max_tokens": num_tokens}


def together(ask: Ask) -> Batch:
    """Seconds from the first request to the last answer."""

    async def batch(prompts: list[str], num_tokens: int) -> float:
        start = time.perf_counter()
        counts = await asyncio.gather(*(ask(said, num_tokens) for said in prompts))
        took = time.perf_counter() - start
        assert counts == [num_tokens] * len(prompts), counts
        return took

    return batch


def elsewhere(port: int) -> Batch:
    """The bare engine of the server's process, which takes the time itself."""

    async def batch(prompts: list[str], num_tokens: int) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(json.dumps([prompts, num_tokens]).encode() + b"\n")
        took = float(await reader.readline())
        writer.close()
        return took

    return batch


async def measure(
    arms: dict[str, Batch], prompts: list[str], num_concurrent: int, num_rounds: int
) -> dict[str, list[Round]]:
    """All arms in each round, forth and back in turn; the first round warms up."""
    found: dict[str, list[Round]] = {arm: [] for arm in arms}
    around = itertools.cycle(prompts)
    for number in range(num_rounds + 1):
        asked = [next(around) for _ in range(num_concurrent)]
        for batch in arms.values():  # the prompts are in the cache
            await batch(asked, SHORT)
        for arm in list(arms)[:: 1 if number % 2 else -1]:
            short = await arms[arm](asked, SHORT)
            found[arm].append(Round(short, await arms[arm](asked, LONG)))
    return {arm: rounds[1:] for arm, rounds in found.items()}


class Ports(NamedTuple):
    """Where the server listens, and who runs the bare engine of its process."""

    http: int
    bare: int


@asynccontextmanager
async def served(llm: LLM) -> AsyncIterator[Ports]:
    """The server in this event loop, and beside it the bare engine that it serves."""
    engine = AsyncLLM(llm)
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    process = Process(create_app(engine, ServeConfig(port=0)), told.set_result)
    batch = together(bare(engine))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        took = await batch(*json.loads(await reader.readline()))
        writer.write(f"{took}\n".encode())
        await writer.drain()
        writer.close()

    task = asyncio.create_task(process.serve_in_loop())
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as orders:
        try:
            port = int((await told).rpartition(":")[2])
            yield Ports(port, orders.sockets[0].getsockname()[1])
        finally:
            process.should_exit = True
            await task


@asynccontextmanager
async def served_elsewhere(_: LLM) -> AsyncIterator[Ports]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.server_overhead", "--serve"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Ports(*json.loads(process.stdout.readline()))
    finally:
        process.communicate()  # the end of its input ends it


async def serve() -> None:
    """Serves until the input ends."""
    async with served(LLM("demo")) as ports:
        print(json.dumps(ports), flush=True)
        await asyncio.to_thread(sys.stdin.read)


PLACES = {
    "process": ("in a process of its own, as `outrider serve demo`", served_elsewhere),
    "loop": ("in the event loop of the client", served),
}


def print_table(num_concurrent: int, found: dict[str, list[Round]]) -> None:
    """One row per arm; what is added is paired round by round."""
    base = found[BARE]
    num_tokens = num_concurrent * (LONG - SHORT)
    for arm, rounds in found.items():
        took = statistics.median(each.long for each in rounds)
        cells = [f"{num_concurrent}", arm, f"{num_concurrent * LONG / took:.0f}"]
        if arm != BARE:
            pairs = list(zip(base, rounds, strict=True))
            per_request = [1e3 * (b.short - a.short) / num_concurrent for a, b in pairs]
            per_token = [
                1e6 * ((b.long - b.short) - (a.long - a.short)) / num_tokens for a, b in pairs
            ]
            times = [b.long / a.long for a, b in pairs]
            cells += [
                _interval(per_request, ".2f"),
                _interval(per_token, ".0f"),
                _interval(times, ".2f"),
            ]
        print(f"| {' | '.join([*cells, *['-'] * (6 - len(cells))])} |", flush=True)


def _interval(values: list[float], form: str) -> str:
    """The median with its 95 % percentile bootstrap; a machine that others use has outliers."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES)
    )
    low, high = medians[int(0.025 * NUM_RESAMPLES)], medians[int(0.975 * NUM_RESAMPLES)]
    return f"{statistics.median(values):{form}} [{low:{form}}, {high:{form}}]"


async def run(args: argparse.Namespace, llm: LLM, prompts: list[str]) -> None:
    for place in args.places:
        said, start = PLACES[place]
        print(f"\nServer {said}\n")
        print("| requests at once | arm | tokens/s | ms a request | µs a token | times the bare |")
        print("|---|---|---|---|---|---|")
        async with start(llm) as ports:
            arms = {BARE: elsewhere(ports.bare), AGAIN: elsewhere(ports.bare)}
            arms |= {arm: together(http(ports.http, arm)) for arm in args.arms}
            for num_concurrent in args.concurrency:
                found = await measure(arms, prompts, num_concurrent, args.rounds)
                print_table(num_concurrent, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--corpus", type=Path, help="as for `outrider train`; default: none")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    asyncio.run(serve() if args.serve else measured(args))


async def measured(args: argparse.Namespace) -> None:
    facts, llm = provenance(), LLM("demo")
    assert llm.tokenizer is not None
    found = held_out_prompts(llm.tokenizer, args.corpus, per_domain=16)
    prompts = [llm.tokenizer.decode(ids) for domain in found.values() for ids in domain]
    await run(args, llm, prompts)
    print(f"\n{as_markdown(facts)}")


if __name__ == "__main__":
    main()
