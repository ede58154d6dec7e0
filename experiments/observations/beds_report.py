"""The page of the exact beds, from the rows of their three scripts: `make observations`.

python -m experiments.observations.beds_report --rows experiments/results/observations --out PAGE
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.coverage.evidence import outcomes, wilson
from experiments.observations import elucd, evidence, posteriors
from experiments.observations.beds import BEDS
from experiments.shared.cells import Cells, Row
from experiments.shared.stats import over_seeds
from treesearch.errors import TreeSearchError
from treesearch.report.tables import DASH, markdown_table
from treesearch.runs.files import write_text

MOST = 0.1  # of |bias| that is asked
SHARE = (0.9, 0.99)  # of intervals that hold log Z
FEWEST = 3  # values of an interval
RESAMPLES = 4_000
DIVERGED = 1_000.0  # nats: guides that overshoot run away


class Mean(NamedTuple):
    """A mean and Student's 95 % bounds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        x = np.asarray(list(values), float)
        if len(x) < FEWEST or not np.isfinite(x).all():
            return cls(float(x.mean()) if len(x) else float("nan"), float("nan"), float("nan"))
        return cls(*over_seeds(x))

    def __str__(self) -> str:
        bounds = f" ({self.low:.3f} to {self.high:.3f})" if np.isfinite(self.low) else ""
        return f"{self.mean:.3f}{bounds}"

    @property
    def signed(self) -> str:
        """With its sign."""
        bounds = f" ({self.low:+.3f} to {self.high:+.3f})" if np.isfinite(self.low) else ""
        return f"{self.mean:+.3f}{bounds}"


def errors(rows: Sequence[Row]) -> list[float]:
    """log Ẑ - log p(y) of every search; -inf where no sample carried weight."""
    return [(-np.inf if z is None else z) - row["truth"] for row in rows for z in row["log_z"]]


def line(rows: Sequence[Row], asked: bool) -> list[str]:
    """A line of the table of log p(y): bias over draws of x_0, spread and coverage over searches."""
    found = np.array(errors(rows))
    draws = sorted({row["observation"] for row in rows})  # what is seen of one x_0 is not independent
    bias = Mean.of(float(np.mean(errors([row for row in rows if row["observation"] == n]))) for n in draws)
    told = bias.signed if np.isfinite(bias.mean) else f"-∞ ({int(np.isinf(found).sum())} searches without a sample)"
    if np.isfinite(bias.mean) and abs(bias.mean) > DIVERGED:
        told = f"diverges: median {float(np.median(found)):+.3g}"
    if asked and not abs(bias.mean) < MOST:
        told = f"**{told}, missed**"
    plain = np.isfinite(found).all() and len(found) > 1 and abs(bias.mean) < DIVERGED
    spread = f"{found.std(ddof=1):.2f}" if plain else DASH
    held = [inside for row in rows for inside, _ in outcomes(row)]
    ok = [inside for row in rows for inside, good in outcomes(row) if good]
    cover = DASH
    if held:
        low, high = wilson(sum(held), len(held))
        cover = f"{sum(held) / len(held):.3f} ({low:.3f} to {high:.3f}) of {len(held)}"
        if asked and (high < SHARE[0] or low > SHARE[1]):
            cover = f"**{cover}, missed**"
    return [told, spread, cover, f"{sum(ok)} of {len(ok)}", str(len(found))]


COLUMNS = ("bias of log p(y)", "sd", "intervals that hold it", "of those relied on", "searches")


def evidence_part(rows: Sequence[Row]) -> str:
    """The tables of log p(y)."""
    lines, by_operator = [], []
    for bed in BEDS:
        for tolerance in evidence.TOLERANCES:
            for arm in evidence.ARMS:
                mine = [r for r in rows if (r["bed"], r["tolerance"], r["arm"]) == (bed, tolerance, arm)]
                if mine:
                    asked = arm in evidence.ASKED
                    lines.append([bed, f"{tolerance:g}", arm, *line(mine, asked)])
    for operator in BEDS["linear"]:
        for tolerance in evidence.TOLERANCES:
            for arm in evidence.ASKED:
                mine = [
                    r
                    for r in rows
                    if (r["bed"], r["operator"], r["tolerance"], r["arm"]) == ("linear", operator, tolerance, arm)
                ]
                if mine:
                    by_operator.append([operator, f"{tolerance:g}", arm, *line(mine, False)])
    first = markdown_table(lines, ("bed", "tolerance", "arm", *COLUMNS))
    second = markdown_table(by_operator, ("operator", "tolerance", "arm", *COLUMNS))
    return (
        f"## log p(y) where it is known\n\n{evidence.NFE:,} NFE a search. Bias: mean of log Ẑ - log p(y), with "
        f"Student's interval over the x_0 that were seen, where there are {FEWEST} or more; |bias| < {MOST:g} and "
        f"{SHARE[0]:.0%} to {SHARE[1]:.0%} of the intervals are asked of `Steered`. Intervals: those that the searches "
        "report, with "
        "Wilson's interval, missed where that lies outside. Relied on: those whose standing is ok, which the "
        "certificate seldom grants here, since it asks rewards of single samples to follow the values, and those of a "
        f"narrow likelihood scatter by √(M/2) nats about any value.\n\n{first}\n\n### By operator\n\n{second}"
    )


def of_arm(rows: Sequence[Row], arm: str, name: str = "w2") -> dict[int, float]:
    """A figure of an arm by seed."""
    return {row["seed"]: row[name] for row in rows if row["arm"] == arm and row.get(name) is not None}


