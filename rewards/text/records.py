"""Rewards of texts that are JSON: does it fit a schema, and is every value to be found in the source?

    json_schema(x) = 1 / (1 + violations of the schema), 0 where x is no JSON
    grounding(x)   = share of the values of x that are null or stand in the source, 0 where x is no JSON

A sample that begins with its prompt is read without it. The second tells hallucination, by substrings.

Source of the second: Unveiling the Potential of Diffusion Large Language Model in Controllable Generation (Xiong et
al., 2025), section 5, hallucination.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.text.texts import TEXTS, answers

NO_JSON = object()
LARGEST = 2**20  # bytes of a schema's file


@facts(range="0 to 1", differentiable=False, limits=TEXTS, source="jsonschema.org")
def json_schema(schema: Mapping[str, Any] | str) -> Reward:
    """r = 1 / (1 + violations) of a text that is JSON, 0 of any other: 1 is a text that fits.

    Args:
        schema: a JSON schema, or the file of one; references are followed inside it alone.

    Raises:
        ValueError: no schema, or one that every text fits.
        FileNotFoundError: no such file.
        ImportError: jsonschema is not installed.
    """
    rules = as_schema(schema)
    validator = validator_of(rules)

    def fn(samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        found = [_fit(validator, parsed(text)) for text in answers(samples, prompts)]
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    return Reward(fn, f"json_schema({rules.get('title', 'schema')})", settings=(json.dumps(rules, sort_keys=True),))


def as_schema(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    """A JSON schema as a dict, from a mapping or from a file.

    Raises:
        ValueError: no JSON object, or an empty one.
        FileNotFoundError: no such file.
    """
    if isinstance(schema, str):
        path = Path(schema)
        if schema.lstrip()[:1] in ("{", "["):
            raise ValueError("schema is JSON written out: give a dict, or the path of a file that holds it")
        if path.is_dir():
            raise ValueError(f"schema is the folder {schema!r}: give a dict, or the path of a file")
        if not path.is_file():
            raise FileNotFoundError(f"schema is {schema!r}, and there is no such file: give a dict, or the path of one")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{schema} has more than {LARGEST:,} bytes: that is no schema")
        try:
            schema = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise ValueError(f"a schema is {type(schema).__name__}, expected a JSON object")
    if not schema:
        raise ValueError("the schema is empty, which every text fits: say what is wanted, such as its properties")
    return dict(schema)


def validator_of(rules: Mapping[str, Any]) -> Any:
    """What counts violations of a schema; it fetches nothing.

    Raises:
        ValueError: no schema.
        ImportError: jsonschema is not installed.
    """
    try:
        from jsonschema import exceptions, validators
        from referencing import Registry
    except ImportError as error:
        raise ImportError("schemas need jsonschema: pip install 'treesearch[text]'") from error
    kind = validators.validator_for(rules, default=validators.Draft202012Validator)
    try:
        kind.check_schema(rules)
    except exceptions.SchemaError as error:
        raise ValueError(f"this is no JSON schema: {error.message} ({error.json_path})") from error
    return kind(rules, registry=Registry())


def parsed(text: str) -> Any:
    """The JSON value of a text, NO_JSON where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NO_JSON


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _fit(validator: Any, value: Any) -> float:
    return 0.0 if value is NO_JSON else 1 / (1 + sum(1 for _ in validator.iter_errors(value)))


@facts(range="0 to 1", differentiable=False, prompts=None, limits=f"{TEXTS}, and a source: the prompt, or `source`")
def grounding(source: str | None = None, *, absent: Sequence[str] = ("", "<none>", "null")) -> Reward:
    """r = share of the values of a JSON text that are null or parts of the source, whatever the case of letters.

    Args:
        source: where values must come from; None is each sample's prompt.
        absent: strings that say that there is no value.

    Raises:
        ValueError: later, neither a source nor prompts.
    """
    nothing = {word.casefold() for word in absent}

    def fn(samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        texts = answers(samples, prompts)
        if source is None and prompts is None:
            raise ValueError("grounding needs the source of each sample: give prompts, or source=")
        sources = [source] * len(texts) if source is not None else [str(prompt) for prompt in prompts or ()]
        found = [_grounded(parsed(t), s.casefold(), nothing) for t, s in zip(texts, sources, strict=True)]
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    return Reward(fn, "grounding")


def _grounded(value: Any, source: str, nothing: set[str]) -> float:
    if value is NO_JSON:
        return 0.0
    leaves = [leaf for leaf in _leaves(value) if leaf is not None]
    told = [leaf.strip().casefold() for leaf in leaves]
    stands = [leaf in nothing or leaf in source for leaf in told]
    return sum(stands) / len(stands) if stands else 1.0


def _leaves(value: Any) -> Iterator[str | None]:
    """Values inside of a JSON value as texts, None for null."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value if value is None or isinstance(value, str) else json.dumps(value)
