"""Maker: the model whose tokens a session holds, and whether another one may go on with them."""

import hashlib
import json
from typing import NamedTuple, Self

from outrider.errors import SessionConflict
from outrider.serve.base import Server
from outrider.serve.chat_template import template_of
from outrider.session.records import Session

SHOWN = 12  # characters of a digest, in messages


class Maker(NamedTuple):
    """A model, as far as its sessions depend on it.

    Attributes:
        model: what clients call it.
        words: of its tokenizer and chat template: what token ids mean, and where messages end.
        weights: another model of the same words may go on, without what these computed.
    """

    model: str
    words: str
    weights: str

    @classmethod
    def here(cls, server: Server) -> Self:
        """The one that is served."""
        digest = hashlib.sha256()
        if server.tokenizer is not None:
            digest.update(server.tokenizer.fingerprint().encode())
            digest.update(template_of(server.tokenizer).encode())
        weights = server.llm.engine.spec.fingerprint
        return cls(server.model_name, digest.hexdigest(), weights)

    @classmethod
    def of(cls, session: Session) -> Self | None:
        """Whoever made a session's last turn; None if that is not known."""
        try:
            return cls(**json.loads(session.fingerprint))
        except (ValueError, TypeError):
            return None

    def as_text(self) -> str:
        """What the log keeps."""
        return json.dumps(self._asdict())

    def speaks(self, session: Session) -> bool:
        """Whether the session's tokens mean the same to this model, as far as is known."""
        made = Maker.of(session)
        return made is None or made.words == self.words

    def check(self, session: Session) -> None:
        """SessionConflict if the session's tokens mean something else to this model."""
        made = Maker.of(session)
        if made is not None and not self.speaks(session):
            raise SessionConflict(
                f"session {session.id!r} was made with the tokenizer and chat template of "
                f"{made.model!r} ({made.words[:SHOWN]}), and this server has those of "
                f"{self.model!r} ({self.words[:SHOWN]}): start that model, or create a new session"
            )

    def difference(self, session: Session) -> str:
        """Why nothing that was computed for a session is of use; "" if that is not so."""
        made = Maker.of(session)
        if made is None or made.weights == self.weights:
            return ""
        return (
            f"weights were those of {made.model!r} ({_short(made.weights)}) and are those of "
            f"{self.model!r} ({_short(self.weights)})"
        )


def _short(digest: str) -> str:
    return digest[:SHOWN] or "made in memory"
