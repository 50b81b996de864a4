"""Hosts: a server on this machine answers to this machine's names, whatever DNS says."""

import pytest

from outrider.errors import ConfigError
from outrider.serve.config import ServeConfig
from outrider.serve.hosts import Hosts
from tests.serve.test_app import Socket

HERE = ["localhost", "LocalHost:8000", "app.localhost:1", "127.0.0.1:8000", "127.9.9.9", "[::1]:80"]
ELSEWHERE = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
    "192.168.1.5:8000", "notlocalhost", "[2001:db8::1]:80", "localhost@evil.example", "0.0.0.0",
]  # fmt: skip


@pytest.mark.parametrize("name", [*HERE, "localhost.", ""])
def test_this_machine_may_be_called_by_its_names(name):
    assert Hosts((), is_loopback=True).allows(name)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_other_name_may(name):
    assert not Hosts((), is_loopback=True).allows(name)
    assert not Hosts(["other.example"], is_loopback=False).allows(name)
    assert Hosts((), is_loopback=False).allows(name), "others reach it by names of their own"
    assert Hosts(["*"], is_loopback=True).allows(name)


@pytest.mark.parametrize(
    ("allowed", "name", "is_allowed"),
    [
        ("llm.example.org", "LLM.example.org:443", True),
        ("llm.example.org", "a.llm.example.org", False),
        (".example.org", "a.b.example.org", True),
        (".example.org", "example.org", False),
        (".example.org", "evilexample.org", False),
        ("192.168.1.5", "192.168.1.5:8000", True),
    ],
)
def test_names_that_the_operator_gives(allowed, name, is_allowed):
    for is_loopback in (False, True):
        assert Hosts([allowed], is_loopback=is_loopback).allows(name) == is_allowed


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics", "/nothing"])
async def test_a_page_elsewhere_learns_nothing(client, path):
    response = await client.get(path, headers={"Host": "evil.example"})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"
    assert "--allowed-host" in response.json()["error"]["message"]
    assert "x-request-id" in response.headers


async def test_a_body_for_another_host_is_not_read(client):
    socket = Socket(client.app, "POST", "/v1/completions", [("host", "evil.example")], [b"x"] * 9)
    await socket.talk()
    assert socket.status == 403


async def test_an_operator_may_allow_it(serve):
    client = await serve(allowed_hosts=("proxy.example",))
    for host, status in (("proxy.example", 200), ("evil.example", 403), ("localhost", 200)):
        assert (await client.get("/health", headers={"Host": host})).status_code == status


@pytest.mark.parametrize("name", ["", "https://a.example", "a.example:80", "a b", "[::1]"])
def test_hosts_are_names_alone(name):
    with pytest.raises(ConfigError, match="allowed_hosts"):
        ServeConfig(allowed_hosts=(name,))
