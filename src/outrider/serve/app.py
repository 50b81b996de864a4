"""create_app: the routes over one engine, and how they start and stop."""

import importlib
import importlib.util
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import ModuleType
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from outrider import __version__
from outrider.engine.async_llm import AsyncLLM
from outrider.errors import EngineError
from outrider.serve import errors
from outrider.serve.base import ServeConfig, Server
from outrider.serve.door import Door
from outrider.serve.gate import Gate
from outrider.serve.metrics import Metrics

ROUTERS = (
    "health", "models", "tokens", "chat", "completions", "messages", "responses", "sessions",
    "debug", "studio",
)  # fmt: skip
GOODBYE_S = 5.0  # for the last words to readers that are slow
logger = logging.getLogger(__name__)


def create_app(
    engine: AsyncLLM, config: ServeConfig | None = None, *, clock: Callable[[], float] = time.time
) -> FastAPI:
    """The application. Its lifespan ends by draining, and at last closes the engine.

    A module of routes exposes `router`, and may expose `lifespan(server)`, an asynchronous context
    manager that is entered before the first request and left after the last; the engine lives
    throughout.

    Args:
        clock: seconds since the epoch, for time stamps.
    """
    config = config or ServeConfig()
    server = _server(engine, config, clock)
    modules = _modules()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(engine.aclose)
            for module in modules:
                if hasattr(module, "lifespan"):
                    await stack.enter_async_context(module.lifespan(server))
            stack.push_async_callback(drain, server)
            yield

    app = FastAPI(
        title="Outrider",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        responses=errors.RESPONSES,
    )
    app.state.server = server
    errors.install(app)
    for module in modules:
        app.include_router(module.router)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.add_middleware(Door, config=config)
    _document(app)
    return app


async def drain(server: Server) -> None:
    """Lets nobody in any more, waits for those inside, and aborts who is left."""
    gate = server.gate
    gate.drain()
    if await gate.wait_idle(server.config.drain_s):
        return
    logger.warning("%d requests are aborted after the drain", gate.num_running)
    with suppress(EngineError):  # a broken engine has let them go already
        for request_id in list(server.open_requests):
            await server.engine.call(server.llm.engine.abort, request_id)
    await gate.wait_idle(GOODBYE_S)


def _server(engine: AsyncLLM, config: ServeConfig, clock: Callable[[], float]) -> Server:
    if config.is_open:
        logger.warning(
            "%s can be reached from other machines and asks for no key: give --api-key", config.host
        )
    llm = engine.llm
    gate = Gate(config.max_concurrent, config.max_waiting)
    name = config.served_model_name or llm.engine.spec.name
    return Server(
        engine=engine,
        llm=llm,
        config=config,
        gate=gate,
        metrics=Metrics(llm.engine, gate, name),
        model_name=name,
        tokenizer=llm.tokenizer,
        started=int(clock()),
        clock=clock,
    )


def _modules() -> list[ModuleType]:
    """Those of `ROUTERS` that are there."""
    paths = (f"outrider.serve.{name}" for name in ROUTERS)
    return [importlib.import_module(path) for path in paths if importlib.util.find_spec(path)]


def _document(app: FastAPI) -> None:
    """An OpenAPI page without FastAPI's own form of a wrong body, which is never sent."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        page = original()
        for operations in page["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            page.get("components", {}).get("schemas", {}).pop(name, None)
        return page

    app.openapi = openapi  # type: ignore[method-assign]
