"""A server over a tiny random model, spoken to without a socket."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from outrider import LLM, AsyncLLM
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
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
    llm = LLM(str(folder), draft_model=str(draft), check_integrity=True)
    llm.tokenizer.backend.chat_template = TEMPLATE
    return llm


@pytest.fixture
async def serve(llm: LLM) -> AsyncIterator[Callable[..., Any]]:
    """Starts servers: `client = await serve(max_waiting=0)`; its app is at `client.app`."""
    async with AsyncExitStack() as stack:

        async def start(config: ServeConfig | None = None, **fields: Any) -> httpx.AsyncClient:
            app = create_app(AsyncLLM(llm), config or ServeConfig(drain_s=0.0, **fields))
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


def client_of(app: FastAPI) -> httpx.AsyncClient:
    made = httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://test", timeout=30
    )
    made.app = app  # type: ignore[attr-defined]
    return made
