"""A JSON schema as what is written in any record of it, and the fields between.

    {"name": ____, "born": {"place": ____}}

Objects of named properties, however deep, with strings, numbers, booleans and enumerations in them. What has no fixed
place in a text (lists, alternatives, further properties) has no scaffold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

KINDS = ("string", "number", "integer", "boolean")
DEEPEST = 16


class Field(NamedTuple):
    """A value that is to be written.

    Args:
        path: names of the objects that it is in, and its own.
        kind: of JSON.
        choices: values that it may have, None for any.
    """

    path: tuple[str, ...]
    kind: str
    choices: tuple[Any, ...] | None = None

    @property
    def quoted(self) -> bool:
        return self.kind == "string"


def pieces(schema: Mapping[str, Any]) -> list[str | Field]:
    """Texts and fields of a record, in turn, a text first and last.

    Raises:
        ValueError: no object, one without properties, one that contradicts itself, or what has no fixed place.
    """
    found: list[str | Field] = []
    for piece in _object(schema, ()):
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def record(fields: list[Field], texts: list[str | None]) -> dict[str, Any]:
    """A record of what was written in its fields, None where nothing was."""
    made: dict[str, Any] = {}
    for field, text in zip(fields, texts, strict=True):
        inner = made
        for name in field.path[:-1]:
            inner = inner.setdefault(name, {})
        inner[field.path[-1]] = None if text is None else _value(field, text)
    return made


def _value(field: Field, text: str) -> Any:
    """A text as its field's kind; a text that is of another stays a text, which no schema takes for one."""
    if field.quoted:
        return text
    try:
        value = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, (dict, list)) else value


def _object(schema: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str | Field]:
    named = ".".join(path) or "the schema"
    if len(path) > DEEPEST:
        raise ValueError(f"{named} lies {len(path)} objects deep, at most {DEEPEST}")
    properties = schema.get("properties")
    if schema.get("type", "object") != "object" or not isinstance(properties, Mapping) or not properties:
        raise ValueError(f"{named} names no properties: a scaffold is of an object with properties, such as "
                         '{"type": "object", "properties": {"name": {"type": "string"}}}')  # fmt: skip
    if missing := sorted(set(schema.get("required", ())) - set(properties)):
        raise ValueError(f"{named} contradicts itself: it requires {missing[0]!r}, which is none of its properties")
    yield "{"
    for i, (name, inner) in enumerate(properties.items()):
        yield f"{', ' if i else ''}{json.dumps(name, ensure_ascii=False)}: "
        yield from _property(inner, (*path, name))
    yield "}"


def _property(schema: Any, path: tuple[str, ...]) -> Iterator[str | Field]:
    named = ".".join(path)
    if not isinstance(schema, Mapping):
        raise ValueError(f"{named} is {schema!r}, expected a schema")
    if "const" in schema:
        yield json.dumps(schema["const"], ensure_ascii=False)
        return
    kinds = schema.get("type", "string")
    kind = next((k for k in kinds if k != "null"), "null") if isinstance(kinds, list) else kinds
    if kind == "object":
        yield from _object(schema, path)
        return
    if kind not in KINDS:
        raise ValueError(f"{named} is of type {kind!r}, which has no fixed place in a text: a scaffold holds objects "
                         f"and {', '.join(KINDS)}")  # fmt: skip
    choices = schema.get("enum")
    if choices is not None and not choices:
        raise ValueError(f"{named} contradicts itself: it may have none of no values")
    _refuse_contradiction(schema, named)
    field = Field(path, kind, None if choices is None else tuple(choices))
    yield from ('"', field, '"') if field.quoted else (field,)


def _refuse_contradiction(schema: Mapping[str, Any], named: str) -> None:
    for low, high in (("minimum", "maximum"), ("minLength", "maxLength")):
        if low in schema and high in schema and schema[low] > schema[high]:
            raise ValueError(f"{named} contradicts itself: {low} is {schema[low]}, {high} is {schema[high]}")
