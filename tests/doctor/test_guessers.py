"""Guesses along a text are what slow references draft behind each of its positions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from outrider.doctor.evidence import look, run_through, slots_for
from outrider.doctor.guessers import Guesser, ModelGuesser, guesser_of
from outrider.doctor.subject import shown
from outrider.doctor.texts import Text
from outrider.errors import ConfigError
from outrider.models.decoder import Decoder
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Head
from outrider.testing import tiny_decoder
from tests.models.heads.block_reference import ReferenceBlock
from tests.models.heads.heads_for_tests import eagle1, eagle3, peagle, target_decoder
from tests.models.heads.kv_heads import Prefilled, Twin, random_head
from tests.models.heads.layouts import (
    DEEPSEEK_PARTS,
    DSPARK_NAMES,
    MEDUSA_CONFIG,
    TARGET,
    TARGET_CONFIG,
    L,
    V,
    medusa_names,
    mtp_names,
    random_block,
    random_dspark,
    random_medusa,
    random_mtp,
    random_target,
    renamed,
    speculators_block_config,
    write,
)

TEXT = [(7 * i * i + 3 * i) % (V - 1) for i in range(14)]
DEPTHS = 3
NEAR = {"rtol": 1e-4, "atol": 1e-4}


def states(target: Decoder, tokens: list[int]) -> dict[int, Tensor]:
    text = Text(0, tuple(tokens), 1, is_sampled=True)
    (one,) = look(target, [text], range(target.spec.num_layers + 1))
    return dict(one.states)


def guesses(guesser: Guesser, target: Decoder, tokens: list[int]) -> list[Tensor]:
    seen = states(target, tokens) if guesser.boundaries else {}
    found = guesser.guess(tokens, seen, DEPTHS)
    assert [len(logits) for logits in found] == [len(tokens) - 1 - d for d in range(DEPTHS)]
    return found


def block_head(folder: Path, finish: str = "") -> Head:
    body = random_block()
    if finish:
        body |= random_dspark(kind=finish)
    config = speculators_block_config("dspark" if finish else "dflash")
    return load_head(write(folder, config, renamed(body, *DSPARK_NAMES)), TARGET)


@pytest.mark.parametrize("is_from_anchor", [False, True])
@pytest.mark.parametrize("finish", ["", "vanilla", "gated", "rnn"])
def test_blocks(finish: str, is_from_anchor: bool, tmp_path: Path) -> None:
    """DSpark's finish is told the text's own token before each slot."""
    target, head = target_decoder(), block_head(tmp_path, finish)
    chosen = replace(head.spec.conventions, sample_from_anchor=is_from_anchor)
    head = head._replace(spec=replace(head.spec, conventions=chosen))
    found = guesses(guesser_of(head, target), target, TEXT)
    reference = ReferenceBlock(head, target)
    for t in (0, 3, 9):
        for depth in range(DEPTHS):
            path = TEXT[t + 2 : t + 2 + depth]
            wanted_V = reference.logits(TEXT[: t + 2], path)
            torch.testing.assert_close(found[depth][t], wanted_V, **NEAR)


@pytest.mark.parametrize("sees_drafts", [True, False])
def test_kv_heads(sees_drafts: bool) -> None:
    target = tiny_decoder(3)
    head = random_head(target, sees_drafts=sees_drafts)
    text = [token + 30 for token in TEXT]
    found = guesses(guesser_of(head, target), target, text)
    for t in (0, 4, 9):
        twin = Twin(head, target, Prefilled(target, text[: t + 1]))
        wanted = twin.path(text[t + 1 : t + 1 + DEPTHS])
        for depth in range(DEPTHS):
            torch.testing.assert_close(found[depth][t], wanted[depth], **NEAR)


def test_medusa(tmp_path: Path) -> None:
    target, tensors = target_decoder(), random_medusa()
    folder = write(tmp_path, MEDUSA_CONFIG, medusa_names(tensors), "medusa_lm_head.safetensors")
    guesser = guesser_of(load_head(folder, TARGET), target)
    assert guesser.max_depth == 3
    found = guesses(guesser, target, TEXT)
    f_TH = target.final_norm(states(target, TEXT)[L])
    for i in range(DEPTHS):
        block_TH = f_TH @ tensors[f"heads.{i}.blocks.0.weight"].T
        x_TH = torch.nn.functional.silu(block_TH + tensors[f"heads.{i}.blocks.0.bias"]) + f_TH
        wanted_TV = x_TH @ tensors[f"heads.{i}.lm_head.weight"].T
        torch.testing.assert_close(found[i], wanted_TV[: len(found[i])], **NEAR)


def test_a_draft_model() -> None:
    """At depth d it has read the text that far; a vocabulary of another width is cut or padded."""
    network = tiny_decoder(1)
    for vocab_size in (256, 250, 260):
        found = guesses(ModelGuesser(network, vocab_size), network, TEXT)
        for depth in range(DEPTHS):
            for t in (0, 5):
                wanted_V = last_logits(network, TEXT[: t + 2 + depth])[:vocab_size]
                torch.testing.assert_close(found[depth][t, :256][: len(wanted_V)], wanted_V, **NEAR)
                assert found[depth].shape[1] == vocab_size
                assert found[depth][t, 256:].isinf().all()


def test_a_draft_model_that_drafts_in_parallel() -> None:
    network = tiny_decoder(1, pard_token=2)
    found = guesses(ModelGuesser(network, 256), network, TEXT)
    for depth in range(DEPTHS):
        for t in (0, 5):
            wanted_V = last_logits(network, TEXT[: t + 2] + [2] * depth)
            torch.testing.assert_close(found[depth][t], wanted_V, **NEAR)


HEADS = {
    "eagle": eagle1,
    "eagle3": eagle3,
    "peagle": peagle,
    "block": block_head,
    "mtp": lambda folder: mtp(folder, 1),
    "two mtp modules": lambda folder: mtp(folder, 2),
}
IN_PARALLEL = ("peagle", "block")


def mtp(folder: Path, num_modules: int) -> Head:
    made = random_mtp(num_modules=num_modules, own_vocabulary=True)
    names = mtp_names(made, "model.layers.{}.", DEEPSEEK_PARTS, first=L)
    config = {**TARGET_CONFIG, "num_nextn_predict_layers": num_modules}
    write(folder, config, random_target() | names)
    return load_head(folder, replace(TARGET, folder=folder))


@pytest.mark.parametrize("name", HEADS)
def test_a_guess_sees_all_before_its_token_and_nothing_else(name: str, tmp_path: Path) -> None:
    """Row t at depth d has read tokens up to t + 1 + d; t + 1, if all depths come at once."""
    target = target_decoder()
    guesser = guesser_of(HEADS[name](tmp_path), target)
    before = guesses(guesser, target, TEXT)
    changed = 7
    after = guesses(guesser, target, [*TEXT[:changed], TEXT[changed] + 1, *TEXT[changed + 1 :]])
    for depth in range(DEPTHS):
        last = changed - 2 if name in IN_PARALLEL else changed - 2 - depth
        same_N = (before[depth] == after[depth]).all(-1)
        close_N = ((before[depth] - after[depth]).nan_to_num(0.0).abs() < 1e-5).all(-1)
        assert close_N[: last + 1].all()
        assert not same_N[last + 1]


def test_a_target_that_shows_no_states_is_refused() -> None:
    target = tiny_decoder()
    target.spec = replace(target.spec, hidden_size=0)
    with pytest.raises(ConfigError, match="hands out no hidden states"):
        shown(target)


def last_logits(network: Decoder, tokens: list[int]) -> Tensor:
    pool = slots_for(network, len(tokens))
    return run_through(network, tokens, [len(tokens) - 1], pool.layers)[0][0]
