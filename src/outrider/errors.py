"""The exception tree.

OutriderError
├── ConfigError          a setting that cannot be honoured (also a ValueError)
│   └── PairError        target, drafter and verifier do not fit together
├── ModelError           a checkpoint that cannot be loaded (also a ValueError)
│   └── TokenizerError   no usable tokenizer, or the wrong one for this model
├── RequestError         a request that cannot be served as asked (also a ValueError)
├── EngineError          the engine stopped; the message says which requests were lost
└── SessionError         a session cannot do what was asked; nothing of the call was kept
    ├── SessionNotFound      no such session, head, response or turn, or it has expired
    ├── SessionConflict      somebody else went on from the same head
    ├── QuotaExceeded        a tenant may store no more
    └── SessionStorageError  the file of the session log cannot be read or written

Each message names the offending value and the remedy, on one line.
"""

import difflib
from collections.abc import Sequence


class OutriderError(Exception):
    """Root of everything outrider raises on purpose."""


class ConfigError(OutriderError, ValueError):
    """A setting that cannot be honoured; nothing was started."""


class PairError(ConfigError):
    """Target, drafter and verifier do not fit together."""


class ModelError(OutriderError, ValueError):
    """A checkpoint that cannot be found, read, or run."""


class TokenizerError(ModelError):
    """No usable tokenizer, or one that does not belong to the model."""


class RequestError(OutriderError, ValueError):
    """A request that cannot be served as asked; no other request is affected."""


class EngineError(OutriderError, RuntimeError):
    """The engine stopped; requests in flight are named in the message."""


class SessionError(OutriderError):
    """A session cannot do what was asked; nothing of the call was kept."""


class SessionNotFound(SessionError, LookupError):  # noqa: N818
    """No such session, head, response or turn; one of another tenant reads the same."""


class SessionConflict(SessionError):  # noqa: N818
    """What was asked no longer fits: the session has gone on, or the name is taken.

    Attributes:
        head: id of the session's present head; None where the head is not what conflicts.
    """

    def __init__(self, message: str, head: str | None = None) -> None:
        super().__init__(message)
        self.head = head


class QuotaExceeded(SessionError):  # noqa: N818
    """A tenant may store no more; the message names the limit."""


class SessionStorageError(SessionError):
    """The file of the session log cannot be read or written."""


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """The message for a name that is not there, with the nearest one that is."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(sorted(known)) or 'none'})"
