"""The package's own names: all there, and loaded no sooner than somebody asks for them."""

import subprocess
import sys

import pytest

import outrider


def in_a_process(code: str) -> str:
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


@pytest.mark.parametrize("name", ["outrider", "outrider.client", "outrider.errors"])
def test_what_needs_no_model_does_not_load_torch(name: str) -> None:
    heavy = "{'numpy', 'tokenizers', 'torch', 'transformers'}"
    assert in_a_process(f"import sys, {name}; print({heavy} & set(sys.modules))") == "set()"


@pytest.mark.parametrize("name", outrider.__all__)
def test_each_name_can_be_imported_first(name: str) -> None:
    code = f"from outrider import {name}; import outrider; print(outrider.{name} is {name})"
    assert in_a_process(code) == "True"


def test_all_names_resolve_and_are_listed() -> None:
    code = "from outrider import *; import outrider; print(set(outrider.__all__) <= set(globals()))"
    assert in_a_process(code) == "True"
    for name in outrider.__all__:
        assert getattr(outrider, name).__name__ == name
    assert set(outrider.__all__) <= set(dir(outrider))
    assert "__version__" in dir(outrider)


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="module 'outrider' has no attribute 'LMM'"):
        outrider.LMM  # noqa: B018
    with pytest.raises(ImportError):
        from outrider import LMM  # noqa: F401
