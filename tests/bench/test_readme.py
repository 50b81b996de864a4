"""benchmarks/README.md: every script it names is there, and every script that is there is named."""

import re
from pathlib import Path

from outrider.bench import statistics

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TEXT = (BENCHMARKS / "README.md").read_text()


def test_it_names_the_scripts_that_exist():
    scripts = {p.stem for p in BENCHMARKS.glob("*.py") if "__main__" in p.read_text()}
    assert set(re.findall(r"`python -m benchmarks\.(\w+)`", TEXT)) == scripts


def test_it_tells_the_numbers_of_the_code():
    assert "A B B A" in TEXT
    assert f"a {statistics.INTERVAL:.0%} percentile".replace("%", " %") in TEXT
    assert f"({statistics.NUM_RESAMPLES} times)" in TEXT
    assert f"Fewer than {statistics.MIN_PROMPTS} prompts" in TEXT
    assert f"within {100 * statistics.EPS:g} % of 1" in TEXT
