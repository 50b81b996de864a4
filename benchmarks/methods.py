"""Every drafter on every workload, and every rule on the same trees, with the demo pair.

python -m benchmarks.methods --data FOLDER
"""

import argparse
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.methods_page import Entries, Entry, write_figures, write_page
from benchmarks.prompts import held_out_prompts
from outrider.bench import workloads
from outrider.bench.provenance import provenance
from outrider.bench.replay import Replayed, bootstrap, replay, without_model
from outrider.bench.statistics import paired_ratio, verdict
from outrider.cli.bench_replay import to_json as replayed_to_json
from outrider.draft.base import Drafter, ModelParts, Surroundings
from outrider.draft.datastore import Datastore
from outrider.draft.drafters import Drafters
from outrider.engine.build import DEMO, DEMO_DRAFT, MODEL_DRAFTER
from outrider.engine.llm import LLM
from outrider.engine.outputs import RequestOutput
from outrider.engine.prompts import Prompt
from outrider.errors import ConfigError, OutriderError
from outrider.models.hub import resolve
from outrider.registry import DRAFTERS, VERIFIERS
from outrider.request import SamplingParams, SpeculationParams
from outrider.sampling.laws import TargetLaws
from outrider.sampling.rng import PositionStream, RootStream, Stream
from outrider.sequence import Sequence
from outrider.step import Batch, DraftTree, Kind, TargetOutput
from outrider.testing import ScriptedDrafter
from outrider.tokenizer import load_tokenizer
from outrider.train.corpus import read_corpus
from outrider.verify.base import Verifier
from outrider.verify.verifiers import verifier

REPEAT_LAST = "repeat_last"
PREDICTED = "prediction, 1 token in 16 wrong"


class Arm(NamedTuple):
    """One way to answer: a label, and the speculation it asks for."""

    name: str
    speculation: SpeculationParams


class Timed(NamedTuple):
    """One timed answer: seconds of the whole call, and what came out."""

    seconds: float
    output: RequestOutput

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / max(1, len(self.output.token_ids))


PLAIN = Arm("plain", SpeculationParams(method="off"))
NUM_WARM_UP_TOKENS = 3  # enough for a draft, too few to learn the answer from
REPLAYED = ("tau_bench", "swe_agent", "aider")
# Settings where a drafter's own defaults are made for a larger machine: small trees.
SMALL: dict[str, dict[str, Any]] = {
    "lookahead": {
        "num_draft_tokens": 4,
        "num_nodes": 12,
        "drafter_options": {"window": 3, "ngram": 3, "guesses": 3},
    },
}
# Other settings of a drafter, as rows of their own.
VARIANTS: dict[str, dict[str, Any]] = {
    "draft_model, tree of 8": {"method": "draft_model", "width": 3, "num_nodes": 8},
    "suffix, own text only": {"method": "suffix", "drafter_options": {"shared": "none"}},
    "lookahead, 56 nodes": {"method": "lookahead"},
    PREDICTED: {"method": "prediction"},
}
# Drafters on pairs of two vocabularies, and what they are compared with.
ACROSS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram"},
    "suffix": {"method": "suffix"},
    "translate, by strings": {"method": "translate", "drafter_options": {"by": "strings"}},
    "translate, by tokens": {"method": "translate", "drafter_options": {"by": "tokens"}},
}
# Target and drafter, below the data folder.
PAIRS = (
    ("weights/stories260K", "weights/chars940K"),
    ("weights/chars940K", "weights/stories260K"),
)
STORIES = (
    "Once upon a time, there was a little girl named",
    "One day, Tom and his dog went to the",
    "The sun was shining and the birds were",
    "Lily had a red ball. She liked to",
    "Ben was sad because he lost his",
    "There was a big tree in the garden. Under the tree",
    'Mom said, "Do not go into the',
    "A small cat sat on the mat. It saw a",
    "In the forest lived an old bear who",
    "Sara and Max were playing in the park when",
    "The little boat wanted to see the",
    "It was raining, so the children",
    "Once there was a bunny who did not like",
    "Dad made a cake for",
    "The boy found a shiny stone. He",
    "At night the moon looked down and",
)
NOT_HERE = {
    "translate": "the models of the demo pair have one vocabulary: nothing to translate; a pair "
    "that has two is in a section of its own"
}
TOKENS_PER_DOMAIN = 400_000  # of the training texts, for rest
NUM_DRAWS = 8  # verdicts of each rule on each tree
WIDTH = 3


