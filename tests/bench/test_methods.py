"""benchmarks/methods: pairs of two vocabularies have rows of their own, or are said skipped."""

import pytest

from benchmarks import methods, methods_page
from outrider.errors import ConfigError

SIZE = "10 prompts, 64 tokens, 200 answers"
PAIR = "one, drafted by two"
ENTRY = {
    "speculation": {"method": "translate", "drafter_options": {"by": "strings"}},
    "ratio": 0.5,
    "low": 0.4,
    "high": 0.6,
    "num_prompts": 10,
    "verdict": "slower",
    "plain_tokens_per_second": 1000.0,
    "tokens_per_second": 500.0,
    "acceptance_length": 2.5,
    "tokens_per_pass": 2.4,
    "draft_ms": 1.25,
    "num_identical": 10,
    "num_threads": 1,
    "load_average": 0.25,
    "commit": "abc",
}
FACTS = {"command": "python -m benchmarks.methods", "commit": "abc"}


def page(entries, folder):
    methods_page.write_figures(entries, folder, SIZE)
    methods_page.write_page(entries, folder / "page.md", FACTS, SIZE, {"code": 10})
    return (folder / "page.md").read_text()


def test_a_pair_of_two_vocabularies_has_a_section_and_a_figure(tmp_path):
    live = {**ENTRY, "plain_tokens_per_second": 500.0, "speculation": {"method": "ngram"}}
    entries = {
        ("live", "ngram", "code"): live,
        ("across", "translate, by strings", PAIR): ENTRY,
    }
    told = page(entries, tmp_path)
    assert f"| drafter | {PAIR} |" in told
    row = "| `translate, by strings` | **0.50 (0.40 to 0.60)** / 2.50 / 1.250 / 10 of 10 |"
    assert row in told
    assert f"{PAIR}: 1.00 ms" in told
    assert "Threads: 1. Load average before each of these rows: 0.2 to 0.2." in told
    assert "A plain step takes 2.00 ms." in told, "that of the demo pair stays its own"
    assert "- settings of `translate, by strings`: `{'drafter_options': {'by': 'strings'}}`" in told
    assert "translate, by strings" in (tmp_path / "translate.svg").read_text()


@pytest.mark.parametrize("has_folder", [False, True])
def test_without_the_weights_the_rows_are_skipped_and_the_page_says_so(tmp_path, has_folder):
    data = tmp_path if has_folder else None
    name, (target, draft) = "translate, by tokens", methods.PAIRS[0]

    def measure():
        return methods.across(data, name, target, draft, (2, 8))

    with pytest.raises(ConfigError, match=f"skipped: no {target} in the data folder; give --data"):
        measure()
    results = methods.Results(tmp_path / "entries.json", SIZE, FACTS)
    results.get(f"across | {name} | {PAIR}", measure)
    told = page(results.of_this_size(), tmp_path)
    assert f"- across, `{name}` ({PAIR}): skipped: no {target}" in told
    assert "two vocabularies, on pairs" not in told
    assert not (tmp_path / "translate.svg").exists()


def test_every_row_across_vocabularies_names_a_drafter_and_its_way():
    ways = [methods._params(name) for name in methods.ACROSS]
    assert [way.method for way in ways] == ["ngram", "suffix", "translate", "translate"]
    assert [way.drafter_options.get("by") for way in ways] == [None, None, "strings", "tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "draft"), methods.PAIRS)
def test_real_models_are_measured(shared_data, target, draft):
    found = methods.across(shared_data, "translate, by strings", target, draft, (2, 24))
    assert found["num_identical"] == found["num_prompts"] == 2
    assert found["acceptance_length"] > 1.5
    assert found["draft_ms"] > 0
