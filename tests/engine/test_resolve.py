"""What a request asks of speculation: defaults, and refusals that name value and remedy."""

import re
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from outrider import registry
from outrider.control.base import Facts
from outrider.control.policies import make_controller
from outrider.draft.drafters import Drafters
from outrider.draft.ngram import NgramDrafter
from outrider.engine import resolve as module
from outrider.engine.resolve import resolve
from outrider.errors import PairError, RequestError
from outrider.request import Option, SamplingParams, Speculation, SpeculationParams
from outrider.step import Kind
from outrider.testing import ScriptedDrafter, junk, tiny_engine
from outrider.verify.sampled import SampledVerifier

GREEDY, HOT = SamplingParams(), SamplingParams(temperature=1.0)


class Drawing(ScriptedDrafter):
    """A drafter that can sample, chains only."""

    sample_methods = ("greedy", "probabilistic", "independent", "coupled")
    max_width = 1
    default_draft_tokens = 6


class DraftModel(Drawing):
    """As `Drawing`, with a model of its own."""

    needs = ("draft model",)


class Wayward(Drawing):
    """A drafter that draws under one of its options only, and then looks n-grams up."""

    options: ClassVar = {"by": Option("text", "which way", choices=("text", "ids"))}

    def sample_methods_for(self, options):
        return self.sample_methods if options["by"] == "ids" else ("greedy",)

    def looks_up(self, options):
        return options["by"] == "ids"


class NarrowDrawing(Drawing):
    """As `Drawing`, with branches."""

    max_width = 2
    options: ClassVar = {
        "depth": Option(3, "how deep", 1, 5),
        "way": Option("left", "which way", choices=("left", "right")),
        "share": Option(0.5, "how much", 0.0, 1.0),
    }


class AlwaysTree(ScriptedDrafter):
    """A drafter that cannot draft a chain, of a size of its own."""

    min_width = default_width = 2
    default_num_nodes = 7


class Guided(ScriptedDrafter):
    """A drafter that reads a prediction."""

    needs = ("prediction",)


class Both(ScriptedDrafter):
    """A drafter that composes others."""

    options: ClassVar = {"parts": Option("ngram,draft_model", "who drafts"), **Wayward.options}

    def options_for(self, given):
        return self.options

    def parts(self, options):
        return tuple(options["parts"].split(","))


def drafters():
    return Drafters(
        [
            NgramDrafter(),
            DraftModel(junk(9), name="draft_model"),
            Wayward(junk(9), name="wayward"),
            NarrowDrawing(junk(9), name="branching"),
            AlwaysTree(junk(9), name="bushy"),
            Guided(junk(9), name="guided"),
            Both(junk(9), name="both"),
        ]
    )


def ask(sampling=HOT, default="", available=None, **params):
    return resolve(
        SpeculationParams(**params), sampling, available or drafters(), default, "small-model"
    )


def test_nothing_asked_is_the_engines_default():
    assert ask() == Speculation(verifier="sampled")
    found = ask(default="draft_model")
    assert (found.drafter, found.num_draft_tokens, found.width) == ("draft_model", 6, 1)


@pytest.mark.parametrize("params", [{"method": "off"}, {"num_draft_tokens": 0}])
def test_off_is_plain_decoding(params):
    found = ask(default="draft_model", **params)
    assert (found.drafter, found.num_draft_tokens) == ("", 0)


@pytest.mark.parametrize(
    "params",
    [
        {"num_draft_tokens": 4},
        {"width": 5},
        {"model": "nope"},
        {"prompt_lookup_max": 3},
        {"draft_sample_method": "greedy"},
    ],
)
@pytest.mark.parametrize("method", [None, "off"])
def test_nothing_is_dropped_where_nothing_drafts(params, method):
    key, value = next(iter(params.items()))
    with pytest.raises(RequestError, match=f"{key}={value!r}: nothing is drafted here"):
        ask(method=method, **params)


def test_what_is_asked_is_kept():
    found = ask(method="ngram", num_draft_tokens=3, width=4, prompt_lookup_min=3)
    assert (found.drafter, found.num_draft_tokens, found.width) == ("ngram", 3, 4)
    assert (found.prompt_lookup_min, found.prompt_lookup_max) == (3, 4)
    assert found.draft_sample_method == "greedy"


@pytest.mark.parametrize(
    ("low", "high", "bounds"),
    [(None, None, (2, 4)), (6, None, (6, 6)), (None, 1, (1, 1)), (None, 9, (2, 9)), (1, 2, (1, 2))],
)
def test_one_bound_of_the_lookup_gives_way_to_the_other(low, high, bounds):
    found = ask(method="ngram", prompt_lookup_min=low, prompt_lookup_max=high)
    assert (found.prompt_lookup_min, found.prompt_lookup_max) == bounds


