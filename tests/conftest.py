"""What every test stands on: fixed seeds, no network, real data if it is there, skips by marker."""

import importlib.util
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]

# Shared machines stall now and then: time is judged by benchmarks, not by hypothesis.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# marker -> (is it there?, why a test that needs it is skipped); asked only when a test carries it.
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "gpu": (_has_cuda, "needs CUDA"),
    "browser": (lambda: shutil.which("chromium") is not None, "needs chromium on the PATH"),
    "ray": (lambda: importlib.util.find_spec("ray") is not None, "needs ray"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, (is_there, reason) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Seeds, and one thread: tiny models gain nothing from more and lose much on busy cores."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_prices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine learned of prices is not read, nor written; kernels are shared."""
    from outrider.engine import calibrate

    folder = tmp_path_factory.mktemp("prices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real checkpoints, prompts and traces that are not part of the repository."""
    folder = Path(os.environ.get("OUTRIDER_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: set OUTRIDER_DATA to the folder that holds it")
    return folder
