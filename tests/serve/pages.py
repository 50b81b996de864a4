"""What tests of the studio stand on: its modules in node, and an app that a browser can visit."""

import json
import shutil
import subprocess
import threading

import pytest

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node on the PATH")


def node(code, modules, given):
    """What the module `code` prints as JSON; it finds `given` as INPUT, the page's in MODULES."""
    code = code.replace("MODULES", modules.as_uri()).replace("INPUT", json.dumps(given))
    made = subprocess.run(
        ["node", "--no-warnings", "--input-type=module", "-"],
        input=code, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


class Served:
    """An app on a free port, in a thread."""

    def __init__(self, app):
        uvicorn = pytest.importorskip("uvicorn")
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
        self.app = app
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            threading.Event().wait(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self):
        self._server.should_exit = True
        self._thread.join()