class Proposal(NamedTuple):
    """One way in which the draft model makes a tree, and what the rules make of it.

    Attributes:
        is_coupled: drawn with the noise of the target's own draws; then a rule sees that noise, and
            its verdict is the same however often it is asked.
    """

    kind: Kind
    settings: dict[str, Any]
    is_coupled: bool = False


PROPOSALS = {
    "picked chain": Proposal(Kind.PICKED_CHAIN, {"draft_sample_method": "greedy"}),
    "coupled chain": Proposal(Kind.DRAWN_CHAIN, {"draft_sample_method": "coupled"}, True),
    "drawn chain": Proposal(Kind.DRAWN_CHAIN, {"draft_sample_method": "probabilistic"}),
    "picked tree": Proposal(Kind.PICKED_TREE, {"draft_sample_method": "greedy", "width": WIDTH}),
    "drawn tree": Proposal(
        Kind.DRAWN_TREE, {"draft_sample_method": "probabilistic", "width": WIDTH}
    ),
    "independent chains": Proposal(
        Kind.DRAWN_CHAINS, {"draft_sample_method": "independent", "width": WIDTH}
    ),
}


class Results:
    """What was measured so far, kept in a file after every entry: a run may be stopped at will.

    Args:
        size: what the entries of this run share; those of a run of another size are left alone.
    """

    def __init__(self, path: Path, size: str, facts: dict[str, Any]) -> None:
        self.path, self.size = path, size
        held = json.loads(path.read_text()) if path.is_file() else {"entries": {}}
        self._all: dict[str, Any] = {"provenance": {**held.get("provenance", {}), size: facts}}
        self._all["entries"] = held["entries"]

    def get(self, key: str, measure: Callable[[], Entry]) -> Entry:
        """The entry of that name; measured if it is not there, or could not be made before."""
        name = f"{self.size} | {key}"
        entries: dict[str, Entry] = self._all["entries"]
        if name not in entries or "reason" in entries[name]:
            try:
                entries[name] = measure()
            except OutriderError as error:
                entries[name] = {"reason": str(error)}
            except Exception as error:  # one broken part shall not cost the table of the others
                entries[name] = {"reason": f"failed: {error!r}"}
            entries[name]["commit"] = self.facts["commit"]
            self.path.write_text(json.dumps(self._all, indent=1) + "\n")
            print(f"{name}: {_short(entries[name])}", flush=True)
        return entries[name]

    def of_this_size(self) -> Entries:
        """By (section, drafter or kind, workload), in the order they were first measured."""
        keys = (name.split(" | ") for name in self._all["entries"])
        return {
            (section, name, workload): self._all["entries"][
                f"{size} | {section} | {name} | {workload}"
            ]
            for size, section, name, workload in keys
            if size == self.size
        }

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = self._all["provenance"][self.size]
        return found


