"""The page of a hunt: the heads that were chosen, beside other sets and whole layers, on pairs held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.shared.cells import Row
from experiments.shared.stats import bootstrap
from treesearch.report.tables import DASH, markdown_table

KEY = ("kernel", "reward", "prompts", "u", "scale", "heads", "seed", "n")
BED = ("kernel", "reward", "prompts", "u", "scale")
NOTES = {  # by what a kernel's words hold
    "mnist(": "One layer of three heads: whatever the hunt finds, few sets compete with it.",
    "tiny_sd3": "The SD3 transformer of the tests, with random weights: this shows the mechanics, not what heads do.",
}
F64 = NDArray[np.float64]


def page(rows: Sequence[Row]) -> str:
    """A part for each hunt.

    Raises:
        ValueError: no hunt has ended.
    """
    ended = [row for row in rows if row["heads"] == "chosen"]
    if not ended:
        raise ValueError("no hunt has ended: run the experiment first")
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    head = (
        "# Heads to go away from\n\n"
        "Heads chosen on pairs of prompt and seed by their mean reward, judged on other seeds: mean reward of the "
        "draws with bounds of 95 % by the bootstrap over pairs, which share their noise from set to set. A layer is "
        "chosen as the heads are. Others of that size are all there are, or so many drawn evenly; of them the mean.\n"
    )
    parts = [part([row for row in rows if _bed(row) == _bed(end)], end) for end in ended]
    return "\n".join([head, *parts, f"{seconds:,.0f} s = {seconds / 3600:.2f} h in all.\n"])


def part(rows: Sequence[Row], end: Row) -> str:
    """The table of one hunt."""
    held: dict[str, F64] = {
        row["heads"]: np.array(row["rewards"], float)
        for row in rows
        if row["heads"] != "chosen" and (row["seed"], row["n"]) == (end["seed"], end["n"])
    }
    chosen, plain = held[end["rounds"][-1]], held[""]
    random = np.stack([held[name] for name in end["random"]]) if end["random"] else None
    lines = [["none", DASH, told(plain), DASH]]
    for i, name in enumerate(end["rounds"], 1):
        lines.append([f"after round {i}", name, told(held[name]), told(held[name] - plain, sign=True)])
    if random is not None:
        lines.append(
            [f"{len(random)} others of that size", DASH, told(random.mean(0)), told(random.mean(0) - plain, sign=True)]
        )
        best = max(end["random"], key=lambda name: held[name].mean())
        lines.append(["the best of them, by these pairs", best, told(held[best]), told(held[best] - plain, sign=True)])
    for name in end["layers"]:
        what = "layer, chosen" if name == end["layer"] else "layer"
        lines.append([what, name, told(held[name]), told(held[name] - plain, sign=True)])
    paired = [["none", told(chosen - plain, sign=True)]]
    if random is not None:
        rank = int((chosen.mean() > random.mean(1)).sum())
        paired.append(
            [f"the others of that size (above {rank} of {len(random)})", told(chosen - random.mean(0), sign=True)]
        )
    paired.append(["the chosen layer", told(chosen - held[end["layer"]], sign=True)])
    prompts = f", prompts {', '.join(map(repr, end['prompts']))}" if end["prompts"] else ""
    note = "".join(f"{note}\n\n" for words, note in NOTES.items() if words in end["kernel"])
    how = (
        f"{end['of']} heads; u = {end['u']:g}, w = {end['scale']:g}, {len(end['rounds'])} rounds of {end['k']}, "
        f"{end['hunted']} draws a prompt in the hunt and {end['n']} held out{prompts}."
    )
    first = markdown_table(lines, ("away from", "heads", "mean reward", "less that of none"))
    second = markdown_table(paired, ("chosen heads less", "difference"))
    return f"## `{end['reward']}` on `{end['kernel']}`\n\n{note}{how}\n\n{first}\n\n{second}\n"


def told(values: F64, *, sign: bool = False) -> str:
    """A mean over pairs and its bounds."""
    found = bootstrap(values[None])
    form = "+.3g" if sign else ".4g"
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def _bed(row: Row) -> Any:
    return json.dumps([row[name] for name in BED])
