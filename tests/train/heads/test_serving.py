"""The engine accepts of a trained draft what its teacher-forced scores say, and says the same."""

import pytest

from outrider import LLM, SamplingParams
from outrider.train.heads.acceptance import HEAD, score
from outrider.train.heads.kinds import load_student
from outrider.train.heads.serving import measure_served
from outrider.train.heads.session import train_draft
from outrider.train.heads.teacher import Teacher
from tests.train.heads.checkpoint import small_run, write_chats, write_target
from tests.train.heads.conftest import piece

K = 3
NUM_TOKENS = 32
SMALL_WEIGHTS = 0.1


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Small weights: what it says depends on few tokens, which a head learns in a few steps."""
    return write_target(tmp_path_factory.mktemp("target"), initializer_range=SMALL_WEIGHTS)


def walked(target, folder, prompts):
    """Accepted tokens of every step, by scores on the target's own greedy answers."""
    llm = LLM(str(target), draft_model="off", device="cpu")
    sampling = SamplingParams(max_tokens=NUM_TOKENS)
    teacher = Teacher.load(str(target))
    student = load_student(folder, teacher)
    steps = []
    for output in llm.generate(prompts, sampling, "off"):
        tokens = output.prompt_token_ids + output.token_ids
        greedy_MK = score(student, teacher, [piece(tokens)], K).marks[HEAD].greedy_MK
        root = len(output.prompt_token_ids)  # the step that reads the prompt has no draft
        while (row := root - student.lead) < len(greedy_MK):
            steps.append(int(greedy_MK[row].cumprod(0).sum()))
            root += steps[-1] + 1
    return steps


@pytest.mark.parametrize("kind", ["eagle3", "medusa", "kv", "draft_model"])
def test_the_engine_accepts_what_was_scored(target, tmp_path, kind):
    chats = write_chats(tmp_path / "chats.jsonl")
    settings = small_run(
        target,
        chats,
        tmp_path / "out",
        kind=kind,
        depths=None if kind == "draft_model" else K,
        steps=40,
        rate=1e-2,
        on_policy=True,
        temperature=0.0,
        answer_tokens=NUM_TOKENS,
        window=120,
        patience=0,
        tokens_per_step=512,
    )
    folder = train_draft(settings).folder
    prompts = [[{"role": "user", "content": f"the {word}"}] for word in ("jumps 0", "over 1")]
    prompts += [[{"role": "user", "content": f"the {word}"}] for word in ("lazy 2", "dogs 3")]
    served = measure_served(
        str(target), folder, prompts, num_draft_tokens=K, max_tokens=NUM_TOKENS, device="cpu"
    )
    assert served.same_share == 1.0
    assert list(served.joint) == sorted(served.joint, reverse=True)
    steps = walked(target, folder, prompts)
    length = 1.0 + sum(steps) / len(steps)
    assert length > 1.2, "there is something to compare"
    # The last steps of an answer have no room for a whole draft, and are not scored.
    assert served.acceptance_length == pytest.approx(length, abs=0.1)