class Bench:
    """A pair, and drafters made afresh for every entry: no memory of what came before.

    Args:
        model, draft_model: as `LLM` takes them.
        not_here: reasons by drafter, for those that have nothing to do on this pair.
    """

    def __init__(
        self,
        datastore: Path | None = None,
        *,
        model: str = DEMO,
        draft_model: str = DEMO_DRAFT,
        not_here: Mapping[str, str] = NOT_HERE,
    ) -> None:
        self.datastore = None if datastore is None else str(datastore)
        self.model, self.draft_model = model, draft_model
        self.not_here = not_here
        self._llm: LLM | None = None

    @property
    def llm(self) -> LLM:
        if self._llm is None:
            self._llm = LLM(self.model, draft_model=self.draft_model)
        return self._llm

    def with_drafters(self, name: str) -> LLM:
        """The engine with new drafters. ConfigError if `name` is none of them, with the reason."""
        made = self._made(name)
        self.llm.engine.drafters = Drafters([*made.values(), repeat_last()])
        return self.llm

    def discard(self) -> None:
        """After a failure nobody knows what state the engine is in."""
        self._llm = None

    def _made(self, asked: str) -> dict[str, Drafter]:
        made: dict[str, Drafter] = {}
        for name in sorted(DRAFTERS.names(), key=_composes):
            try:
                made[name] = self._make(name, made)
            except ConfigError:
                if name == asked:
                    raise
        return made

    def _make(self, name: str, made: dict[str, Drafter]) -> Drafter:
        if name in self.not_here:
            raise ConfigError(self.not_here[name])
        found = DRAFTERS.load(name)
        if not hasattr(found, "build"):
            drafter: Drafter = found()
            return drafter
        built: Drafter = found.build(self._surroundings(made))
        return built

    def _surroundings(self, made: dict[str, Drafter]) -> Surroundings:
        engine, tokenizer = self.llm.engine, self.llm.tokenizer
        shares = engine.default_drafter == MODEL_DRAFTER
        model: Any = engine.drafters[engine.default_drafter]
        other = load_tokenizer(resolve(self.draft_model))
        return Surroundings(
            target=ModelParts(runner=engine.runner, manager=engine.manager, tokenizer=tokenizer),
            draft=ModelParts(runner=model.runner, manager=model.manager, tokenizer=other),
            shares_vocabulary=shares,
            datastore=self.datastore,
            drafters=dict(made),
        )


def repeat_last() -> Drafter:
    """The most trivial baseline: the last token over and over."""

    def propose(seq: Sequence, plan: Any) -> DraftTree:
        depth = min(plan.depth, plan.num_nodes)
        return DraftTree.chain([seq.tokens[-1]] * depth, REPEAT_LAST)

    return ScriptedDrafter(propose, REPEAT_LAST)


def live(bench: Bench, name: str, prompts: list[Prompt], max_tokens: int) -> Entry:
    """One drafter against plain decoding, prompt by prompt: plain, speculative, plain.

    The drafter answers each prompt once only: one that remembers answers would know the second.
    """
    try:
        llm = bench.with_drafters(_method(name))
        sampling = _sampling(max_tokens)
        return _live(llm, [_arm(llm, name, p, sampling) for p in prompts], prompts, sampling)
    except OutriderError:
        raise
    except Exception:
        bench.discard()
        raise


def _arm(llm: LLM, name: str, prompt: Prompt, sampling: SamplingParams) -> Arm:
    """A prediction is the answer itself with wrong tokens in it, so it differs by prompt."""
    params = _params(name)
    if name != PREDICTED:
        return Arm(name, params)
    (answer,) = llm.generate([prompt], sampling, PLAIN.speculation)
    expected = list(answer.token_ids)
    expected[15::16] = [0] * len(expected[15::16])
    return Arm(name, replace(params, prediction_token_ids=tuple(expected)))


def _live(llm: LLM, arms: list[Arm], prompts: list[Prompt], sampling: SamplingParams) -> Entry:
    clock = Clock(llm.engine.drafters[_method(arms[0].name)])
    few = _sampling(NUM_WARM_UP_TOKENS)
    log_ratios, plains, timed = [], [], []
    for arm, prompt in zip(arms, prompts, strict=True):
        for warmed in (PLAIN, arm):
            llm.generate([prompt], few, warmed.speculation)
        clock.start()
        before, one, after = (_answer(llm, prompt, each, sampling) for each in (PLAIN, arm, PLAIN))
        clock.stop()
        plains += [before, after]
        timed.append(one)
        both = math.log(before.seconds_per_token) + math.log(after.seconds_per_token)
        log_ratios.append(both / 2 - math.log(one.seconds_per_token))
    found = paired_ratio([[each] for each in log_ratios])
    metrics = [one.output.metrics for one in timed]
    num_drafts = sum(m.num_drafts for m in metrics)
    same = [
        one.output.token_ids == plain.output.token_ids
        for one, plain in zip(timed, plains[::2], strict=True)
    ]
    return {
        "speculation": _given(replace(arms[0].speculation, prediction_token_ids=None)),
        "ratio": found.ratio,
        "low": found.low,
        "high": found.high,
        "num_prompts": found.num_clusters,
        "verdict": verdict(found),
        "plain_tokens_per_second": _speed(plains),
        "tokens_per_second": _speed(timed),
        "acceptance_length": 1 + sum(m.num_accepted_tokens for m in metrics) / max(1, num_drafts),
        "tokens_per_pass": sum(m.num_generated_tokens for m in metrics)
        / sum(m.num_steps for m in metrics),
        "draft_ms": 1e3 * clock.seconds / max(1, clock.num_calls),
        "num_identical": sum(same),
    }


