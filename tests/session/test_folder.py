"""Folder: one process at a time, and nobody else's to read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.session.folder import Folder

HOLD = """
import sys
from pathlib import Path
from outrider.session.folder import Folder
folder = Folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_refused_until_the_first_has_died(tmp_path: Path) -> None:
    path = tmp_path / "state"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"{str(path)!r} is in use by another server"):
            Folder(path)
        other.kill()
        other.wait()
    Folder(path).release()


def test_whoever_releases_it_lets_others_in(tmp_path: Path) -> None:
    first = Folder(tmp_path)
    with pytest.raises(ConfigError):
        Folder(tmp_path)
    first.release()
    first.release()
    Folder(tmp_path).release()


def test_a_folder_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Folder(tmp_path).release()
    assert [oct(p.stat().st_mode & 0o777) for p in (tmp_path, tmp_path / "lock")] == [
        "0o700",
        "0o600",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be used"):
        Folder(tmp_path / "state")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        Folder(tmp_path / "state")