@pytest.mark.parametrize(
    ("verifier", "asked", "method"),
    [
        (None, None, "coupled"),
        ("sampled", None, "coupled"),
        ("rejection", None, "probabilistic"),
        ("sampled", "probabilistic", "probabilistic"),
        ("rejection", "greedy", "greedy"),
    ],
)
def test_how_a_model_drafts_follows_from_the_rule(verifier, asked, method):
    found = ask(method="draft_model", verifier=verifier, draft_sample_method=asked)
    assert (found.verifier, found.draft_sample_method) == (verifier or "sampled", method)


@pytest.mark.parametrize(
    ("params", "error", "value", "remedy"),
    [
        ({"method": "draft_modle"}, RequestError, "'draft_modle'", "did you mean 'draft_model'"),
        ({"verifier": "sample"}, RequestError, "'sample'", "did you mean 'sampled'"),
        ({"verifier": "greedy"}, PairError, "verifier='greedy'", "use verifier='sampled'"),
        ({"method": "draft_model", "width": 2}, RequestError, "width=2", "use width=1"),
        (
            {"method": "ngram", "width": 3, "verifier": "rejection"},
            PairError, "width=3", "use width=1 or verifier='sampled'",
        ),
        (
            {"method": "draft_model", "verifier": "rejection", "draft_sample_method": "coupled"},
            PairError, "draft_sample_method='coupled'", "needs verifier='sampled'",
        ),
        (
            {"method": "ngram", "draft_sample_method": "probabilistic"},
            RequestError, "draft_sample_method='probabilistic'", "drop it",
        ),
        ({"method": "ngram", "model": "small-model"}, RequestError, "'small-model'", "drop it"),
        (
            {"method": "draft_model", "model": "other"},
            RequestError, "model='other'", "the engine has draft model 'small-model'",
        ),
        (
            {"method": "draft_model", "prompt_lookup_max": 3},
            RequestError, "prompt_lookup_max=3", "drop it",
        ),
    ],
)  # fmt: skip
def test_refusals_name_value_and_remedy(params, error, value, remedy):
    with pytest.raises(error) as caught:
        ask(**params)
    message = str(caught.value)
    assert value in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("asked", ["coupled", "probabilistic", "independent"])
def test_a_method_is_refused_where_the_options_leave_it_out(asked):
    message = (
        f"draft_sample_method={asked!r}: wayward drafts greedy only with by='text'; "
        "drop it, or use drafter_options={'by': 'ids'}"
    )
    for options in ({}, {"by": "text"}):
        with pytest.raises(RequestError, match=re.escape(message)):
            ask(method="wayward", drafter_options=options, draft_sample_method=asked)
    assert ask_by_ids(draft_sample_method=asked).draft_sample_method == asked


def ask_by_ids(**params):
    return ask(method="wayward", drafter_options={"by": "ids"}, **params)


def test_without_a_word_the_method_is_the_best_that_the_options_leave():
    assert ask(method="wayward").draft_sample_method == "greedy"
    assert ask(method="wayward", verifier="rejection").draft_sample_method == "greedy"
    assert ask(method="wayward", draft_sample_method="greedy").draft_sample_method == "greedy"
    assert ask_by_ids().draft_sample_method == "coupled"
    assert ask_by_ids(verifier="rejection").draft_sample_method == "probabilistic"
    with pytest.raises(PairError, match="that drafts a picked chain"):
        ask(method="wayward", verifier="spectr")


def test_a_composed_drafter_honours_a_method_if_one_of_its_parts_does():
    options = {"parts": "wayward,draft_model"}
    found = ask(method="both", drafter_options=options, draft_sample_method="coupled")
    assert found.draft_sample_method == "coupled"
    with pytest.raises(RequestError, match="both drafts greedy only with by='text'"):
        ask(
            method="both",
            drafter_options={"parts": "wayward,ngram"},
            draft_sample_method="coupled",
        )


def test_a_composed_drafter_is_as_wide_as_its_widest_part():
    assert ask(method="both", width=3).width == 3
    with pytest.raises(RequestError, match="width=2: both draws at most 1 branches; use width=1"):
        ask(method="both", drafter_options={"parts": "draft_model"}, width=2)
    with pytest.raises(RequestError, match="width=1: both draws at least 2"):
        ask(method="both", drafter_options={"parts": "bushy"}, width=1)


def test_bounds_of_a_lookup_go_to_who_looks_up():
    assert ask_by_ids(prompt_lookup_max=3).prompt_lookup_max == 3
    with pytest.raises(RequestError, match="prompt_lookup_max=3: method 'wayward' does not look"):
        ask(method="wayward", prompt_lookup_max=3)


