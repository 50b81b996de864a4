"""`outrider serve`: its options, its keys, and one real process that is asked and told to stop."""

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields

import httpx
import pytest

from outrider import LLM, SamplingParams
from outrider.cli import serve as command
from outrider.errors import ConfigError
from outrider.ops.cpu.build import cache_folder
from outrider.serve.config import ServeConfig

RENAMED = {
    "api_keys": "api_key",
    "allowed_origins": "allowed_origin",
    "allowed_hosts": "allowed_host",
}


def test_every_setting_is_an_option():
    given = inspect.signature(command.serve).parameters
    for field in fields(ServeConfig):
        option = given[RENAMED.get(field.name, field.name)].default
        default = getattr(option, "default", option)
        if field.name not in RENAMED:
            assert default == field.default, field.name


def test_keys_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv(command.KEYS_VARIABLE, "key-e, eve:key-f")
    file = tmp_path / "keys"
    file.write_text("# people\nalice:key-a\n\nkey-b==\n")
    keys = command._read_keys(["bob:key-c"], file)
    assert set(keys) == {"key-a", "key-b==", "key-c", "key-e", "key-f"}
    assert (keys["key-a"], keys["key-c"], keys["key-f"]) == ("alice", "bob", "eve")
    assert keys["key-b=="].startswith("key-")
    assert keys["key-b=="] != keys["key-e"]
    assert "key-e" not in keys["key-e"]


def test_no_keys_means_none(monkeypatch):
    monkeypatch.delenv(command.KEYS_VARIABLE, raising=False)
    assert command._read_keys([], None) == {}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--api-key", "alice:"], "malformed"),
        (["--api-key", ":key"], "malformed"),
        (["--api-keys-file", "/nowhere/keys"], "cannot be read"),
        (["--api-keys-file", os.devnull], "holds no key"),
        (["--port", "70000"], "port=70000"),
        (["--max-concurrent", "0"], "max_concurrent=0"),
        (["--calibrate-s", "-1"], "calibrate_s=-1.0"),
        (["--calibrate-s", "nan"], "calibrate_s=nan"),
        (["--policy", "adaptiv"], "did you mean 'adaptive'"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(refused, args, words):
    assert words in refused("serve", "no-such-model", *args)


def test_a_key_is_not_repeated_in_a_message(refused):
    assert "hush" not in refused("serve", "no-such-model", "--api-key", ":hush")


def test_a_port_in_use(refused, model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port={port}" in refused("serve", model, "--port", port, "--calibrate-s", 0)


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=re.escape('pip install "outrider[serve]"')):
        command.check_installed()


def test_help_needs_no_server_packages():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('fastapi','uvicorn','prometheus_client')));"
        "from outrider.cli.main import app; app(['serve','--help'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert "--api-keys-file" in done.stdout


@pytest.fixture
def cache(tmp_path):
    """A folder with the builds of the user's own, and no prices."""
    for build in cache_folder().glob("*.so"):
        (tmp_path / build.name).symlink_to(build)
    return tmp_path


@pytest.fixture
def process(model, cache):
    """A server on a free port, and what it says on stderr."""
    code = "import sys; from outrider.cli.main import app; app(sys.argv[1:])"
    args = ["serve", model, "--port", "0", "--drain-s", "10", "--calibrate-s", "0.3"]
    started = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OUTRIDER_CACHE": str(cache)},
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(started.stderr), daemon=True)
    reader.start()
    yield started, lines
    if started.poll() is None:
        started.kill()
    started.wait()
    reader.join(5)
    started.stderr.close()


def url_of(lines):
    for _ in range(1200):
        for line in lines:
            if found := re.fullmatch(r"serving \S+ at (http://127\.0\.0\.1:\d+)\n", line):
                return found[1]
        time.sleep(0.05)
    raise AssertionError(lines)


def test_a_process_serves_and_drains(process, cache):
    started, lines = process
    with httpx.Client(base_url=url_of(lines), timeout=30) as client:
        assert client.get("/ready").status_code == 200
        (card,) = client.get("/v1/models").json()["data"]
        assert card["max_model_len"] == 128
        made = client.post("/tokenize", json={"prompt": "def main"}).json()
        assert made["count"] > 0
        (kept,) = (cache / "prices").glob("*.json")
        before = json.loads(kept.read_text())
        body = {"prompt": "def main", "max_tokens": 60, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).status_code == 200
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 0
    told, serving = lines
    assert re.match(r"calibrated in \d+\.\d s: a pass by rows: 1 \S+ ms, 4 ", told)
    assert serving.startswith("serving ")
    after = json.loads(kept.read_text())
    assert after["passes"]["num_timings"] > before["passes"]["num_timings"]


def test_what_was_timed_is_told_in_one_line(llm, monkeypatch):
    monkeypatch.setattr(llm, "calibrate", lambda budget_s: budget_s > 1)
    told = command.calibrated(llm, 2.0)
    assert told.startswith("calibrated in 0.0 s: a pass by rows: 1 ")
    assert "4 drafted by draft_model: " in told
    assert "\n" not in told
    assert command.calibrated(llm, 0.5).startswith("prices known from an earlier start: ")


@pytest.fixture
def llm(model, draft):
    """With prices of a few steps."""
    llm = LLM(model, draft_model=draft)
    llm.generate("def main", SamplingParams(max_tokens=20, ignore_eos=True))
    return llm
