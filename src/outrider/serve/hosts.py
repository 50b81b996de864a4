"""Hosts: by which names a server lets itself be called, so that no web page can borrow it."""

import ipaddress
from collections.abc import Iterable

ANY = "*"


class Hosts:
    """Looks at the Host header.

    A page of another site can have its own name resolve to 127.0.0.1 and is then, for the
    browser, of the same origin as a server there (DNS rebinding); neither CORS nor a firewall
    sees it. The name that it was loaded by is still in the Host header.

    Args:
        allowed: names and addresses besides those of this machine; `.example.org` stands for all
            names below it, `*` for any.
        is_loopback: whether only this machine can reach the server. One that others can reach is
            called by names that we do not know, and is guarded by keys: there an empty `allowed`
            lets in any.
    """

    def __init__(self, allowed: Iterable[str], *, is_loopback: bool) -> None:
        self._names = frozenset(name.lower() for name in allowed)
        self._is_any = ANY in self._names or (not self._names and not is_loopback)

    def allows(self, header: str) -> bool:
        """Whether a request with this Host header is let in; browsers always send one."""
        if self._is_any or not header:
            return True
        name = _without_port(header.lower()).removesuffix(".")
        return name in self._names or _is_here(name) or self._is_below(name)

    def _is_below(self, name: str) -> bool:
        return any(known[:1] == "." and name.endswith(known) for known in self._names)


def _without_port(host: str) -> str:
    """`[::1]:80` gives `::1`, `a.b:80` gives `a.b`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_here(name: str) -> bool:
    """Whether the name means this machine wherever it is looked up."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
