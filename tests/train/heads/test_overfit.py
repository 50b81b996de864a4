"""One text learned by heart is drafted as serving would draft it; labels off by one are not.

What is trained is judged by others: the reference that recomputes everything, and the network that
serves, on what was exported. A mistake that training and its own evaluation share cannot hide.
"""

import pytest
import torch

from outrider.models.heads.load import load_head
from outrider.train.heads.acceptance import score
from outrider.train.heads.eagle3 import Eagle3
from outrider.train.heads.kinds import find_kind
from outrider.train.heads.losses import kl
from outrider.train.heads.objective import Objective
from outrider.train.heads.pieces import Packed, PieceBatches
from outrider.train.heads.trainer import HeadTrainer, LoopConfig
from tests.models.heads.reference import ReferenceEagle3
from tests.train.heads.conftest import law, piece, settings, written

DEPTHS = 3
NUM_TOKENS = 32
RATE = 1e-2


@pytest.fixture(scope="module")
def text(teacher):
    return piece(written(teacher, NUM_TOKENS, greedy=False))


def trained(teacher, text, kind="eagle3", num_steps=300, student_class=None):
    student = (student_class or find_kind(kind)).fresh(teacher, settings(kind, depths=DEPTHS), None)
    config = LoopConfig(num_steps=num_steps, rate=RATE, steps_per_evaluation=1000)
    batches = PieceBatches([text], tokens_per_step=NUM_TOKENS, seed=0)
    HeadTrainer(student, teacher, Objective(teacher, kl), batches, config).run()
    return student


@pytest.fixture(scope="module")
def eagle3(teacher, text):
    return trained(teacher, text)


def check_scores(student, teacher, text):
    scores = score(student, teacher, [text], DEPTHS)
    assert min(scores.rates().conditional) >= 0.95
    assert scores.rates(greedy=True).joint[-1] >= 0.95


def test_one_text_is_drafted_almost_always(teacher, text, eagle3):
    check_scores(eagle3, teacher, text)


@pytest.mark.parametrize("kind", ["medusa", "draft_model"])
def test_other_kinds_learn_it_too(teacher, text, kind):
    check_scores(trained(teacher, text, kind), teacher, text)


@pytest.fixture(scope="module")
def served_share(teacher, text, tmp_path_factory):
    """Share of positions from which the exported head drafts the target's likeliest tokens."""

    def measure(student):
        folder = tmp_path_factory.mktemp("head")
        student.write(folder, "speculators", {}, torch.float32)
        reference = ReferenceEagle3(load_head(folder, teacher.target), teacher.embed(every))
        features = teacher.teach(Packed([text]), student.boundaries).feature(student.boundaries)
        tokens = torch.tensor(text.text.tokens)
        stood = [
            drafted(reference, features[: row + 1], tokens[1 : row + 2])
            == wanted(teacher, text.text.tokens[: row + 2])
            for row in range(4, NUM_TOKENS - 2)
        ]
        return sum(stood) / len(stood)

    every = torch.arange(teacher.target.vocab_size)
    return measure


def drafted(reference, features, tokens):
    """Its first token, by the definition of serving."""
    (logits,) = reference.draft(features, tokens, 1)
    return int(logits.argmax())


def wanted(teacher, tokens):
    return int(law(teacher, tokens)[-1].argmax())


@torch.no_grad()
def drafts_agree(student, served_share):
    return served_share(student)


def test_served_as_defined_it_is_right(eagle3, served_share):
    assert drafts_agree(eagle3, served_share) >= 0.95


@pytest.mark.parametrize("lead", [0, 2])
def test_labels_off_by_one_are_caught(teacher, text, served_share, lead):
    """Such a head learns, and scores well by its own measure: only serving shows it."""

    class Shifted(Eagle3):
        pass

    Shifted.lead = lead
    student = trained(teacher, text, num_steps=200, student_class=Shifted)
    assert score(student, teacher, [text], DEPTHS).rates().conditional[0] >= 0.95
    assert drafts_agree(student, served_share) <= 0.3
