"""The checkpoints of the comparison, in every peer's format, under .peers/models.

python -m benchmarks.peers.models [--size 135m]

All come from the same float32 weights: the demo target grown to a larger shape, and the demo
drafter. Faint noise stands in place of growth's zeros: the new layers' all-zero matrices are equal,
and a peer that stores equal weights once would read a fifth less than the others.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

from safetensors.torch import load_file, save_file

from outrider.models.hub import resolve
from outrider.train.grow import grow

PEERS = Path(".peers")
MODELS = PEERS / "models"
NOISE = 0.001  # of the source's deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="135m", help="preset shape of the target")
    size = parser.parse_args().size
    target, draft = MODELS / "target", MODELS / "draft"
    shutil.rmtree(MODELS, ignore_errors=True)
    grow(resolve("demo"), target, size=size, noise=NOISE, dtype="float32")
    _copy_in_float32(resolve("demo-draft"), draft)
    for folder in (target, draft):
        _to_gguf(folder)
        _to_openvino(folder)


def _copy_in_float32(source: Path, out: Path) -> None:
    shutil.copytree(source, out)
    weights = {k: v.float() for k, v in load_file(source / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}, indent=2))


def _to_gguf(folder: Path) -> None:
    python = PEERS / "env/llamacpp/bin/python"
    for kind in ("f32", "q8_0"):
        _run(python, "benchmarks/peers/to_gguf.py", folder, MODELS / f"{folder.name}-{kind}.gguf")


def _to_openvino(folder: Path) -> None:
    tool = PEERS / "env/openvino/bin/optimum-cli"
    for kind in ("fp32", "int8"):
        out = MODELS / f"{folder.name}-openvino-{kind}"
        task = ("--task", "text-generation-with-past")
        _run(tool, "export", "openvino", "--model", folder, *task, "--weight-format", kind, out)


def _run(tool: Path, *arguments: object) -> None:
    if not tool.exists():
        print(f"skipped, for {tool} is not there: {arguments[-1]}")
        return
    subprocess.run([str(tool), *map(str, arguments)], check=True)
    print(f"wrote {arguments[-1]}")


if __name__ == "__main__":
    main()
