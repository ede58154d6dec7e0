"""Looking at a run folder: what became of it, and the waves that it holds. Nothing in it changes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from treesearch.errors import StoreError
from treesearch.runs.checks import check_blocks
from treesearch.runs.lock import held
from treesearch.runs.log import MAGIC, Block, read_blocks

log = logging.getLogger("treesearch")


def status(path: str | os.PathLike[str], config: dict[str, Any]) -> str:
    """A run's status; one that says it is running while nobody holds its lock was killed."""
    if config["status"] != "running":
        return config["status"]
    return {True: "running", False: "killed", None: "running or killed"}[held(Path(path))]


def read_log(path: Path, config: dict[str, Any]) -> tuple[list[Block], int]:
    """The whole blocks of a run's tree.bin, checked against its run.json, and where they end.

    Raises:
        StoreError: the log is damaged before its last block, belongs to another run, or holds what no search writes.
    """
    waves, blocks, end = config.get("waves", 0), [], len(MAGIC)
    try:
        for block, end in read_blocks(path, waves):  # noqa: B007 - the last end is used
            blocks.append(block)
        check_blocks(path, config, blocks)
    except MemoryError as error:
        raise StoreError(f"{path}/tree.bin does not fit into memory") from error
    if len(blocks) < waves:
        log.warning(
            "%s is damaged: tree.bin ends after %d waves (byte %d) of at least %d; the others are lost, `resume` does "
            "their work again",
            path, len(blocks), end, waves,
        )  # fmt: skip
    return blocks, end
