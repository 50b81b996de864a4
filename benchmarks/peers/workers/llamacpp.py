"""Worker: llama.cpp, its C interface called from Python, many sequences in one batch.

The Python package's own `Llama` serves one sequence at a time, so continuous batching and greedy
speculation are done here as llama.cpp's server does them: one `llama_decode` for all rows of all
sequences, and the rejected tail of each sequence is cut from the cache.
"""

import ctypes
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from benchmarks.peers.protocol import Generate, options, serve

N_BATCH = 2048
CONTEXT = 512  # cells of a sequence: the comparison's prompts and answers are far shorter

Draft = Callable[[list[int], list[list[int]], int], list[list[int]]]


class Context:
    """A model with its cache; `rows` runs tokens of several sequences in one pass."""

    def __init__(self, path: str, asked: dict[str, Any]) -> None:
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = asked["max_num_seqs"]
        params.n_ctx = CONTEXT * asked["max_num_seqs"]
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = asked["threads"]
        params.kv_unified = True  # rows of unequal number then still go in one pass
        if asked["precision"] == "f32":  # else the default, f16
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def cut(self, sequence: int, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def rows(self, work: list[tuple[int, int, list[int]]], *, is_last_only: bool) -> np.ndarray:
        """The most likely next token after each row, or after the last row of each sequence.

        Args:
            work: sequence, position of its first row, and tokens.
        """
        batch, at = self._batch, 0
        for sequence, position, tokens in work:
            for offset, token in enumerate(tokens):
                batch.token[at] = token
                batch.pos[at] = position + offset
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                batch.logits[at] = not is_last_only or offset == len(tokens) - 1
                at += 1
        batch.n_tokens = at
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode gave {status}"
        num_out = len(work) if is_last_only else at
        logits = llama_cpp.llama_get_logits(self._context)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (num_out, self._vocab_size)).argmax(axis=1)


class ModelDrafter:
    """Greedy drafts of all sequences together; remembers what each sequence's cache holds."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._context = Context(asked["draft"], asked)
        self._held: dict[int, int] = {}

    def start(self) -> None:
        self._context.clear()
        self._held = {}

    def __call__(self, running: list[int], texts: list[list[int]], k: int) -> list[list[int]]:
        work = []
        for i in running:
            held = min(self._held.get(i, 0), len(texts[i]) - 1)
            self._context.cut(i, held)
            work.append((i, held, texts[i][held:]))
        drafts: list[list[int]] = [[] for _ in running]
        for step in range(k):
            found = self._context.rows(work, is_last_only=True).tolist()
            for draft, token in zip(drafts, found, strict=True):
                draft.append(token)
            work = [
                (i, len(texts[i]) + step, [token]) for i, token in zip(running, found, strict=True)
            ]
        for i in running:
            self._held[i] = len(texts[i]) + k - 1
        return drafts


class LookupDrafter:
    """llama-cpp-python's own prompt lookup, a sequence at a time."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._lookup = LlamaPromptLookupDecoding(asked["lookup_max"], asked["num_draft_tokens"])

    def start(self) -> None:
        pass

    def __call__(self, running: list[int], texts: list[list[int]], k: int) -> list[list[int]]:
        return [self._lookup(np.array(texts[i], dtype=np.intc))[:k].tolist() for i in running]


class NoDrafter:
    def start(self) -> None:
        pass

    def __call__(self, running: list[int], texts: list[list[int]], k: int) -> list[list[int]]:
        return [[] for _ in running]


DRAFTERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "off": lambda asked: NoDrafter(),
    "draft_model": ModelDrafter,
    "ngram": LookupDrafter,
}


def load() -> tuple[Generate, dict[str, str]]:
    asked = options()
    llama_cpp.llama_backend_init()
    target = Context(asked["target"], asked)
    drafter = DRAFTERS[asked["method"]](asked)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        target.clear()
        drafter.start()
        work = [(i, 0, ids) for i, ids in enumerate(prompts)]
        first = target.rows(work, is_last_only=True).tolist()
        texts = [[*ids, token] for ids, token in zip(prompts, first, strict=True)]
        ends = [len(ids) + num_tokens for ids in prompts]
        while running := [i for i, text in enumerate(texts) if len(text) < ends[i]]:
            drafts = drafter(running, texts, asked["num_draft_tokens"])
            _verify(target, running, texts, drafts)
        return [text[len(ids) : end] for text, ids, end in zip(texts, prompts, ends, strict=True)]

    info = llama_cpp.llama_print_system_info().decode()
    return generate, {"llama-cpp-python": version("llama-cpp-python"), "built for": info.strip()}


def _verify(
    target: Context, running: list[int], texts: list[list[int]], drafts: list[list[int]]
) -> None:
    """One pass over the last token and the draft of each sequence; appends what stands."""
    work = [
        (i, len(texts[i]) - 1, [texts[i][-1], *draft])
        for i, draft in zip(running, drafts, strict=True)
    ]
    best = target.rows(work, is_last_only=False).tolist()
    at = 0
    for i, draft in zip(running, drafts, strict=True):
        found = best[at : at + len(draft) + 1]
        at += len(found)
        pairs = enumerate(zip(draft, found, strict=False))
        accepted = next((n for n, (guess, token) in pairs if guess != token), len(draft))
        texts[i] += found[: accepted + 1]
        if accepted < len(draft):
            target.cut(i, len(texts[i]) - 1)


if __name__ == "__main__":
    serve(load)
