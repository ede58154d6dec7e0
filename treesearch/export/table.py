"""The tree as a table: one row a node."""

from __future__ import annotations

import csv
import math
import os

from treesearch.core.tree import Tree
from treesearch.runs.files import replacing

COLUMNS = ("node", "parent", "t", "visits", "value", "reward", "log_w", "key")


def write_csv(tree: Tree, path: str | os.PathLike[str]) -> None:
    """Write the nodes in order of creation; keys are hexadecimal, NaN is an empty field, floats read back exactly."""
    columns = [getattr(tree, name).tolist() for name in COLUMNS[1:-1]]
    with replacing(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for node, (key, *values) in enumerate(zip(tree.key.tolist(), *columns, strict=True)):
            table.writerow([node, *("" if math.isnan(v) else v for v in values), f"{key:016x}"])
