"""The tables of `experiments.observations.restore`: what each sampler reached, and whether its draws are calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.observations.calibration import LEVEL, PIXELS, coverage
from experiments.observations.samplers import ENOUGH, SAMPLERS
from experiments.shared.cells import Row
from experiments.shared.stats import mean_se
from treesearch.report.tables import DASH, markdown_table

FIRST = "fk steered"
FIFTHS = 5
FEW = 2.0  # ESS below which weights are those of one draw
WORDS = (
    "Samples are those that {work:,} NFE + 2 · backward passes pay for, T = {steps}; of published rules, whose "
    "draws are independent, at most {enough}. Pilots (64 rollouts, 256 where correlated), once for all y, are not "
    "counted. ESS and roots (draws of "
    "x_T that carry weight at the end): medians, and the least, over truths. log Ẑ: mean difference to {first} on "
    "the same observation; Ẑ is unbiased, so that a low one has missed what it should have found. PSNR: of the "
    "mean of the draws, ± standard error over truths, 3 to 5 of them: samplers saw other truths where their numbers "
    "differ, so that only log Ẑ is paired. Misfit: root mean square of (y - A x)/tolerance over draws, "
    "1 of the truth. Levels: medians of the ESS before each resampling decision, from x_(T-1) to x_0."
)
JUDGED = (
    "Truths are draws of the model's own chain, so that ranks of a posterior are uniform whatever y is. Coverage: "
    "share of central {level:.0%} intervals of 16 pixels, and of ten logits of a classifier that no search sees, "
    "which hold the truth, with its 95 % interval over truths. Ranks: shares by fifths, each .20 if uniform. Only "
    "where the ESS says that there are draws can they be calibrated: the last column is the median ESS."
)


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no rows: run the experiment first")
    problems = list(dict.fromkeys((row["task"], row["tolerance"]) for row in rows))
    words = WORDS.format(
        work=max(r["work"] for r in rows), steps=rows[0]["num_steps"], enough=ENOUGH, first=SAMPLERS[FIRST].title
    )
    parts = [f"# Restoration of digits\n\n{words}"]
    for task, tolerance in problems:
        here = [row for row in rows if (row["task"], row["tolerance"]) == (task, tolerance)]
        parts.append(f"## {task}, tolerance {tolerance:g}\n\n{problem(here)}\n\n{advice(here)}")
    parts.append(f"## Calibration\n\n{JUDGED.format(level=LEVEL)}")
    for task, tolerance in problems:
        here = [row for row in rows if (row["task"], row["tolerance"]) == (task, tolerance) and "ranks" in row]
        parts.append(f"### {task}, tolerance {tolerance:g}: ranks\n\n{calibrated(here)}")
    return "\n\n".join(parts) + "\n"


def problem(rows: Sequence[Row]) -> str:
    """One table of figures."""
    columns: dict[str, Callable[[list[Row]], str]] = {
        "samples": lambda of: str(of[0]["samples"]),
        "ESS": lambda of: middle(of, "ess"),
        "roots": lambda of: middle(of, "roots"),
        "log Ẑ": lambda of: behind(of, rows),
        "PSNR, model": lambda of: mean([r["psnr"] for r in of if r["truth"] == "model"]),
        "PSNR, test digits": lambda of: mean([r["psnr"] for r in of if r["truth"] != "model"]),
        "misfit": lambda of: mean([r["misfit"] for r in of]),
        "levels": lambda of: levels(of),
        "seconds": lambda of: f"{np.mean([r['seconds'] for r in of]):.0f}",
    }
    body = [[SAMPLERS[name].title, *(cell(of) for cell in columns.values())] for name, of in by_sampler(rows)]
    return markdown_table(body, ("sampler", *columns))


def advice(rows: Sequence[Row]) -> str:
    """What the ESS leaves to say of a problem."""
    exact = [(name, [r for r in of if "ess" in r]) for name, of in by_sampler(rows)]
    middles = [
        (np.median([r["roots"] for r in of]), np.median([r["ess"] for r in of]), name) for name, of in exact if of
    ]
    if not middles:
        return "No sampler with weights was run."
    if max(ess for _, ess, _ in middles) < FEW:
        return (
            f"No sampler with weights has an ESS of {FEW:g}: each run ends with one draw, its weights say nothing of a "
            "spread, and log Ẑ is a lower bound as a rule. Draws of a published rule are the better pictures here, and "
            "no posterior; a larger tolerance or more particles is what weights need."
        )
    roots, ess, name = max(middles)
    return (
        f"Most roots: {SAMPLERS[name].title}, {roots:.3g} at an ESS of {ess:.3g} in the median. An ESS at the end "
        "counts what differs since the last resampling; where one root is left, draws are variations of one another."
    )


def calibrated(rows: Sequence[Row]) -> str:
    """Coverage and ranks by sampler."""
    body = []
    for name, of in by_sampler(rows):
        ranks = np.array([row["ranks"] for row in of])
        shares = np.histogram(ranks, FIFTHS, (0, 1))[0] / ranks.size
        found = (coverage(part.tolist()) for part in (ranks[:, :PIXELS], ranks[:, PIXELS:]))
        said = [
            DASH if of is None else f"{of.mean:.2f} ({max(of.low, 0):.2f} to {min(of.high, 1):.2f})" for of in found
        ]
        body.append(
            [SAMPLERS[name].title, str(len(of)), *said, " ".join(f"{share:.2f}" for share in shares), middle(of, "ess")]
        )
    return markdown_table(body, ("sampler", "truths", "pixels", "logits", "ranks", "ESS"))


def by_sampler(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of each sampler, in order."""
    return [(name, of) for name in SAMPLERS if (of := [row for row in rows if row["sampler"] == name])]


def middle(rows: Sequence[Row], what: str) -> str:
    """Median and least."""
    values = [row[what] for row in rows if row.get(what) is not None]
    return f"{np.median(values):.3g} ({min(values):.3g})" if values else DASH


def levels(rows: Sequence[Row]) -> str:
    """Median ESS by level."""
    every = [row["ess_levels"] for row in rows if row.get("ess_levels")]
    return " ".join(f"{value:.0f}" for value in np.median(every, 0)) if every else DASH


def behind(rows: Sequence[Row], every: Sequence[Row]) -> str:
    """Difference of log Ẑ to the first sampler's."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["truth"], row["seed"]

    first = {key(row): row["log_z"] for row in every if row["sampler"] == FIRST}
    gaps = [row["log_z"] - first[key(row)] for row in rows if row.get("log_z") is not None and key(row) in first]
    return mean(gaps) if gaps else DASH


def mean(values: Sequence[float]) -> str:
    """With its standard error."""
    return mean_se(values).text() if values else DASH