def across(data: Path | None, name: str, target: str, draft: str, size: tuple[int, int]) -> Entry:
    """One drafter on a pair of two vocabularies, on beginnings of children's stories.

    Args:
        size: prompts, and tokens of each answer.

    Raises:
        ConfigError: the weights are not at hand.
    """
    for part in (target, draft):
        if data is None or not (data / part).is_dir():
            raise ConfigError(f"skipped: no {part} in the data folder; give --data FOLDER")
    assert data is not None
    bench = Bench(model=str(data / target), draft_model=str(data / draft), not_here={})
    num_prompts, max_tokens = size
    load_average = os.getloadavg()[0]
    found = live(bench, name, list(STORIES[:num_prompts]), max_tokens)
    return {**found, "num_threads": torch.get_num_threads(), "load_average": load_average}


def _as_pair(target: str, draft: str) -> str:
    return f"{Path(target).name}, drafted by {Path(draft).name}"


def replayed(
    name: str, workload: str, data: Path, num_records: int, datastore: str | None
) -> Entry:
    """One drafter over the first answers of a log."""
    tokenizer = demo_tokenizer()
    records = encoded(workload, data, num_records)

    def make() -> Drafters:
        if name == REPEAT_LAST:
            return Drafters([repeat_last()])
        return without_model(name, tokenizer, datastore)

    found: Replayed = replay(records, make, _params(name), workload=workload)
    return replayed_to_json(found)


@cache
def demo_tokenizer() -> Any:
    return load_tokenizer(resolve("demo"))


@cache
def encoded(workload: str, data: Path, num_records: int) -> list[workloads.Encoded]:
    encoder = workloads.Encoder(demo_tokenizer())
    return [encoder(record) for record in workloads.load(workload, data)[:num_records]]


def training_datastore(data: Path | None, folder: Path) -> Path:
    """A datastore of texts that the demo pair was trained on: prompts and answers are not in it."""
    tokenizer = demo_tokenizer()
    documents = []
    for domain in read_corpus(data).domains:
        num_tokens = 0
        for document in domain.training:
            if num_tokens >= TOKENS_PER_DOMAIN:
                break
            documents.append(tokenizer.encode(document.text, add_special_tokens=False))
            num_tokens += len(documents[-1])
    fingerprint, vocab_size = tokenizer.fingerprint(), tokenizer.vocab_size
    Datastore.build(documents, fingerprint=fingerprint, vocab_size=vocab_size).save(folder)
    return folder


class Judges:
    """Stands where the engine's verifiers stand, and asks all rules about each tree on the way.

    The engine goes on by its own rule, so contexts and trees do not depend on who is asked.

    Attributes:
        sums: per rule, per request: trees judged and tokens accepted, draws counted apart.
    """

    def __init__(self, inner: Any, rules: dict[str, Verifier], is_coupled: bool) -> None:
        self.inner, self.rules, self.is_coupled = inner, rules, is_coupled
        self.sums: dict[str, dict[str, list[int]]] = {name: {} for name in rules}

    def verify(self, batch: Batch, drafts: list[DraftTree], output: TargetOutput) -> Any:
        for row, tree, first in zip(batch.rows, drafts, output.first, strict=True):
            if first >= 0 and len(tree):
                self._judge(row.seq, tree, output, first)
        return self.inner.verify(batch, drafts, output)

    def _judge(self, seq: Sequence, tree: DraftTree, output: TargetOutput, first: int) -> None:
        p = TargetLaws(
            seq.shaper,
            output.logits_NV,
            output.argmax_N,
            seq.tokens,
            tree.path_tokens,
            seq.grammar,
            first,
        )
        for name, rule in self.rules.items():
            told = self.sums[name].setdefault(seq.request.id, [0, 0])
            for rng in self._streams(rule, seq):
                told[0] += 1
                told[1] += len(rule.verify(tree, p, rng).accepted)

    def _streams(self, rule: Verifier, seq: Sequence) -> list[Stream]:
        at = len(seq.tokens)
        if self.is_coupled:
            return [PositionStream(seq.seed, at)]
        seeds = [1_000_003 * (draw + 1) for draw in range(NUM_DRAWS)]
        if rule.keyed_by == "position":
            return [PositionStream(seed, at) for seed in seeds]
        return [RootStream(seed, at - 1, "verify") for seed in seeds]


