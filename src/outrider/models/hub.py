"""From a model's name to the folder that holds it: shipped, local, or from the Hugging Face hub."""

import difflib
import re
from importlib.resources import files
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from outrider.errors import ModelError

SHIPPED = {
    "demo": "assets/demo/target",
    "demo-draft": "assets/demo/draft",
    "demo-eagle3": "assets/demo/eagle3",
    "demo-medusa": "assets/demo/medusa",
    "demo-kv": "assets/demo/kv",
}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SIDE_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
WEIGHTS = ["model*.safetensors"]
HEAD_WEIGHTS = ["medusa_lm_head.safetensors"]
PICKLED_WEIGHTS = ["pytorch_model*.bin"]
PICKLED_HEADS = ["medusa_lm_head.pt", "hydra_lm_head.pt"]
# Of some heads, beside other files of weights.
SMALL_PICKLES = ["warp_model.bin", "mask_embedding.pt"]


def resolve(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded if need be.

    Args:
        name: "demo", "demo-draft" or another of `SHIPPED` (write "./demo" for a folder of that
            name), a local folder, or an id on the hub such as "Qwen/Qwen3-0.6B".
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: there is no such model, or it cannot be reached.
    """
    local = Path(name).expanduser()
    if name not in SHIPPED and not local.is_dir():
        return _download(name, revision)
    if revision is not None:
        raise ModelError(
            f"revision {revision!r} is for models on the hub, {name!r} is a folder here"
        )
    return _shipped(name) if name in SHIPPED else local


def _shipped(name: str) -> Path:
    folder = Path(str(files("outrider"))) / SHIPPED[name]
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"the shipped model {name!r} is missing from this installation: install outrider again"
        )
    return folder


def _download(name: str, revision: str | None) -> Path:
    if not HUB_ID.fullmatch(name):
        raise ModelError(
            f"no folder {name!r}, and it is no hub id such as 'Qwen/Qwen3-0.6B'{_meant(name)}"
        )
    try:
        safe = WEIGHTS + HEAD_WEIGHTS
        folder = _snapshot(name, revision, SIDE_FILES + safe + SMALL_PICKLES)
        if not any(path for pattern in safe for path in folder.glob(pattern)):
            folder = _snapshot(name, revision, SIDE_FILES + PICKLED_WEIGHTS + PICKLED_HEADS)
    except Exception as error:
        # The hub client lets errors of several HTTP libraries through, and all mean the same here.
        raise ModelError(
            f"cannot get {name!r} from the hub{_meant(name)}: {_reason(error, revision)}"
        ) from error
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    # Folders inside a repository hold copies in other formats (onnx, original).
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
    )


def _meant(name: str) -> str:
    """The shipped model that a name may have been meant for."""
    close = [] if "/" in name else difflib.get_close_matches(name, SHIPPED, n=1)
    return f" (did you mean {close[0]!r}, which is shipped?)" if close else ""


def _reason(error: Exception, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return "it is gated: ask for access on its page, then run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model, or it is private: check the name, or run `hf auth login`"
    first_line = (str(error).splitlines() or [""])[0]
    return (
        "not in the local cache and the hub is out of reach: "
        f"check the connection and HF_HUB_OFFLINE, or name a local folder ({first_line})"
    )
