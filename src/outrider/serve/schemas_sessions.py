"""Bodies of /v1/sessions."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from outrider.engine.build import speculation_params
from outrider.errors import RequestError
from outrider.registry import POLICIES
from outrider.request import OFF
from outrider.serve.base import Body
from outrider.serve.schemas_responses import MAX_METADATA, Count, CreateResponse

OnConflict = Literal["error", "fork"]
METHOD, AUTO = "method", "auto"


def _place(value: Any) -> Any:
    if isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise PydanticCustomError("place", "give the id of a head, or a number of tokens")


def _input(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and value):
        return value
    raise PydanticCustomError("input", "give a text, or a list of items that is not empty")


Place = Annotated[str | Count, BeforeValidator(_place)]
Input = Annotated[str | list[dict[str, Any]], BeforeValidator(_input)]


class SessionBody(Body):
    """A body that takes each field as the JSON type it is of."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CreateSession(SessionBody):
    """Body of `POST /v1/sessions`."""

    model: str | None = None
    instructions: str | None = None
    token_ids: list[Count] | None = None
    from_snapshot: str | None = None
    ttl_s: Annotated[float, Field(gt=0)] | None = None
    detach: Literal["continue", "abort"] = "abort"
    conversation: str | None = None
    speculation: dict[str, Any] | str | None = None
    metadata: dict[str, str] = Field(default_factory=dict, max_length=MAX_METADATA)

    def check(self) -> None:
        """RequestError for what does not go together."""
        given = {
            "instructions": self.instructions,
            "token_ids": self.token_ids,
            "from_snapshot": self.from_snapshot,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            told = f"{named[0]}=...: goes with no {' nor '.join(named[1:])}"
            raise RequestError(f"{told}; a session begins with one of them")

    def settings(self) -> dict[str, Any]:
        """What the session keeps of the fields that were sent; None for one that asks for nothing.

        RequestError for what no turn could do.
        """
        settings = {
            "instructions": self.instructions,
            "detach": self.detach if self.detach != "abort" else None,
            "speculation": self._asked_speculation(),
            "metadata": self.metadata or None,
        }
        return {name: value for name, value in settings.items() if name in self.model_fields_set}

    def _asked_speculation(self) -> Mapping[str, Any] | None:
        """Keys of `SpeculationParams` for the turns that say nothing; None for the engine's own.

        A text, or `policy` where it names no policy, names the method; "auto" there leaves it to
        the engine.
        """
        if self.speculation is None:
            return None
        given = self.speculation
        keys = {"policy": given} if isinstance(given, str) else dict(given)
        for name, only in (("share", "session"), ("learn", True)):
            if keys.pop(name, only) != only:
                raise RequestError(f"speculation.{name}: only {only!r} is offered; leave it out")
        if "policy" in keys and not _is_policy(keys["policy"]):
            named = keys.pop("policy")
            keys |= {} if named == AUTO else {METHOD: named}
        speculation_params(keys)
        return keys or None


class SessionResponse(CreateResponse):
    """Body of `POST /v1/sessions/{id}/responses`: that of `/v1/responses`, in this session."""

    if_head: str | None = None
    on_conflict: OnConflict | None = None

    def asked(self, session: str) -> CreateResponse:
        """The same as a body of `/v1/responses`. RequestError where it names another place."""
        names = {
            "conversation": self.conversation,
            "previous_response_id": self.previous_response_id,
            "outrider.session": self.outrider.session,
        }
        for name, value in names.items():
            if value is not None:
                raise RequestError(f"{name}=...: the path names the session; leave it out")
        options = {"session": session, **self._conditions()}
        given = {name: getattr(self, name) for name in CreateResponse.model_fields}
        asked = CreateResponse.model_construct(self.model_fields_set & given.keys(), **given)
        return asked.model_copy(update={"outrider": self.outrider.model_copy(update=options)})

    def _conditions(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("if_head", "on_conflict"):
            value = getattr(self, name)
            if value is None:
                continue
            if name in self.outrider.model_fields_set:
                raise RequestError(f"{name}={value!r}: outrider.{name} says it too; give one")
            found[name] = value
        return found


class Conditional(SessionBody):
    """A change that may insist on the head it was made for."""

    if_head: str | None = None


class Append(Conditional):
    """Body of `POST /v1/sessions/{id}/append`."""

    input: Input | None = None
    token_ids: Annotated[list[Count], Field(min_length=1)] | None = None
    on_conflict: OnConflict = "error"
    prefill: Literal["lazy", "eager"] = "lazy"

    def check(self) -> None:
        """RequestError for both, and for none."""
        if (self.input is None) == (self.token_ids is None):
            raise RequestError("input=...: give input or token_ids, one of them")


class Fork(Conditional):
    """Body of `POST /v1/sessions/{id}/fork`."""

    at: Place | None = None
    n: Annotated[int, Field(ge=1, le=64)] = 1


class Rewind(Conditional):
    """Body of `POST /v1/sessions/{id}/rewind`."""

    to: Place
    drop: bool = False


class Truncate(Conditional):
    """Body of `POST /v1/sessions/{id}/truncate`: how much of an answer was taken in."""

    response_id: str | None = None
    chars: Count | None = None
    tokens: Count | None = None


class Hint(SessionBody):
    """Body of `POST /v1/sessions/{id}/hint`."""

    event: Literal["tool_wait", "resume_soon", "superseded", "idle", "final"]


class Snapshot(SessionBody):
    """Body of `POST /v1/sessions/{id}/snapshot`."""

    tier: Literal["host", "disk"] | None = None
    include: Annotated[list[Literal["kv", "spec", "stats"]], Field(min_length=1)] | None = None


def _is_policy(name: object) -> bool:
    """Whether it says who decides how far to draft; "off" does as the method does."""
    return name != OFF and name in POLICIES.names()