def judged(bench: Bench, proposal: Proposal, prompts: list[Prompt], max_tokens: int) -> Entry:
    """Acceptance length of every rule that takes this kind of proposal, on the same trees."""
    llm = bench.with_drafters("draft_model")
    settings = {"verifier": "sampled", **proposal.settings}
    params = SpeculationParams(method="draft_model", policy="fixed", **settings)
    judges = Judges(llm.engine.verifiers, _rules(proposal), proposal.is_coupled)
    llm.engine.verifiers = judges  # type: ignore[assignment]
    try:
        for prompt in prompts:
            llm.generate([prompt], _sampling(max_tokens, temperature=1.0), params)
    finally:
        bench.discard()
    lengths = {}
    for name, sums in judges.sums.items():
        rows_SC = np.array(list(sums.values()), dtype=np.float64)
        found = bootstrap(rows_SC, lambda sums_XC: 1 + sums_XC[:, 1] / sums_XC[:, 0])
        exactness = str(judges.rules[name].exactness.value)
        lengths[name] = {**found._asdict(), "exactness": exactness}
    return {"speculation": _given(params), "rules": lengths}


def _rules(proposal: Proposal) -> dict[str, Verifier]:
    """Those that keep their promise for it; at temperature 0 alone, none of them differs."""
    rules = {name: verifier(name) for name in VERIFIERS.names()}
    return {
        name: rule
        for name, rule in rules.items()
        if proposal.kind in rule.accepts
        and not rule.greedy_only
        and (rule.keyed_by == "position" or not proposal.is_coupled)
    }


def live_prompts(llm: LLM, data: Path | None, count: int) -> dict[str, list[Prompt]]:
    """Prompts by workload: the demo pair's own domains, and what lies in the data folder."""
    assert llm.tokenizer is not None
    own = held_out_prompts(llm.tokenizer, data, per_domain=count)
    found: dict[str, list[Prompt]] = {name: list(ids) for name, ids in own.items()}
    for name, (file, prompt) in TASKS.items():
        path = None if data is None else workloads.find(file, data)
        if path is not None:
            lines = path.read_text(encoding="utf-8").splitlines()
            stride = max(1, len(lines) // count)
            found[name] = [prompt(json.loads(line)) for line in lines[::stride][:count]]
    return found


def _asks(text: str) -> Prompt:
    return [{"role": "user", "content": text}]


def _programs(problem: Any) -> Prompt:
    """A problem as a comment, and the first line of a solution."""
    code: str = problem["code"].replace("\r", "").strip()
    return f"# {problem['text']}\n{code.splitlines()[0]}\n"


TASKS: dict[str, tuple[str, Callable[[Any], Prompt]]] = {
    "gsm8k": ("gsm8k_model_solutions.jsonl", lambda line: _asks(line["question"])),
    "mt_bench": ("mt_bench_question.jsonl", lambda line: _asks(line["turns"][0])),
    "mbpp": ("mbpp.jsonl", _programs),
}


def _sampling(max_tokens: int, temperature: float = 0.0) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=1, ignore_eos=True)


def _params(name: str) -> SpeculationParams:
    usual = {"method": name, **SMALL.get(name, {})}
    given: dict[str, Any] = {**VARIANTS, **ACROSS}.get(name, usual)
    # What the drafter does is measured, not what a policy makes of it.
    return SpeculationParams(**{"policy": "fixed", **given})


def _method(name: str) -> str:
    return str(_params(name).method)


def _given(params: SpeculationParams) -> dict[str, Any]:
    usual = asdict(SpeculationParams())
    given = {key: value for key, value in asdict(params).items() if value != usual[key]}
    given.pop("policy", None)  # all of them are fixed
    return given


def _composes(name: str) -> bool:
    try:
        return "drafters" in DRAFTERS.load(name).needs
    except Exception:  # told when it is made
        return False


