"""A server over a tiny random model, spoken to without a socket; its page in Chromium."""

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from outrider import LLM, AsyncLLM
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from outrider.serve.studio import FOLDER
from tests.engine.tiny_checkpoint import write_checkpoint

# A template as small as they come; the tiny tokenizer has none.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A target and a draft model of two layers, over 300 tokens and 1024 positions."""
    options = {"max_position_embeddings": 1024}
    folder = write_checkpoint(tmp_path_factory.mktemp("target"), **options)
    draft = write_checkpoint(tmp_path_factory.mktemp("draft"), num_hidden_layers=1, **options)
    llm = LLM(str(folder), draft_model=str(draft), policy="fixed", check_integrity=True)
    llm.tokenizer.backend.chat_template = TEMPLATE
    return llm


@pytest.fixture
async def serve(llm: LLM) -> AsyncIterator[Callable[..., Any]]:
    """Starts servers: `client = await serve(max_waiting=0)`; its app is at `client.app`.

    One that starts takes the folder of its state from those before it, as if they were killed.
    """
    apps: list[FastAPI] = []
    async with AsyncExitStack() as stack:

        async def start(config: ServeConfig | None = None, **fields: Any) -> httpx.AsyncClient:
            app = create_app(AsyncLLM(llm), config or ServeConfig(drain_s=0.0, **fields))
            for other in apps:
                release(other)
            apps.append(app)
            await stack.enter_async_context(app.router.lifespan_context(app))
            return await stack.enter_async_context(client_of(app))

        yield start
    llm.flush()
    assert not llm.engine.has_work()
    assert llm.engine.manager.num_used == 0


@pytest.fixture
async def client(serve: Callable[..., Any]) -> httpx.AsyncClient:
    """A client of a server with the usual settings."""
    return await serve()


def release(app: FastAPI) -> None:
    """Lets other servers have the folder of an app's state, as if its process were gone."""
    sessions = app.state.server.sessions
    if sessions is not None and sessions._store.folder is not None:
        sessions._store.folder.release()


def client_of(app: FastAPI) -> httpx.AsyncClient:
    made = httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=30
    )
    made.app = app  # type: ignore[attr-defined]
    return made


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's modules where node takes them for modules."""
    folder = tmp_path_factory.mktemp("modules")
    for path in FOLDER.glob("*.js"):
        (folder / path.name).write_text(path.read_text())
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as driver:
        path = shutil.which("chromium")
        made = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; a script error or a message of the policy fails the test."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def go(url: str, *, width: int = 1280, **options: Any) -> Any:
        options = {"viewport": {"width": width, "height": 800}, **options}
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.goto(url)
        page.locator("body[data-ready]").wait_for()
        return page

    yield go
    for context in contexts:
        context.close()
    expected = ("400 (Bad Request)", "ERR_CONNECTION_REFUSED")  # some servers end before the page
    assert [text for text in complaints if not any(one in text for one in expected)] == []
