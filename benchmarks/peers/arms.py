"""The contenders: a peer, a precision, and how it speculates."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.models import MODELS, PEERS

BASELINE = "outrider plain"
METHODS = {"off": "plain", "draft_model": "draft", "ngram": "lookup"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One worker.

    Attributes:
        name: as in the table.
        peer: names the worker's module, and its environment.
        is_fp32: its tokens must be those of the baseline.
        options: what the worker is told.
        max_concurrency: it is left out above.
        env: of the worker process.
    """

    name: str
    peer: str
    is_fp32: bool
    options: dict[str, Any]
    max_concurrency: int
    env: dict[str, str] = field(default_factory=dict)

    def python(self, own: str) -> Path:
        return Path(own) if self.peer == "outrider" else PEERS / "env" / self.peer / "bin/python"

    @property
    def module(self) -> str:
        return f"benchmarks.peers.workers.{self.peer}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms share.

    Attributes:
        k, lookup_k: drafted tokens a step, of a draft model and of prompt lookup.
        llm: further keyword arguments of Outrider's `LLM`, a list of sets: an arm for each.
    """

    threads: int
    max_num_seqs: int
    k: int
    lookup_k: int
    llm: tuple[dict[str, Any], ...] = ({},)

    def of(self, method: str, target: Path, draft: Path) -> dict[str, Any]:
        return {
            "target": str(target),
            "draft": str(draft),
            "method": method,
            "num_draft_tokens": self.lookup_k if method == "ngram" else self.k,
            "lookup_min": 2,
            "lookup_max": 4,
            "threads": self.threads,
            "max_num_seqs": self.max_num_seqs,
        }


def all_arms(setting: Setting) -> list[Arm]:
    return [*_outrider(setting), *_transformers(setting), *_llamacpp(setting), *_openvino(setting),
            *_vllm(setting)]  # fmt: skip


def _outrider(setting: Setting) -> Iterator[Arm]:
    for llm in setting.llm:
        label = "".join(f" {value}" for value in llm.values())
        for method, name in METHODS.items():
            options = setting.of(method, MODELS / "target", MODELS / "draft")
            yield Arm(
                name=f"outrider{label} {name}",
                peer="outrider",
                is_fp32="quantization" not in llm,
                options={**options, "llm": llm},
                max_concurrency=setting.max_num_seqs,
            )


def _transformers(setting: Setting) -> Iterator[Arm]:
    """Speculation there knows batch 1 only."""
    for method, name in METHODS.items():
        yield Arm(
            name=f"transformers {name}",
            peer="transformers",
            is_fp32=True,
            options=setting.of(method, MODELS / "target", MODELS / "draft"),
            max_concurrency=setting.max_num_seqs if method == "off" else 1,
        )


def _llamacpp(setting: Setting) -> Iterator[Arm]:
    for kind in ("f32", "q8_0"):
        target, draft = (MODELS / f"{model}-{kind}.gguf" for model in ("target", "draft"))
        for method, name in METHODS.items():
            yield Arm(
                name=f"llama.cpp {kind} {name}",
                peer="llamacpp",
                is_fp32=kind == "f32",
                options={**setting.of(method, target, draft), "precision": kind},
                max_concurrency=setting.max_num_seqs,
            )


def _openvino(setting: Setting) -> Iterator[Arm]:
    for kind in ("fp32", "int8"):
        target, draft = (MODELS / f"{model}-openvino-{kind}" for model in ("target", "draft"))
        for method, name in METHODS.items():
            yield Arm(
                name=f"OpenVINO {kind} {name}",
                peer="openvino",
                is_fp32=kind == "fp32",
                options={**setting.of(method, target, draft), "precision": kind},
                max_concurrency=setting.max_num_seqs,
            )


def _vllm(setting: Setting) -> Iterator[Arm]:
    """With the allocator and the OpenMP that its manual asks to be loaded first.

    In one process, threads unbound: on two cores its default binds one core for the model and
    keeps one for the engine's own processes, which is slower.
    """
    home = (PEERS / "env/vllm").absolute()
    preload = [*home.glob("tcmalloc/**/libtcmalloc_minimal.so.4"), *home.glob("lib/libiomp5.so")]
    for method, name in METHODS.items():
        yield Arm(
            name=f"vLLM {name}",
            peer="vllm",
            is_fp32=True,
            options=setting.of(method, MODELS / "target", MODELS / "draft"),
            max_concurrency=setting.max_num_seqs,
            env={
                "LD_PRELOAD": ":".join(map(str, preload)),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            },
        )