class Clock:
    """Seconds inside a drafter's `draft`, and its calls, between start and stop."""

    def __init__(self, drafter: Any) -> None:
        self.seconds, self.num_calls, self._is_running = 0.0, 0, False
        self._draft, drafter.draft = drafter.draft, self._timed

    def start(self) -> None:
        self._is_running = True

    def stop(self) -> None:
        self._is_running = False

    def _timed(self, rows: Any, plan: Any) -> Any:
        start = time.perf_counter()
        trees = self._draft(rows, plan)
        if self._is_running:
            self.seconds += time.perf_counter() - start
            self.num_calls += 1
        return trees


def _answer(llm: LLM, prompt: Prompt, arm: Arm, sampling: SamplingParams) -> Timed:
    start = time.perf_counter()
    (output,) = llm.generate([prompt], sampling, arm.speculation)
    return Timed(time.perf_counter() - start, output)


def _speed(timed: list[Timed]) -> float:
    return sum(len(t.output.token_ids) for t in timed) / sum(t.seconds for t in timed)


def _short(entry: Entry) -> str:
    if "reason" in entry:
        return str(entry["reason"])
    keys = [key for key in ("ratio", "acceptance_length", "tokens_per_call") if key in entry]
    return json.dumps({key: entry[key] for key in keys} or entry["rules"])[:160]


def main() -> None:
    args = _arguments()
    num_prompts, max_tokens, num_records = (2, 24, 4) if args.quick else args.size
    size = f"{num_prompts} prompts, {max_tokens} tokens, {num_records} answers"
    results = Results(args.json, size, {**provenance(), "command": _command(args)})
    folder = tempfile.TemporaryDirectory()
    bench = Bench(args.datastore or training_datastore(args.data, Path(folder.name)))
    prompts = live_prompts(bench.llm, args.data, num_prompts)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # logs may be longer than contexts
    names = [REPEAT_LAST, *(args.drafters or DRAFTERS.names())]
    rows = names if args.drafters else [*names, *VARIANTS]
    for name, (workload, asked) in product(rows, prompts.items()):
        measure = partial(live, bench, name, asked, max_tokens)
        results.get(f"live | {name} | {workload}", measure)
    for name, workload in product(names if args.data else [], REPLAYED):
        measure = partial(replayed, name, workload, args.data, num_records, bench.datastore)
        results.get(f"replay | {name} | {workload}", measure)
    for (target, draft), name in product(PAIRS, ACROSS):
        if not args.drafters or _method(name) in args.drafters:
            measure = partial(across, args.data, name, target, draft, (num_prompts, max_tokens))
            results.get(f"across | {name} | {_as_pair(target, draft)}", measure)
    few = max(1, num_prompts // 2)
    mixed = [prompt for asked in prompts.values() for prompt in asked[:few]]
    for name, proposal in PROPOSALS.items():
        results.get(f"rules | {name} | mixed", partial(judged, bench, proposal, mixed, max_tokens))
    entries = results.of_this_size()
    write_figures(entries, args.figures, size)
    write_page(entries, args.page, results.facts, size, {k: len(v) for k, v in prompts.items()})


def _command(args: argparse.Namespace) -> str:
    """What to type anywhere: without the folders of this machine."""
    words = ["python -m benchmarks.methods"]
    words += [f"--{name} FOLDER" for name in ("data", "datastore") if getattr(args, name)]
    words += ["--quick"] if args.quick else [f"--size {' '.join(map(str, args.size))}"]
    return " ".join(words)


def _arguments() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with prompts, texts and logs")
    parser.add_argument("--datastore", type=Path, help="index for rest; training texts if unset")
    parser.add_argument("--drafters", nargs="*", help="names; all of the registry without it")
    parser.add_argument(
        "--size", type=int, nargs=3, default=(10, 64, 200), help="prompts, tokens, replayed answers"
    )
    parser.add_argument("--quick", action="store_true", help="2 prompts, 24 tokens, 4 answers")
    parser.add_argument("--json", type=Path, default=here / "methods.json")
    parser.add_argument("--page", type=Path, default=here / "methods.md")
    parser.add_argument(
        "--figures", type=Path, default=here.parent / "docs" / "concepts" / "figures"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