def test_a_drafter_that_is_not_set_up_here():
    few = Drafters([ScriptedDrafter(junk(9))])
    with pytest.raises(RequestError, match=re.escape("give the engine draft_model=...")):
        ask(available=few, method="draft_model")
    with pytest.raises(RequestError, match=r"method='ngram'.*LLM\(drafters=\.\.\.\)"):
        ask(available=few, method="ngram")
    with pytest.raises(RequestError, match="the draft model here has the target's own vocabulary"):
        ask(method="translate")


def test_a_plug_in_that_cannot_be_loaded_is_told_to_who_asks_for_it(monkeypatch):
    point = EntryPoint(name="broken", value="no_such_module:Thing", group="outrider.drafters")
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [point])
    with pytest.raises(RequestError, match=r"method='broken': .* cannot be loaded"):
        ask(method="broken")


def test_the_loaded_draft_model_may_be_insisted_on():
    assert ask(method="draft_model", model="small-model").drafter == "draft_model"


def test_the_greedy_rule_serves_greedy_requests():
    assert ask(GREEDY, method="ngram", verifier="greedy").verifier == "greedy"


@pytest.mark.parametrize(
    ("accepts", "sample_method", "width", "legal"),
    [
        (Kind.DRAWN_CHAIN, "probabilistic", 1, True),
        (Kind.DRAWN_CHAIN, "independent", 1, True),
        (Kind.DRAWN_CHAIN, "probabilistic", 2, False),
        (Kind.DRAWN_CHAIN, "greedy", 1, False),
        (Kind.DRAWN_TREE, "probabilistic", 2, True),
        (Kind.DRAWN_TREE, "independent", 2, False),
        (Kind.DRAWN_CHAINS, "independent", 2, True),
        (Kind.PICKED_CHAIN, "probabilistic", 1, False),
        (Kind.PICKED_CHAIN, "greedy", 1, True),
        (Kind.PICKED_CHAIN, "greedy", 2, False),
        (Kind.PICKED_TREE, "greedy", 2, True),
        (Kind.PICKED_CHAIN, "coupled", 2, True),
    ],
)
def test_a_rule_is_given_only_the_kinds_it_declares(
    monkeypatch, accepts, sample_method, width, legal
):
    """An illegal pair is refused when the request comes."""

    class Choosy(SampledVerifier):
        name = "choosy"

    Choosy.accepts = frozenset({accepts})
    monkeypatch.setattr(module, "verifier", lambda name, options=(): Choosy())
    params = {"method": "branching", "draft_sample_method": sample_method, "width": width}
    if legal:
        assert ask(**params).draft_sample_method == sample_method
    else:
        with pytest.raises(PairError, match=r"verifier='choosy' takes .*'sampled'"):
            ask(**params)


@pytest.mark.parametrize(
    ("accepts", "width", "method"),
    [
        ({Kind.DRAWN_CHAIN, Kind.PICKED_CHAIN}, 1, "probabilistic"),
        ({Kind.DRAWN_CHAINS, Kind.PICKED_TREE}, 2, "independent"),
        ({Kind.PICKED_TREE}, 2, "greedy"),
    ],
)
def test_a_rule_keyed_by_the_root_gets_the_best_kind_it_takes(monkeypatch, accepts, width, method):
    class Choosy(SampledVerifier):
        name = "choosy"
        keyed_by = "root"

    Choosy.accepts = frozenset(accepts)
    monkeypatch.setattr(module, "verifier", lambda name, options=(): Choosy())
    assert ask(method="branching", width=width).draft_sample_method == method


def test_a_composing_drafter_is_judged_by_its_parts():
    found = ask(method="both", verifier="rejection")
    assert (found.drafter, found.parts) == ("both", ("ngram", "draft_model"))
    assert found.draft_sample_method == "probabilistic"
    assert ask(method="both", prompt_lookup_max=3).prompt_lookup_max == 3
    with pytest.raises(PairError, match=r"width=2 .* of ngram"):
        ask(method="both", width=2, verifier="rejection")


def test_sizes_of_trees():
    found = ask(method="bushy")
    assert (found.width, found.num_nodes) == (2, 7)
    assert ask(method="bushy", num_nodes=3).num_nodes == 3
    assert ask(method="ngram", num_draft_tokens=3, width=4).num_nodes == 12
    with pytest.raises(RequestError, match="width=1: bushy draws at least 2 branches; use width=2"):
        ask(method="bushy", width=1)


