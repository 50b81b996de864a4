"""The promise for quantised targets: the same tokens however the engine is pressed."""

import pytest

from outrider.quant.schemes import SCHEMES
from outrider.testing import run, tiny_decoder, tiny_engine
from tests.e2e.test_identity import GREEDY, OFF, SHAPED, SPECULATIONS, requests

PRESSED = {
    "max_num_batched_tokens": 24,
    "max_num_seqs": 5,
    "max_model_len": 100,
    "long_prefill_token_threshold": 7,
}


@pytest.mark.parametrize("kind", ["greedy", "shaped"])
@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "off"])
def test_same_tokens_side_by_side_alone_and_pressed(name, kind):
    sampling = {"greedy": GREEDY, "shaped": SHAPED}[kind]
    target = tiny_decoder(quantization=name)
    asked = requests(sampling, OFF, 8)
    expected = run(tiny_engine(target=target), asked)
    assert expected != run(tiny_engine(), asked), "it is another model than the stored one"
    assert run(tiny_engine(target=target), asked[2:3])["r2", 0] == expected["r2", 0]
    for speculation in ("ngram tree", "draft model"):
        drafted = requests(sampling, SPECULATIONS[speculation], 8)
        engine = tiny_engine(target=target, num_blocks=40, draft_noise=0.01, options=PRESSED)
        assert run(engine, drafted) == expected
        assert engine.stats.num_preemptions > 0, "the test must press hard enough to preempt"
