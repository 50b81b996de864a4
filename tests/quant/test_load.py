"""A quantised model is a model: it loads by every way, speculates exactly, and says what it is."""

import json

import pytest
import torch
import transformers

from outrider import LLM, SamplingParams, SpeculationParams
from outrider.engine.build import LoadConfig, build
from outrider.errors import ConfigError, ModelError
from outrider.models.loader import load_decoder
from outrider.models.network import load_network
from outrider.ops.base import Int4Weight, Int8Weight, Span
from outrider.ops.quantized import dequantized
from outrider.ops.torch import TorchOps
from outrider.quant.schemes import SCHEMES, find_scheme
from tests.engine.tiny_checkpoint import write_checkpoint
from tests.models.test_adapter import CASES, Pool, Row, load_tiny, save_tiny, tokens_of
from tests.models.tiny import BASE, Passes, difference, write_tiny

QUANTIZED = [name for name in SCHEMES if name != "off"]
NETWORKS = ("lean", "adapter")
PROMPTS = ["def main(argv):", "the quick brown", "# fox return"]
TOKENS = list(range(4, 30))
SHARP = {"initializer_range": 0.2, "tie_word_embeddings": False}


class NotingOps(TorchOps):
    """Remembers which weights it was given."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def linear(self, weight, bias_O=None):
        self.weights.append(weight)
        return super().linear(weight, bias_O)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("target"), **SHARP))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft")
    return str(write_checkpoint(folder, num_hidden_layers=1, **SHARP))


def logits_of(network):
    return Passes(network)((Span(range(len(TOKENS)), 0, len(TOKENS)), TOKENS))[0]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_speculation_changes_no_token(target, draft, name, network):
    llm = LLM(target, draft_model=draft, quantization=name, network=network)
    assert llm.engine.runner.network.ops.is_batch_invariant
    for temperature in (0.0, 0.9):
        sampling = SamplingParams(max_tokens=20, temperature=temperature, seed=5, ignore_eos=True)
        plain = [output.token_ids for output in llm.generate(PROMPTS, sampling, "off")]
        for speculation in (
            SpeculationParams(method="draft_model", num_draft_tokens=3),
            SpeculationParams(method="ngram", num_draft_tokens=4, prompt_lookup_min=1),
        ):
            drafted = llm.generate(PROMPTS, sampling, speculation)
            assert [output.token_ids for output in drafted] == plain
            assert sum(output.metrics.num_draft_tokens for output in drafted) > 0
        alone = [llm.generate(prompt, sampling, "off")[0].token_ids for prompt in PROMPTS]
        assert alone == plain


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_product_of_the_layers_is_quantised(target, name, network):
    ops = NotingOps()
    load_network(target, ops=ops, network=network, quantization=name)
    kinds = [type(weight) for weight in ops.weights if not isinstance(weight, torch.Tensor)]
    num_layer_products = {"lean": 4, "adapter": 7}[network] * 2
    inner = Int4Weight if name == "int4" else Int8Weight
    assert kinds == [inner] * num_layer_products + [Int8Weight]
    if network == "lean":
        assert len(kinds) == len(ops.weights), "no float copy is made on the way"


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_decoder_is_that_of_the_dequantised_weights(tmp_path, name, is_tied):
    """transformers, given what the integers stand for, agrees as far as inputs are kept."""
    model = write_tiny(tmp_path, **{**BASE, "tie_word_embeddings": is_tied})
    ours = logits_of(load_decoder(tmp_path, ops=TorchOps(), quantization=name))
    scheme = find_scheme(name)
    with torch.no_grad():
        head = dequantized(scheme.head(model.lm_head.weight.clone()))
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(dequantized(scheme.layer(module.weight)))
        hidden = model.model(torch.tensor([TOKENS]), use_cache=False).last_hidden_state[0]
        theirs = hidden @ head.t()
    limit = {"int8-weight-only": 1e-5, "int8-dynamic": 0.1}.get(name, 5e-3)
    assert difference(ours, theirs) < limit


@pytest.mark.parametrize("is_tied", [True, False])
def test_lookups_norms_and_biases_stay_as_stored(tmp_path, is_tied):
    """A head of its own aside, two models of the same integers differ in nothing else."""
    write_tiny(tmp_path, "Qwen2Config", **{**BASE, "tie_word_embeddings": is_tied})
    decoder = load_decoder(tmp_path, ops=TorchOps(), quantization="int4")
    stored = load_decoder(tmp_path, ops=TorchOps())
    assert torch.equal(decoder._embedding_VD, stored._embedding_VD)
    assert decoder.spec.num_parameters == stored.spec.num_parameters


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss", "mixtral", "qwen3-moe", "jetmoe", "gemma3n"])
def test_adapted_models_are_quantised_but_for_their_routers(name, tmp_path):
    folder = save_tiny(*CASES[name], tmp_path)
    tokens = tokens_of(0, 20)
    stored = Pool(load_tiny(folder, TorchOps())).run(Row("a", tokens))["a"]
    ops = NotingOps()
    adapter = load_tiny(folder, ops, scheme=find_scheme("int8"))
    ours = Pool(adapter).run(Row("a", tokens))["a"]
    error_N = (ours - stored).norm(dim=-1) / stored.norm(dim=-1)
    assert 1e-4 < error_N.median() < 0.05
    num_experts = getattr(adapter.model.config, "num_local_experts", None) or 4
    quantised = [weight for weight in ops.weights if not isinstance(weight, torch.Tensor)]
    assert quantised
    assert all(weight.shape[0] != num_experts for weight in quantised if name in MOE)
    routed = [n for n, m in adapter.model.named_modules() if n.endswith((".gate", ".router"))]
    assert bool(routed) == (name in MOE)


MOE = ("gpt-oss", "mixtral", "qwen3-moe", "jetmoe")


def test_adapter_and_lean_decoder_are_the_same_quantised_model(target):
    lean, adapter = (
        logits_of(load_network(target, ops=TorchOps(), network=n, quantization="int8-weight-only"))
        for n in NETWORKS
    )
    assert difference(lean, adapter) < 2e-5


def test_the_draft_model_is_quantised_as_the_target_unless_told(target, draft):
    def fingerprints(**load):
        engine, _ = build(LoadConfig(model=target, draft_model=draft, **load), {})
        return (
            engine.spec.fingerprint,
            engine.drafters["draft_model"].runner.network.spec.fingerprint,
        )

    stored_target, stored_draft = fingerprints()
    target8, draft8 = fingerprints(quantization="int8")
    assert len({stored_target, stored_draft, target8, draft8}) == 4
    assert fingerprints(quantization="int8", draft_quantization="off") == (target8, stored_draft)
    assert fingerprints(draft_quantization="int8") == (stored_target, draft8)
    assert fingerprints(quantization="off") == (stored_target, stored_draft)


def test_a_quantised_draft_model_leaves_the_target_alone(target):
    """The same weights in 4 bits guess for those in full: often right, never decisive."""
    sampling = SamplingParams(max_tokens=24, temperature=0.7, seed=2, ignore_eos=True)
    plain = LLM(target).generate(PROMPTS, sampling, "off")
    llm = LLM(target, draft_model=target, draft_quantization="int4")
    drafted = llm.generate(PROMPTS, sampling)
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    metrics = [output.metrics for output in drafted]
    accepted = sum(m.num_accepted_tokens for m in metrics)
    assert 0 < accepted < sum(m.num_draft_tokens for m in metrics)


@pytest.mark.parametrize("keys", [{"quantization": "int7"}, {"draft_quantization": "int7"}])
def test_an_unknown_scheme_is_refused_before_anything_is_read(keys):
    with pytest.raises(ConfigError, match=r"unknown quantization 'int7'; did you mean"):
        LLM("no/such-model", **keys)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_the_cpu_is_refused(target, network, dtype):
    with pytest.raises(ConfigError, match=f"quantization='int4' with dtype='{dtype}'.*auto"):
        LLM(target, quantization="int4", dtype=dtype, device="cpu", network=network)
    LLM(target, quantization="off", dtype=dtype, device="cpu", network=network)


@pytest.mark.parametrize("network", ["auto", *NETWORKS])
@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"bits": 4},
    ],
    ids=lambda stored: str(stored.get("quant_method")),
)
def test_checkpoints_that_are_stored_quantised_are_refused(tmp_path, stored, network):
    values = transformers.LlamaConfig(**BASE).to_dict() | {"quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(values))
    method = repr(stored.get("quant_method")).replace("'", ".")
    for asked in (None, "int8"):
        with pytest.raises(ModelError, match=f"stored quantised .quant_method={method}.*was made"):
            load_network(str(tmp_path), ops=TorchOps(), network=network, quantization=asked)


@pytest.mark.gpu
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_on_a_gpu(target, name, network):
    here = LLM(target, quantization=name, network=network, device="cpu")
    there = LLM(target, quantization=name, network=network, device="cuda", dtype="float32")
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=1)
    ours, theirs = (llm.generate(PROMPTS[0], sampling)[0].completions[0] for llm in (there, here))
    assert abs(ours.logprobs[0].logprob - theirs.logprobs[0].logprob) < 0.2
