"""Requests drawn from our own OpenAPI page: every answer is one that the page tells of."""

import asyncio
import threading
from contextlib import AsyncExitStack, contextmanager

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from hypothesis.errors import Unsatisfiable

from outrider import AsyncLLM
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from tests.serve.test_fuzz import BODIES

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
FailureGroup = pytest.importorskip("schemathesis.core.failures").FailureGroup

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
LIMITS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
GIVEN = ("method", "url", "params", "headers", "json", "files")
BASE = "http://localhost"
BY_CHANCE = {"GET /v1/models/{model}"}  # no random name is that of our model
WAIT_S = 120
NUM_CASES = 100
TURN = {"input": "the quick", "max_output_tokens": 2}


class Site:
    """A server on a loop of its own, asked from another thread."""

    def __init__(self, llm):
        self._llm = llm
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def run(self, call):
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(WAIT_S)

    @contextmanager
    def open(self):
        self._thread.start()
        try:
            self.run(self._start())
            yield self
        finally:
            self.run(self._stack.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _start(self):
        self._stack = AsyncExitStack()
        self.app = create_app(AsyncLLM(self._llm), ServeConfig(drain_s=0.0))
        await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))
        transport = httpx.ASGITransport(app=self.app)
        client = httpx.AsyncClient(transport=transport, base_url=BASE)
        self.client = await self._stack.enter_async_context(client)

    def ask(self, method, url, **fields):
        return self.run(self.client.request(method, url, **fields))

    def names(self):
        """Of a session and a response that are there."""
        session = self.ask("POST", "/v1/sessions", json={"token_ids": [5, 6, 7]}).json()["id"]
        told = self.ask("POST", f"/v1/sessions/{session}/responses", json=TURN)
        return {"session_id": session, "response_id": told.json()["id"]}


@pytest.fixture(scope="module")
def site(llm):
    with Site(llm).open() as site:
        yield site


def try_out(site, operation, mode, num_cases):
    """Statuses of one operation's answers; what hypothesis raises for one that is not told of."""
    names, statuses = site.names(), set()
    fields = fields_of(operation)
    limits = dict.fromkeys(LIMITS & fields, 2)  # no case may take long

    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=operation.as_strategy(generation_mode=mode),
        is_there=st.booleans(),
        kept=st.sets(st.sampled_from(sorted(fields)), max_size=3) if fields else st.just(set()),
        based=st.booleans(),
    )
    def attempt(case, is_there, kept, based):
        if is_there:
            known = case.path_parameters.keys() & names.keys()
            case.path_parameters.update({name: names[name] for name in known})
        if isinstance(case.body, dict):  # all at once, random fields are hardly ever right
            right = BODIES.get(operation.path, {}) if based else {}
            own = kept if based else case.body.keys()
            case.body = {**right, **{k: v for k, v in case.body.items() if k in own}, **limits}
        given = case.as_transport_kwargs(base_url=BASE)
        request = {key: given[key] for key in GIVEN if given.get(key) is not None}
        answer = site.ask(content=given.get("data"), **request)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    attempt()
    return statuses


def fields_of(operation):
    """Names of the body's fields."""
    schemas = [body.definition.get("schema", {}) for body in operation.body]
    return {name for schema in schemas for name in schema.get("properties", {})}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_answer_is_one_that_the_page_tells_of(site, mode):
    page = schemathesis.openapi.from_dict(site.app.openapi())
    found, failures = {}, {}
    for result in page.get_all_operations():
        operation = result.ok()
        try:
            found[operation.label] = try_out(site, operation, mode, NUM_CASES)
        except Unsatisfiable:  # nothing can be wrong with a request that has no fields
            assert mode is not MODES[0], operation.label
        except (Exception, FailureGroup) as failure:
            failures[operation.label] = str(failure)
    assert not failures
    if mode is MODES[0]:
        answered = {label for label, statuses in found.items() if 200 in statuses}
        assert answered >= found.keys() - BY_CHANCE


def test_every_refusal_is_told_of(site):
    """What the page must hold for the test above to mean anything."""
    page = site.app.openapi()
    for path, operations in page["paths"].items():
        for operation in operations.values():
            assert {"200", "400", "500"} <= operation["responses"].keys(), path