def paired(rows: Sequence[Row], one: str, other: str, name: str = "w2") -> Mean:
    """Difference of two arms over the seeds of both."""
    a, b = of_arm(rows, one, name), of_arm(rows, other, name)
    return Mean.of(a[seed] - b[seed] for seed in sorted(set(a) & set(b)))


def posteriors_part(rows: Sequence[Row]) -> str:
    """The tables of distances to the true conditional."""
    lines = []
    for arm in posteriors.ARMS:
        if w2 := of_arm(rows, arm):
            exact = of_arm(rows, arm, "exact")
            cells = [str(Mean.of(w2.values())), str(Mean.of(exact.values())) if exact else DASH]
            missed = float(np.mean(list(of_arm(rows, arm, "missed").values())))
            lines.append([arm, *cells, f"{missed:.2g}", str(len(w2))])
    first, last = posteriors.CYCLES[0], posteriors.CYCLES[-1]
    pairs = [
        *(
            (f"COW, {kind}, {b} cycles", f"COW, {kind}, {a} cycles")
            for kind in ("inverted", "fresh noise")
            for a, b in zip(posteriors.CYCLES, posteriors.CYCLES[1:], strict=False)
        ),
        *((f"COW, inverted, {n} cycles", f"COW, fresh noise, {n} cycles") for n in posteriors.CYCLES),
        *(
            (f"clamped, {kind}, {last} cycles", f"clamped, {kind}, {first} cycles")
            for kind in ("inverted", "fresh noise")
        ),
    ]
    gaps = [[f"{one} - {other}", paired(rows, one, other, "exact").signed] for one, other in pairs]
    gaps += [
        [f"{a} - {b}", paired(rows, a, b).signed]
        for a in posteriors.SEARCHED
        if of_arm(rows, a)
        for b in posteriors.FLOORS
    ]
    table = markdown_table(lines, ("arm", "W2 of the draws", "W2 of the law", "seed missed, mean square", "seeds"))
    return (
        f"## The background given a seed\n\nThe Gaussian process; {posteriors.DRAWS:,} draws an arm and seed, "
        f"{posteriors.PARTICLES:,} particles where it is searched, with a tolerance of {posteriors.TOLERANCE:g}. Means "
        f"over seeds with Student's 95 % interval. ESS of the searches {posteriors_ess(rows)}.\n\n{table}\n\n"
        "Paired by seed, of the law where it is known and of "
        f"the draws for the searches:\n\n{markdown_table(gaps, ('difference', 'W2'))}"
    )


def posteriors_ess(rows: Sequence[Row]) -> str:
    """What the searches had, least to most."""
    found = [row["ess"] for row in rows if row.get("ess") is not None]
    return f"{min(found):,.0f} to {max(found):,.0f}" if found else DASH


def ratio(one: Sequence[float], other: Sequence[float]) -> Mean:
    """Var(one)/Var(other), with bounds by the bootstrap over seeds of each."""
    x, y = np.asarray(one), np.asarray(other)
    draw = np.random.default_rng(0)
    a, b = (v[draw.integers(0, len(v), (RESAMPLES, len(v)))].var(1, ddof=1) for v in (x, y))
    low, high = np.quantile(a / b, [0.025, 0.975])
    return Mean(float(x.var(ddof=1) / y.var(ddof=1)), float(low), float(high))


def elucd_part(rows: Sequence[Row]) -> str:
    """The table of scales."""
    best, share = elucd.chosen(rows)
    judged = {s: [r["log_z"] for r in rows if r["kind"] == "judge" and r["scale"] == s] for s in elucd.SCALES}
    lines = []
    for scale in (s for s in elucd.SCALES if len(judged[s]) > 1):
        values = judged[scale]
        mark = ", ".join(n for n, at in (("default", elucd.DEFAULT), ("chosen", best)) if at == scale)
        against = DASH if scale == elucd.DEFAULT else str(ratio(values, judged[elucd.DEFAULT]))
        figures = [
            f"{share[scale]:.3f}",
            str(Mean.of(values)),
            f"{np.var(values, ddof=1):.4f}",
            against,
            str(len(values)),
        ]
        lines.append([f"{scale:g}", mark or DASH, *figures])
    columns = ("s", "", "ESS/n of importance sampling", "log Ẑ", "variance", "over that of the default", "seeds")
    return (
        f"## EluCD's scale, chosen by ESS\n\nThe MNIST model in {elucd.STEPS} steps, `digit(8)`; EluCD by "
        f"`digit(8, tau2=0.5)`, γ = .3. Populations of {elucd.PARTICLES}. Bounds of ratios: bootstrap over seeds.\n\n"
        f"{markdown_table(lines, columns)}"
    )


def page(rows: Path) -> str:
    """All parts whose rows are there.

    Raises:
        ValueError: none is.
    """
    parts = []
    of = (
        ("evidence", evidence.KEY, evidence_part),
        ("posteriors", posteriors.KEY, posteriors_part),
        ("elucd", elucd.KEY, elucd_part),
    )
    for name, key, part in of:
        if (file := rows / f"{name}.jsonl").exists():
            parts.append(part(Cells(file, key).rows))
    if not parts:
        raise ValueError(f"no rows in {rows}: run the experiments first")
    return "# Observations on exact beds\n\n" + "\n\n".join(parts) + "\n"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments."""

    rows: Path = Path("runs/results")
    """folder of what the scripts wrote"""
    out: Path = Path("runs/results/beds.md")
    """the page"""


def main(args: Args) -> None:
    """Write the page."""
    write_text(args.out, page(args.rows))
    print(args.out)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, TreeSearchError) as error:
        print(f"beds_report: {error}", file=sys.stderr)
        sys.exit(1)
