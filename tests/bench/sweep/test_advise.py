"""One clear answer: yes, no or not decided, from cells whose truth is known."""

import json
from dataclasses import replace

import pytest

from outrider.bench.calibration.prediction import Predicted, Residual
from outrider.bench.sweep.advise import advise, candidates, measured_pairs, table
from outrider.bench.sweep.grid import Cell, SweepPlan
from outrider.bench.sweep.run import Sweep
from outrider.bench.target import Arm
from outrider.request import SpeculationParams
from tests.bench.simulated import Simulated, questions


def found(gains, *, engine="", method="ngram", concurrencies=(1, 4), num_questions=16, noise=0.0):
    """Candidates of an engine on which `gains[K, concurrency]` is the speed-up; adaptive gets 1."""
    loads = {}

    def seconds(arm: str, question: str, number: int) -> float:
        if arm == "off" or arm.endswith("adaptive"):
            gain = 1.0
        else:
            gain = gains[int(arm.rpartition("=")[2]), loads["now"]]
            gain *= 1.0 + noise * (-1) ** int(question[1:])
        return 0.01 / gain

    class Known(Simulated):
        def run(self, asks, *, concurrency, tick=lambda reply: None):
            loads["now"] = concurrency
            return super().run(asks, concurrency=concurrency, tick=tick)

    target = Known(seconds)
    plan = SweepPlan(
        arms=(Arm(name=method, speculation=SpeculationParams(method=method)),),
        questions=questions(num_questions),
        depths=tuple(sorted({k for k, _ in gains})),
        concurrencies=concurrencies,
        budget_s=1000.0,
    )
    return candidates(engine, Sweep(target, plan, clock=target.clock).run())


def test_yes_with_k_and_where_it_stops() -> None:
    told = advise(found({(2, 1): 1.5, (4, 1): 2.0, (2, 4): 1.1, (4, 4): 0.8}))
    assert (told.pays, told.candidate.method, told.cell.variant.k) == ("yes", "ngram", 4)
    assert told.up_to == 4
    assert told.settings == {"method": "ngram", "num_speculative_tokens": 4, "policy": "adaptive"}
    assert told.answer.startswith("Yes: ngram with K=4 is 2.00 times as fast")
    assert "every load that was measured, up to 4 requests" in told.answer


def test_one_k_that_is_best_everywhere_is_asked_for_as_it_is() -> None:
    told = advise(found({(4, 1): 2.0, (4, 4): 1.5}))
    assert told.settings == {"method": "ngram", "num_speculative_tokens": 4}


def test_it_says_where_the_gain_ends() -> None:
    told = advise(found({(4, 1): 1.6, (4, 4): 0.625}))
    assert told.pays == "yes"
    assert told.up_to == 1
    assert told.break_even == pytest.approx(2.0, rel=0.02)
    assert "stops paying at about 2 requests" in told.answer
    assert told.settings["policy"] == "adaptive"


def test_no_where_every_load_loses() -> None:
    told = advise(found({(1, 1): 0.9, (4, 1): 0.7, (1, 4): 0.8, (4, 4): 0.5}))
    assert told.pays == "no"
    assert told.settings == {"method": "off"}
    assert told.answer.startswith("No: the best that was found, ngram with K=1 is 0.90")


def test_not_decided_where_prompts_disagree() -> None:
    told = advise(found({(2, 1): 1.05}, concurrencies=(1,), noise=0.4))
    assert told.pays == "open"
    assert told.up_to is None
    assert "--budget" in told.answer


def test_not_decided_on_few_prompts_and_says_so() -> None:
    told = advise(found({(2, 1): 2.0}, concurrencies=(1,), num_questions=4))
    assert told.pays == "open"
    assert "Only 4 blocks" in told.answer


def test_the_draft_model_that_gains_most_over_all_loads_is_chosen() -> None:
    small = found({(4, 1): 1.9, (4, 4): 0.9}, engine="small", method="draft_model")
    large = found({(4, 1): 1.6, (4, 4): 1.5}, engine="large", method="draft_model")
    told = advise([*small, *large])
    assert told.candidate.engine == "large"
    assert "draft_model (large)" in told.answer
    assert told.to_json()["draft_model"] == "large"


def test_what_goes_into_the_result_is_json() -> None:
    all_of = found({(2, 1): 1.5, (4, 1): 2.0, (2, 4): 1.1, (4, 4): 0.8})
    told = {**advise(all_of).to_json(), "table": table(all_of), "pairs": measured_pairs(all_of)}
    json.dumps(told)
    assert [row["num_draft_tokens"] for row in told["table"]] == [4, 2]
    assert [row["adaptive_ratio"] for row in told["table"]] == pytest.approx([1.0, 1.0], rel=0.01)
    assert [pair["arm"] for pair in told["pairs"]] == [
        "ngram: K=4, 1 at once",
        "ngram: K=2, 4 at once",
        "ngram: the adaptive policy, 1 at once",
        "ngram: the adaptive policy, 4 at once",
    ]


def test_predictions_that_stand_alone_come_with_what_others_were_off_by() -> None:
    (measured,) = found({(4, 1): 2.0}, concurrencies=(1,))
    guess = Predicted(2.5, 1.0, 1.0, (0.0, 0.0, 0.0, 0.0), 1.0)
    cells = tuple(
        replace(cell, predicted=guess, residual=Residual(-0.2, "draft", {}))
        for cell in measured.cells
        if not cell.variant.is_adaptive
    )
    alone = replace(
        measured,
        method="suffix",
        cells=(Cell(place=cells[0].place, variant=cells[0].variant, predicted=guess),),
    )
    both = advise([replace(measured, cells=cells), alone])
    assert "may be off, as predictions were by 25 % here" in both.answer
    assert "predictions" not in advise([replace(measured, cells=cells)]).answer


def test_nothing_measured_is_no_answer() -> None:
    with pytest.raises(ValueError, match="larger budget"):
        advise([])
