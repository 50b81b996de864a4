"""ServeConfig: where a server listens, whom it lets in, and how much it takes on."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from outrider.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of one server; each is an option of `outrider serve`.

    Attributes:
        host: address to listen on. port: 0 takes a free one.
        served_model_name: what clients call the model; None is the name it was loaded by.
        api_keys: key -> tenant; empty asks for no key, and everybody is the tenant "".
        allowed_origins: web pages of other origins that browsers let in (CORS); none by default.
        allowed_hosts: names by which clients may call the server, besides those of this machine;
            empty lets in any name where others can reach it (see `outrider.serve.hosts`).
        max_body_bytes: longest body of a request.
        max_concurrent: most requests in the engine at once.
        max_waiting: most requests that wait for a place; more are told to come back (429).
        request_timeout_s: most seconds from arrival to the last token, waiting included.
        write_timeout_s: seconds after which a client that takes nothing of its answer is dropped.
        drain_s: seconds that running requests may take to end when the server stops.
        state_dir: folder of sessions and their warm state; None keeps both in memory.
        max_session_tokens: most tokens that one tenant's sessions may hold; None is no limit.
        max_sessions: most sessions of one tenant, those of stored responses among them.
        allow_lossy: whether requests may ask for rules that change the output's law.
        allow_synthetic: whether they may ask for rules that make acceptance up, for benchmarks.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_keys: Mapping[str, str] = field(default_factory=dict)
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_waiting: int = 256
    max_concurrent: int = 64
    request_timeout_s: float = 600.0
    write_timeout_s: float = 30.0
    drain_s: float = 30.0
    state_dir: Path | None = None
    max_session_tokens: int | None = None
    max_sessions: int | None = None
    allow_lossy: bool = True
    allow_synthetic: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_body_bytes", 1), ("max_waiting", 0), ("max_concurrent", 1)):
            self._require(getattr(self, name) >= least, name, f"must be at least {least}")
        for name in ("request_timeout_s", "write_timeout_s"):
            self._require(getattr(self, name) > 0, name, "must be above 0")
        for name in ("max_session_tokens", "max_sessions"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "must be at least 1, or unset")
        self._require(self.drain_s >= 0, "drain_s", "must be at least 0")
        self._require(
            0 <= self.port < 1 << 16, "port", "must lie in [0, 65535]; 0 takes a free one"
        )
        self._require(
            all(_is_host(host) for host in self.allowed_hosts),
            "allowed_hosts",
            "name hosts alone, such as 'example.org', with neither https:// nor a port",
        )
        if not all(key and key.isascii() for key in self.api_keys):
            raise ConfigError("api_keys: a key is empty or not ASCII: use letters and digits")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_open(self) -> bool:
        """Whether anybody who reaches it from elsewhere may use it."""
        return not self.is_loopback and not self.api_keys

    def _require(self, holds: bool, name: str, remedy: str) -> None:
        if not holds:
            raise ConfigError(f"{name}={getattr(self, name)!r}: {remedy}")


def _is_host(text: str) -> bool:
    """Whether it could be a name or an address; an IPv6 address has at least two colons."""
    return bool(text) and not set(text) & set("/[] ") and text.count(":") != 1
