"""A JSON schema as what is written in any record of it, and the fields between.

    {"name": ____, "born": {"place": ____}}

Objects of named properties, however deep, with strings, numbers, booleans, enumerations and constants in them, and
what is one of these or null. What has no fixed place in a text (lists, other alternatives, references, further
properties) has no scaffold. A field holds whatever is written in it: neither its kind nor its choices are enforced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

KINDS = ("string", "number", "integer", "boolean")
DEEPEST = 16
ALTERNATIVES = ("anyOf", "oneOf", "allOf", "not", "if", "$ref", "$dynamicRef", "$recursiveRef")
KIND_OF = {bool: "boolean", int: "integer", float: "number", str: "string"}


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


class Fixed(NamedTuple):
    """A value that stands in every record.

    Args:
        path: as of a field.
        value: of JSON.
    """

    path: tuple[str, ...]
    value: Any


def layout(schema: Mapping[str, Any]) -> list[Field | Fixed]:
    """Values of a record, in the order of the text."""
    return [piece for piece in _object(schema, ()) if not isinstance(piece, str)]


def pieces(schema: Mapping[str, Any]) -> list[str | Field]:
    """Texts and fields of a record, in turn, a text first and last.

    Raises:
        ValueError: no object, one without properties, one that contradicts itself, or what has no fixed place.
    """
    found: list[str | Field] = []
    for piece in _object(schema, ()):
        if isinstance(piece, Fixed):
            piece = json.dumps(piece.value, ensure_ascii=False)
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def record(places: Sequence[Field | Fixed], texts: Sequence[str | None]) -> dict[str, Any]:
    """A record of what was written in its fields, None where nothing was, and of what stands in every record."""
    made: dict[str, Any] = {}
    written = iter(texts)
    for place in places:
        inner = made
        for name in place.path[:-1]:
            inner = inner.setdefault(name, {})
        inner[place.path[-1]] = place.value if isinstance(place, Fixed) else _value(place, next(written))
    return made


def _value(field: Field, text: str | None) -> Any:
    """A text as its field's kind; a text that is of another stays a text, which no schema takes for one."""
    if field.quoted or text is None:
        return text
    try:
        value = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text
    nothing = isinstance(value, float) and not math.isfinite(value)  # 1e999
    return text if nothing or isinstance(value, (dict, list)) else value


def _object(schema: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str | Field | Fixed]:
    named = ".".join(path) or "the schema"
    _refuse_alternatives(schema, named)
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


def _property(schema: Any, path: tuple[str, ...]) -> Iterator[str | Field | Fixed]:
    named = ".".join(path)
    if not isinstance(schema, Mapping):
        raise ValueError(f"{named} is {schema!r}, expected a schema")
    schema = _present(schema)
    if "const" in schema:
        yield Fixed(path, schema["const"])
        return
    _refuse_alternatives(schema, named)
    kind = _kind(schema, named)
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


def _present(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a value is where it is there: of alternatives the only one that is not null, with what is said beside."""
    for key in ("anyOf", "oneOf"):
        listed = schema.get(key)
        others = [one for one in listed if one != {"type": "null"}] if isinstance(listed, Sequence) else []
        if len(others) == 1 and isinstance(others[0], Mapping) and not {"const", *schema} & set(others[0]):
            return {k: v for k, v in schema.items() if k != key} | dict(others[0])
    return schema


def _kind(schema: Mapping[str, Any], named: str) -> str:
    """The kind of a property: what it says, or what its values, its properties or its items are of.

    Raises:
        ValueError: several.
    """
    said = schema.get("type")
    kinds = [said] if isinstance(said, str) else [*(said or ())]
    if said is None and "enum" in schema:
        kinds = [*dict.fromkeys("null" if v is None else KIND_OF.get(type(v), "array") for v in schema["enum"])]
        kinds = ["number"] if set(kinds) == {"integer", "number"} else kinds
    elif said is None:
        kinds = [kind for key, kind in (("properties", "object"), ("items", "array"), ("prefixItems", "array"))
                 if key in schema]  # fmt: skip
        kinds = kinds or ["string"]  # anything fits, a string too
    kinds = [kind for kind in kinds if kind != "null"] or (["null"] if kinds else ["string"])
    if len(kinds) > 1:
        raise ValueError(f"{named} may be {' or '.join(kinds)}, and a scaffold has one place for it: give one type")
    return kinds[0]


def _refuse_alternatives(schema: Mapping[str, Any], named: str) -> None:
    if found := next((key for key in ALTERNATIVES if key in schema), None):
        raise ValueError(f"{named} has {found}: alternatives and references have no fixed place in a text, write out "
                         "what is wanted")  # fmt: skip


def _refuse_contradiction(schema: Mapping[str, Any], named: str) -> None:
    for low, high in (("minimum", "maximum"), ("minLength", "maxLength")):
        if low in schema and high in schema and schema[low] > schema[high]:
            raise ValueError(f"{named} contradicts itself: {low} is {schema[low]}, {high} is {schema[high]}")
