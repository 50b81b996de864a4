"""The exception tree.

OutriderError
├── ConfigError          a setting that cannot be honoured (also a ValueError)
│   └── PairError        target, drafter and verifier do not fit together
├── ModelError           a checkpoint that cannot be loaded (also a ValueError)
│   └── TokenizerError   no usable tokenizer, or the wrong one for this model
├── RequestError         a request that cannot be served as asked (also a ValueError)
└── EngineError          the engine stopped; the message says which requests were lost

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


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """The message for a name that is not there, with the nearest one that is."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(sorted(known)) or 'none'})"
