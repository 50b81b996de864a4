"""Whatever goes wrong, the client gets one envelope, and nothing of our insides."""

import pytest
from fastapi import APIRouter, FastAPI
from pydantic import Field

from outrider.errors import (
    ConfigError,
    EngineError,
    PairError,
    RequestError,
    SessionStorageError,
    TokenizerError,
)
from outrider.serve import errors
from outrider.serve.base import Body, ServeConfig
from outrider.serve.door import Door
from outrider.serve.errors import ApiError, as_api_error
from outrider.stream.outbox import FellBehindError
from tests.serve.conftest import client_of

router = APIRouter()
RAISED = {
    "api": ApiError(429, "later", code="queue_full", headers={"Retry-After": "7"}),
    "request": RequestError("temperature=-1: must be at least 0"),
    "pair": PairError("the draft model does not fit"),
    "config": ConfigError("unknown verifier 'smapled'"),
    "tokenizer": TokenizerError("there is no chat template"),
    "engine": EngineError("the engine was closed"),
    "storage": SessionStorageError("session log '/where/it/lies': database or disk is full"),
    "behind": FellBehindError(),
    "bug": KeyError("secret-of-ours"),
}


class Order(Body):
    """A body for these tests."""

    size: int = Field(ge=1)
    name: str = "x"


@router.get("/raise/{kind}")
async def raises(kind: str) -> None:
    raise RAISED[kind]


@router.get("/v1/messages/raise/{kind}")
async def raises_for_anthropic(kind: str) -> None:
    raise RAISED[kind]


@router.post("/orders")
async def order(body: Order) -> dict[str, int]:
    return {"size": body.size}


@pytest.fixture
async def client():
    app = FastAPI()
    errors.install(app)
    app.include_router(router)
    app.add_middleware(Door, config=ServeConfig(max_body_bytes=100))
    async with client_of(app) as client:
        yield client


@pytest.mark.parametrize(
    ("kind", "status", "type", "code", "param"),
    [
        ("api", 429, "rate_limit_error", "queue_full", None),
        ("request", 400, "invalid_request_error", None, "temperature"),
        ("pair", 400, "invalid_request_error", None, None),
        ("config", 400, "invalid_request_error", None, None),
        ("tokenizer", 400, "invalid_request_error", None, None),
        ("engine", 503, "server_error", "engine_failed", None),
        ("storage", 503, "server_error", "storage_failed", None),
        ("behind", 408, "invalid_request_error", "fell_behind", None),
        ("bug", 500, "server_error", "internal_error", None),
    ],
)
async def test_envelope(client, kind, status, type, code, param):
    response = await client.get(f"/raise/{kind}")
    assert response.status_code == status
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == (type, code, param)
    assert "secret" not in response.text
    assert "Traceback" not in response.text


async def test_headers_of_an_error_arrive(client):
    response = await client.get("/raise/api")
    assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("kind", "type"),
    [("api", "rate_limit_error"), ("request", "invalid_request_error"), ("bug", "api_error")],
)
async def test_envelope_of_anthropic(client, kind, type):
    body = (await client.get(f"/v1/messages/raise/{kind}")).json()
    assert body["type"] == "error"
    assert body["error"]["type"] == type
    assert set(body["error"]) == {"type", "message"}


async def test_what_we_did_not_foresee_is_logged(client, caplog):
    await client.get("/raise/bug")
    assert "secret-of-ours" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/orders", 405)]
)
async def test_routes_that_are_not_there(client, method, path, status):
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] in ("not_found_error", "invalid_request_error")
    assert status != 405 or response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        ('{"size": 0}', "size", "greater than or equal to 1"),
        ('{"size": "many"}', "size", "valid integer"),
        ("{}", "size", "required"),
        ('{"size": 1, "colour": 2}', "colour", "Unrecognized request argument supplied: colour"),
        ('{"size": ', None, "no JSON"),
        ("[]", None, "object"),
        ('"\\ud800"', None, "object"),
        ("", None, "required"),
    ],
)
async def test_wrong_bodies_are_400(client, content, param, words):
    headers = {"Content-Type": "application/json"}
    response = await client.post("/orders", content=content, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


async def test_bytes_that_are_no_text_are_400(client):
    headers = {"Content-Type": "application/json"}
    for content in (b"\xff\xfe", b'{"size": "\xc3"}', b"\x00"):
        response = await client.post("/orders", content=content, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_error_is_its_own_picture():
    error = ApiError(404, "no", code="gone")
    assert as_api_error(error) is error
    assert error.type == "not_found_error"


async def test_storage_that_fails_tells_no_path(client, caplog):
    response = await client.get("/raise/storage")
    assert response.headers["retry-after"] == "5"
    assert "/where" not in response.text
    assert "/where/it/lies" in caplog.text