def test_options_are_honoured_or_refused():
    found = ask(method="branching", drafter_options={"share": 1, "way": "right"})
    assert found.options == {"depth": 3, "way": "right", "share": 1.0}
    assert isinstance(found.options["share"], float)
    for options, message in (
        ({"depth": 9}, r"drafter_options\['depth'\]=9: must lie in \[1, 5\]"),
        ({"depth": 2.5}, "must be a whole number"),
        ({"way": "up"}, "must be one of left, right"),
        ({"dept": 2}, "did you mean 'depth'"),
    ):
        with pytest.raises(RequestError, match=message):
            ask(method="branching", drafter_options=options)
    with pytest.raises(RequestError, match="ngram has no options; drop it"):
        ask(method="ngram", drafter_options={"depth": 2})
    with pytest.raises(RequestError, match="sampled has no options; drop it"):
        ask(method="ngram", verifier_options={"depth": 2})


def test_a_prediction_goes_to_who_reads_it():
    assert ask(method="guided", prediction_token_ids=(3, 4)).prediction == (3, 4)
    with pytest.raises(RequestError, match="give the expected text as prediction="):
        ask(method="guided")
    with pytest.raises(RequestError, match="prediction_token_ids: ngram reads no prediction"):
        ask(method="ngram", prediction_token_ids=(3, 4))
    with pytest.raises(RequestError, match="nothing is drafted here"):
        ask(method="off", prediction_token_ids=(3, 4))


def test_branches_are_for_drafters_and_rules_that_take_them():
    assert ask(method="branching", width=2).width == 2
    with pytest.raises(RequestError, match="width=3: branching draws at most 2"):
        ask(method="branching", width=3)


def test_a_tree_with_no_room_for_its_branches_is_refused():
    with pytest.raises(RequestError, match="num_nodes=2: has no room for width=4 branches"):
        ask(method="ngram", width=4, num_nodes=2)


def test_the_model_of_a_composed_drafter_may_be_insisted_on():
    assert ask(method="both", model="small-model").drafter == "both"


def test_a_table_may_ask_for_more_than_a_drafter_would(made_with_policies):
    spec = made_with_policies({"policy": "table", "policy_options": {"table": "1-:9"}})
    assert (spec.policy, spec.num_draft_tokens, spec.num_nodes) == ("table", 9, 9)
    with pytest.raises(RequestError, match="num_draft_tokens=4: policy 'table' asks for up to 9"):
        made_with_policies(
            {"policy": "table", "policy_options": {"table": "1-:9"}, "num_draft_tokens": 4}
        )


@pytest.mark.parametrize(
    ("settings", "sampling", "policy"),
    [
        ({}, {}, "adaptive"),
        ({"num_draft_tokens": 4}, {}, "fixed"),
        ({"num_draft_tokens": 4, "policy": "adaptive"}, {}, "adaptive"),
        ({}, {"temperature": 1.0, "seed": 3}, "adaptive"),
        ({"verifier": "rejection"}, {"temperature": 1.0, "seed": 3}, "fixed"),
        ({"verifier": "rejection"}, {"temperature": 1.0}, "adaptive"),
        ({"verifier": "rejection"}, {}, "adaptive"),
        ({"verifier": "fly"}, {}, "fixed"),
        ({"verifier": "fly", "policy": "adaptive"}, {}, "adaptive"),
    ],
)
def test_who_decides_how_far_to_draft(made_with_policies, settings, sampling, policy):
    assert made_with_policies(settings, **sampling).policy == policy


def test_latency_targets_need_a_policy_that_keeps_them(made_with_policies):
    spec = made_with_policies({"slo": {"tpot_ms": 50, "ttft_ms": 200.0}})
    assert (spec.tpot_s, spec.ttft_s) == (0.05, 0.2)
    with pytest.raises(RequestError, match=r"slo=.*policy 'fixed' keeps no latency targets"):
        made_with_policies({"slo": {"tpot_ms": 50}, "num_draft_tokens": 2})
    for wrong in ({"tpot": 5}, {"tpot_ms": 0}, {"tpot_ms": True}):
        with pytest.raises(RequestError, match="slo"):
            SpeculationParams(slo=wrong)


def test_an_unknown_policy_names_those_there_are(made_with_policies):
    with pytest.raises(RequestError, match=r"adaptiv.*adaptive"):
        made_with_policies({"policy": "adaptiv"})


@pytest.fixture
def made_with_policies():
    """Resolves for `draft_model` beside a controller with all policies."""
    controller = make_controller(1000, Facts(clock=lambda: 0.0))
    drafters = tiny_engine().drafters

    def resolved(settings, **sampling):
        params = SpeculationParams(method="draft_model", **settings)
        return resolve(params, SamplingParams(**sampling), drafters, "", "tiny", controller)

    return resolved
