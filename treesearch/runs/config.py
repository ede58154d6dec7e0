"""run.json: what it must look like, written as it will be read again."""

from __future__ import annotations

import json
import os
import reprlib
import secrets
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from treesearch.backends.base import STEPS
from treesearch.budget import Budget
from treesearch.errors import StoreError
from treesearch.runs import files, schema
from treesearch.runs.identity import DECIDES
from treesearch.runs.log import COST, FORMAT, TASKS
from treesearch.runs.schema import flag, maybe, number, one_of, plain, record, several, text, whole

_CONFIG_BYTES, _STATE_BYTES = 2**26, 2**40
_APART = ("status", "sum")  # not in the checksum; a status is one of few words, which no flipped bit makes
CONFIG = record(
    DECIDES
    | {
        "format": whole(),
        "id": text(64),
        "created": text(64),
        "status": one_of("running", "finished", "interrupted", "stopped"),
        "deterministic": several(whole(0, STEPS), 0, STEPS + 1),
        "previews": flag,
        "pilot": record(
            {
                "rollouts": whole(),
                "target": number(0.0, 1.0),
                "lam": maybe(number()),
                "kl": maybe(number()),
                "cost": COST,
            }
        ),
        "options": record(
            {"batch_size": whole(1), "keep_states": one_of("all", "frontier", "none"), "batch_invariant": flag},
            rest=plain(4),
        ),
        "versions": record({"treesearch": text(200)}, rest=text(200)),
        "sum": whole(0, 2**32 - 1),  # CRC-32, see `stamped`
    },
    {
        "departs": text(),
        "base_law": text(),
        "valued": flag,
        "measured": record({"nfe": whole()}),
        "closed": text(64),
        "out_of_time": flag,
        "ended": several(text(20), 1, TASKS),  # why each task's search stopped
        "draft_times": several(number(0.0, 1.0), 2, STEPS + 1),  # by which drafts space their levels
        "draft_ratio": number(0.0),  # what an evaluation of a draft was charged, in evaluations of the kernel
        "memory": whole(),
        "remarks": several(several(text(), 0, 1000), 1, TASKS),
        "waves": whole(),  # at least so many are in tree.bin
    },
    rest=plain(16),
)


def document(config: dict[str, Any]) -> dict[str, Any]:
    """A new run's run.json, as it will be read again.

    Raises:
        StoreError: it could not be.
    """
    config = {"format": FORMAT, "id": secrets.token_hex(8), "created": now(), "status": "running", "waves": 0} | config
    try:
        written = json.dumps(config)
        config = stamped(schema.parse(written.encode(), "run.json"))
        CONFIG(config, "run.json")
        if len(written) > _CONFIG_BYTES // 2:
            raise ValueError(f"it would have {len(written)} bytes: split the prompts over several runs")
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"run.json cannot hold this search: {error}; prompts must be strings or plain data") from error
    return config


def stamped(config: dict[str, Any]) -> dict[str, Any]:
    """run.json with the checksum of all that it says, but for its status."""
    told = {name: value for name, value in config.items() if name not in _APART}
    return config | {"sum": zlib.crc32(json.dumps(told).encode())}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """run.json of a folder, checked.

    Raises:
        StoreError: there is none, it is damaged, or another version of the format wrote it.
    """
    file = Path(path) / "run.json"
    try:
        with files.reading(file, _CONFIG_BYTES) as opened:
            config = schema.parse(opened.read(), os.fspath(file))
    except FileNotFoundError as error:
        raise StoreError(f"{path} holds no run: there is no run.json in it") from error
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error
    except schema.Invalid as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{file} cannot be read: it is no JSON object")
    _check_format(path, config)
    try:
        CONFIG(config, "run.json")
        Budget(**config["budget"])
        size = np.dtype("u8").itemsize
        for length in config["state_shape"]:
            size *= length
        if size > _STATE_BYTES:
            raise schema.refused(config["state_shape"], "run.json.state_shape", f"states of up to {_STATE_BYTES} bytes")
        if stamped(config)["sum"] != config["sum"]:
            raise schema.Invalid("it does not match its checksum")
    except ValueError as error:
        raise StoreError(
            f"{file}: {error}: it is damaged, edited or of another version: put back the file as it was written"
        ) from error
    return config


def _check_format(path: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Raises:
    StoreError: another format; which version can read it.
    """
    if (found := config.get("format")) == FORMAT:
        return
    versions = config.get("versions")
    by = versions.get("treesearch") if isinstance(versions, dict) else None
    wrote = f" (treesearch {by[:40]})" if isinstance(by, str) else ""
    raise StoreError(
        f"{path} has format {reprlib.repr(found)}{wrote}, this version reads format {FORMAT}: use the version that "
        "wrote it"
    )


def now() -> str:
    """The time, as run.json has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
