"""Structured outputs: what a body asks the answer to match, as a constraint of `SamplingParams`."""

import json
from collections.abc import Mapping, Sequence as Items
from typing import Any, NamedTuple

from outrider.errors import RequestError, unknown

JSON_OBJECT = "json_object"
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
KINDS = ("text", "json_object", "json_schema")
TYPES: Mapping[str, tuple[type, ...]] = {  # in the order of the arguments of `guided`
    "json": (str, dict),
    "regex": (str,),
    "choice": (list,),
    "grammar": (str,),
}


class Constraint(NamedTuple):
    """One field of `SamplingParams`, its value, and the name that the client knows it by."""

    kind: str
    value: str | Mapping[str, Any]
    asked_as: str


def response_format(
    given: Mapping[str, Any] | None, name: str = "response_format"
) -> list[Constraint]:
    """Of OpenAI's `response_format`; [] for text.

    A schema is enforced whether `strict` is said or not.

    Raises:
        RequestError: it is none of text, json_object, json_schema, or has no schema.
    """
    if given is None:
        return []
    kind = given.get("type")
    if kind not in KINDS:
        raise RequestError(f"{name}: type={kind!r} must be one of {', '.join(KINDS)}")
    if kind == "text":
        return []
    if kind == "json_object":
        return [Constraint("json_schema", ANY_OBJECT, name)]
    about = given.get("json_schema")
    schema = about.get("schema") if isinstance(about, Mapping) else None
    if not isinstance(schema, Mapping):
        raise RequestError(f"{name}: json_schema.schema must be a JSON schema")
    return [Constraint("json_schema", _checked(schema, name), name)]


def guided(
    schema: str | Mapping[str, Any] | None,
    regex: str | None,
    choice: Items[str] | None,
    grammar: str | None,
) -> list[Constraint]:
    """Of vLLM's `guided_json`, `guided_regex`, `guided_choice` and `guided_grammar`."""
    found = []
    if schema is not None:
        found.append(Constraint("json_schema", _checked(schema, "guided_json"), "guided_json"))
    if regex is not None:
        found.append(Constraint("regex", regex, "guided_regex"))
    if choice is not None:
        found.append(Constraint("grammar", one_of(choice, "guided_choice"), "guided_choice"))
    if grammar is not None:
        found.append(Constraint("grammar", grammar, "guided_grammar"))
    return found


def structured_outputs(given: Mapping[str, Any]) -> list[Constraint]:
    """Of vLLM's `structured_outputs`: json, regex, choice, grammar or json_object."""
    known = (*TYPES, JSON_OBJECT)
    for key in given:
        if key not in known:
            raise RequestError(unknown("structured_outputs key", str(key), known))
    asked = {key: value for key, value in given.items() if value is not None}
    is_any_object = asked.pop(JSON_OBJECT, False)
    if not isinstance(is_any_object, bool):
        raise RequestError(f"structured_outputs.json_object={is_any_object!r}: must be true")
    any_object = Constraint("json_schema", ANY_OBJECT, f"structured_outputs.{JSON_OBJECT}")
    return [any_object, *_asked(asked)] if is_any_object else _asked(asked)


def the_one(constraints: Items[Constraint]) -> dict[str, Any]:
    """As keyword arguments of `SamplingParams`; RequestError for more than one."""
    if len(constraints) > 1:
        names = " and ".join(constraint.asked_as for constraint in constraints)
        raise RequestError(f"{names}: the answer can match one of them only; drop the rest")
    return {constraint.kind: constraint.value for constraint in constraints}


def one_of(texts: Items[str], name: str) -> str:
    """A grammar that is just these texts."""
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"{name}={texts!r}: must be a list of texts, none of them empty")
    return "root ::= " + " | ".join(json.dumps(text) for text in texts)


def _asked(asked: Mapping[str, Any]) -> list[Constraint]:
    for key, value in asked.items():
        if not isinstance(value, TYPES[key]):
            raise RequestError(f"structured_outputs.{key}={value!r}: is of the wrong type")
    found = guided(*(asked.get(key) for key in TYPES))
    names = [f"structured_outputs.{key}" for key in TYPES if key in asked]
    return [c._replace(asked_as=name) for c, name in zip(found, names, strict=True)]


def _checked(schema: str | Mapping[str, Any], name: str) -> str | Mapping[str, Any]:
    """A schema as text must be JSON."""
    if isinstance(schema, str):
        try:
            json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{name}: is no JSON ({error})") from None
    return schema
