"""Both networks on the two small trained models that stand beside the project.

The cases are those of the random models: prefill, chunks, ragged decode, trees, compaction.
"""

import itertools
from pathlib import Path

import pytest
import torch
import transformers

from outrider.models.base import Network
from outrider.models.network import load_network
from outrider.ops.base import Span
from outrider.tokenizer import load_tokenizer
from tests.kernels import make_ops
from tests.models import test_adapter, test_decoder
from tests.models.tiny import Passes, difference

CHECKPOINTS = ("stories260K", "chars940K")
NETWORKS = ("lean", "adapter")
STORY = ", there was a little girl named Lily. She loved to play outside in the park."


class Case(test_adapter.Case):
    """A trained model under the names by which either file of cases asks for it."""

    @property
    def decoder(self) -> Network:
        return self.adapter


def checkpoint(shared_data: Path, name: str) -> Path:
    folder = shared_data / "weights" / name
    if not folder.is_dir():
        pytest.skip(f"no checkpoint at {folder}")
    return folder


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, shared_data: Path) -> Path:
    return checkpoint(shared_data, request.param)


@pytest.fixture(scope="module", params=itertools.product(NETWORKS, ("torch", "cpu")), ids="-".join)
def case(request: pytest.FixtureRequest, folder: Path) -> Case:
    kind, kernels = request.param
    network = load_network(str(folder), ops=make_ops(kernels), network=kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return Case(network, model.eval())


test_prefill = test_decoder.test_prefill
test_chunked_prefill = test_decoder.test_chunked_prefill
test_batched_decode = test_decoder.test_batched_decode
test_tree_verify = test_decoder.test_tree_verify
test_decode_after_compaction = test_decoder.test_decode_after_compaction
test_chunks_of_two_sequences = test_adapter.test_chunked_prefill_of_two_sequences
test_decode_of_different_lengths = test_adapter.test_batched_decode_of_different_lengths
test_trees_of_two_sequences_and_compaction = test_adapter.test_tree_verify_and_compaction


def test_prefill_of_text(case: Case, folder: Path) -> None:
    prompt = load_tokenizer(folder).encode("Once upon a time, there was a little girl")
    (ours,) = Passes(case.decoder)((Span(list(range(len(prompt))), 0, len(prompt)), prompt))
    assert difference(ours, case.expected(prompt)) < test_decoder.TOLERANCE


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize("network", NETWORKS)
def test_greedy_story(network: str, kernels: str, shared_data: Path) -> None:
    folder = checkpoint(shared_data, "stories260K")
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode("Once upon a time")
    run = Passes(load_network(str(folder), ops=make_ops(kernels), network=network))
    tokens, num_cached = list(prompt), 0
    for _ in range(30):
        span = Span(list(range(len(tokens))), num_cached, len(tokens) - num_cached)
        (logits_NV,) = run((span, tokens[num_cached:]))
        num_cached = len(tokens)
        tokens.append(int(torch.argmax(logits_NV[-1])))
    assert tokenizer.decode(tokens).removeprefix("Once upon a time").startswith(STORY)
