"""Process: a real socket; what a drain lets end, whom it refuses, and what a second signal does."""

import asyncio
import signal
import socket

import httpx
import pytest

from outrider import AsyncLLM, SamplingParams
from outrider.errors import ConfigError
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from outrider.serve.generation import Ask, generate, whole
from outrider.serve.process import Process
from outrider.serve.sse import Frame, event_stream

LONG = SamplingParams(max_tokens=200, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=900, ignore_eos=True)


class Running:
    """A server on a free port in this event loop."""

    def __init__(self, llm, **fields):
        self.app = create_app(AsyncLLM(llm), ServeConfig(port=0, **fields))
        self.server = self.app.state.server
        self._add_routes()
        self._url = asyncio.get_running_loop().create_future()
        self.process = Process(self.app, self._url.set_result)

    async def __aenter__(self):
        self._serving = asyncio.create_task(self.process.serve_in_loop())
        self.client = httpx.AsyncClient(base_url=await self._url, timeout=20)
        return self

    async def __aexit__(self, *_):
        await self.client.aclose()
        self.process.should_exit = True
        await asyncio.wait_for(self._serving, 20)

    def tell(self, sig=signal.SIGTERM):
        self.process.handle_exit(sig, None)

    async def ended(self):
        await asyncio.wait_for(asyncio.shield(self._serving), 20)

    def _add_routes(self):
        @self.app.get("/stream/{name}")
        async def stream(name: str, endless: bool = False):
            ask = Ask(prompt=(5, 9), sampling=ENDLESS if endless else LONG)

            async def frames():
                async for event in generate(self.server, ask, name):
                    yield Frame(data={"ids": event.token_ids})
                yield Frame(data="[DONE]")

            return event_stream(frames())

        @self.app.get("/whole/{name}")
        async def answer(name: str):
            ask = Ask(prompt=(5, 9), sampling=ENDLESS)
            return [a.text for a in await whole(self.server, ask, name)]


async def until(holds):
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


async def test_a_drain_lets_streams_end_and_refuses_the_rest(llm):
    async with Running(llm, drain_s=20) as running:
        client, gate = running.client, running.server.gate
        async with gate.seat(), client.stream("GET", "/stream/a") as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            running.tell()
            await until(lambda: gate.is_draining)
            # The listener stays open while it drains.
            ready, refused = await client.get("/ready"), await client.get("/stream/b")
            assert (ready.status_code, refused.status_code) == (503, 503)
            assert int(refused.headers["retry-after"]) >= 1
            assert [line async for line in lines if line][-1] == "data: [DONE]"
            assert (await client.get("/health")).status_code == 200
        await running.ended()
        with pytest.raises(httpx.TransportError):
            await client.get("/ready")


async def test_a_drain_aborts_what_takes_longer(llm):
    async with Running(llm, drain_s=0.1) as running:
        async with running.client.stream("GET", "/stream/a?endless=1") as response:
            lines = response.aiter_lines()
            await anext(lines)
            running.tell()
            rest = [line async for line in lines if line]
            assert '"code":"draining"' in rest[-2]
            assert rest[-1] == "data: [DONE]"
        await running.ended()


async def test_a_second_signal_does_not_wait(llm):
    async with Running(llm, drain_s=60) as running, running.server.gate.seat():
        running.tell()
        await until(lambda: running.server.gate.is_draining)
        running.tell(signal.SIGINT)
        await running.ended()


@pytest.mark.parametrize("path", ["/stream/a?endless=1", "/whole/a"])
async def test_a_client_that_hangs_up_ends_the_work(llm, path):
    async with Running(llm, drain_s=0) as running:
        gate = running.server.gate
        url = running.client.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await until(lambda: gate.num_running == 1)
        writer.close()
        await until(lambda: gate.num_running == 0)
        await until(lambda: running.server.llm.engine.manager.num_used == 0)
        assert (await running.client.get("/ready")).status_code == 200
        del reader


async def test_half_a_request_harms_nobody(llm):
    async with Running(llm, drain_s=0) as running:
        url = running.client.base_url
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        await writer.drain()
        writer.close()
        assert (await running.client.get("/ready")).status_code == 200


async def test_small_frames_do_not_wait_for_each_other(llm):
    """Nagle's algorithm would hold each one back until the one before is acknowledged."""
    async with Running(llm, drain_s=0) as running:
        assert (await running.client.get("/ready")).status_code == 200
        (connection,) = running.process.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_folder_that_is_in_use(llm, tmp_path, caplog):
    async with Running(llm, drain_s=0, state_dir=tmp_path):
        app = create_app(AsyncLLM(llm), ServeConfig(port=0, state_dir=tmp_path))
        with pytest.raises(ConfigError, match=str(tmp_path)):
            await Process(app, print).serve_in_loop()
        assert "Traceback" not in caplog.text


async def test_an_address_that_is_not_ours(llm):
    app = create_app(AsyncLLM(llm), ServeConfig(host="192.0.2.1", port=1))
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        Process(app, print).serve_until_told()
