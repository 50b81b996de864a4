"""The studio's "Why this K?": what it makes of a report in node, and the panel in Chromium."""

import httpx
import pytest

from outrider import AsyncLLM
from outrider.serve.app import create_app
from outrider.serve.config import ServeConfig
from tests.serve import studio_stub
from tests.serve.pages import Served, needs_node, node

SUMMARY = """
import { summary } from "MODULES/why.js";
console.log(JSON.stringify(INPUT.map(summary)));
"""
TOLD = {
    "why": "the drafts with the highest expected goodput",
    "plain_tokens_per_s": 200.0,
    "expected_tokens_per_s": 320.4,
    "depths": {"0": 1, "4": 2},
    "guard": {"advantage": 1.512, "times_shut": 2, "shut_for_steps": 1},
    "acceptance": [
        {"drafter": "ngram", "temperature_up_to": "inf", "stands": [0.2], "num_drafts": 3},
        {"drafter": "draft_model", "temperature_up_to": "0", "stands": [0.8], "num_drafts": 9},
        {"drafter": "suffix", "temperature_up_to": "0.5", "stands": [0.7], "num_drafts": 0},
    ],
    "cost": {
        "passes": {
            "rows": [1, 2, 3, 128],
            "seconds": [0.01, 0.012, 0.011, 0.5],
            "num_timings": 9,
        }
    },
}


def report(default, **policies):
    return {"default": default, "num_running": 3, "policies": policies}


@needs_node
def test_what_is_shown_of_a_report(modules):
    (found,) = node(SUMMARY, modules, [report("adaptive", adaptive=TOLD, fixed={})])
    assert found["policy"] == "adaptive"
    assert found["is_default"]
    assert found["why"] == TOLD["why"]
    assert dict(found["facts"]) == {
        "Sequences": "3",
        "Plain decoding": "200 tokens/s",
        "Expected": "320 tokens/s, 1.60 times plain",
        "Measured": "1.51 times plain",
        "Ended for losing": "2 times, for 1 step more",
    }
    assert found["depths"] == [[0, 1], [4, 2]]
    labels = [one["label"] for one in found["acceptance"]]
    assert labels == ["draft_model, greedy", "ngram, temperature above 1"]
    assert found["price"] == [[1, 10.0], [2, 12.0], [3, 12.0]]


@needs_node
def test_policies_that_tell_little(modules):
    undecided = {"why": "nothing was decided yet", "depths": {}, "cost": {"passes": {}}}
    reports = [
        report("fixed", fixed={}, adaptive={**undecided, "plain_tokens_per_s": None}),
        report("fixed", fixed={}, adaptive=TOLD),
        report("theirs", theirs={}),
        report("adaptive", adaptive=undecided),
    ]
    fixed, used, theirs, first = node(SUMMARY, modules, reports)
    assert (fixed["policy"], fixed["is_default"]) == ("fixed", True)
    assert fixed["why"].startswith("K is what was asked for")
    assert (used["policy"], used["is_default"]) == ("adaptive", False)
    assert theirs["why"] == "It tells nothing of itself."
    assert first["why"] == "nothing was decided yet"
    for found in (fixed, theirs, first):
        assert (found["depths"], found["acceptance"], found["price"]) == ([], [], [])
        assert dict(found["facts"])["Expected"] == "\u2013"


NAMED = SUMMARY.replace("INPUT.map(summary)", "INPUT.map(([one, name]) => summary(one, name))")


@needs_node
def test_it_is_about_the_policy_that_was_in_force(modules):
    told = report("adaptive", adaptive=TOLD, fixed={}, off={})
    found = node(NAMED, modules, [[told, name] for name in (None, "fixed", "off", "gone")])
    assert [one["policy"] for one in found] == ["adaptive", "fixed", "off", "adaptive"]
    assert [one["is_default"] for one in found] == [True, False, False, True]


@pytest.fixture(scope="module")
def adaptive(llm):
    """A server, one of whose requests has asked for the adaptive policy."""
    served = Served(create_app(AsyncLLM(llm), ServeConfig(drain_s=0.0)))
    body = {
        "prompt": "one two three", "max_tokens": 60, "ignore_eos": True, "temperature": 0,
        "speculation": {"method": "draft_model", "policy": "adaptive"},
    }  # fmt: skip
    for _ in range(3):
        assert httpx.post(served.url + "/v1/completions", json=body, timeout=30).is_success
    yield served
    served.stop()


@pytest.mark.browser
def test_the_panel_opens_by_keyboard_and_says_why(visit, adaptive):
    page = visit(adaptive.url)
    page.locator("#why > summary").focus()
    assert not page.locator("#why-line").is_visible()
    page.keyboard.press("Enter")
    page.locator("#why-facts dd", has_text="tokens/s").first.wait_for()
    assert page.locator("#why-policy").inner_text() == "adaptive (not the default)"
    assert page.locator("#why-line").inner_text() not in ("", "asking…")
    assert page.locator("#chart-depths rect.part").count() > 0
    assert page.locator("#chart-price polyline").get_attribute("points").count(",") >= 8
    assert "Milliseconds of a pass" in page.locator("#chart-price").get_attribute("aria-label")
    captions = page.locator("#why-acceptance figcaption").all_inner_texts()
    assert any(text.startswith("draft_model, greedy") for text in captions)


@pytest.mark.browser
def test_a_policy_that_is_chosen_takes_effect_on_the_next_turn(visit, adaptive):
    """On a real engine: it says what was in force, and the panel is about that."""
    page = visit(adaptive.url)
    page.locator("#why > summary").click()
    for policy in ("adaptive", "off", "fixed"):
        page.select_option("#policy", policy)
        page.fill("#message", f"one two three, {policy}")
        page.press("#message", "Enter")
        told = page.locator("#policy-in-force", has_text=f"last answer: {policy}.")
        told.wait_for()
        page.locator("#send").wait_for()
        note = page.locator(".turn.assistant .note").last.inner_text()
        assert f"policy {policy}" in note
        steps = page.locator(".turn.assistant").last.locator(".tok")
        kinds = set(steps.evaluate_all("all => all.map((one) => one.className)"))
        assert (kinds == {"tok plain"}) == (policy == "off") or policy == "adaptive"
        shown = page.locator("#why-policy", has_text=policy)
        shown.wait_for()
        assert ("not the default" in shown.inner_text()) == (policy != "fixed")


@pytest.mark.browser
def test_it_asks_only_while_it_is_open_and_goes_on_asking(visit, adaptive):
    page = visit(adaptive.url)
    asked = []
    page.on("request", lambda r: asked.append(r.url) if r.url.endswith("/controller") else None)
    page.wait_for_timeout(2200)
    assert asked == []
    page.locator("#why > summary").click()
    with page.expect_request("**/debug/controller"):
        pass
    num_asked = len(asked)
    with page.expect_request("**/debug/controller", timeout=5000):
        pass
    assert len(asked) > num_asked


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_themes(visit, adaptive, scheme):
    page = visit(adaptive.url, width=360, color_scheme=scheme, has_touch=True)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.locator("#why > summary").tap()
    page.locator("#why-acceptance figure").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.browser
def test_a_server_that_does_not_say_has_no_panel(visit, llm):
    served = Served(studio_stub.app_over(llm))
    try:
        page = visit(served.url)
        assert page.locator("#why").count() == 1
        assert not page.locator("#why").is_visible()
    finally:
        served.stop()
