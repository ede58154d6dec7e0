"""Tables and figures of `experiments.mnist.evidence`, from its rows alone.

Search. b(n) is the mean over seeds of the best reward within n NFE; that of best-of-N is the expectation over subsets
of all its rollouts, Σ_i x_(i) C(i - 1, k - 1) / C(N, k) with k = n / T, which reaches beyond the budget B of one run.
Ratios and crossings are those of `experiments.shared.curves`, with best-of-N as the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.mnist.targets import T
from experiments.shared import evidence_duels as duels
from experiments.shared import evidence_figures as drawn
from experiments.shared import evidence_report as shared
from experiments.shared.cells import Row
from experiments.shared.curves import FEW_SEEDS, Compared, Curve, area, compare, grid, value_at
from experiments.shared.evidence_report import COSTS, Found, gather
from experiments.shared.stats import mean_se
from experiments.shared.tables import NOT_RUN, table
from treesearch.report.tables import markdown_table

OWN = ("tree_sampling", "tree_sampling_guided")
SEEDS = 3  # of a line that is complete
BASE = "best_of_n"
METRICS = {
    "fid_real": ("FID, real", 1.0),
    "fid_model": ("FID, π", 1.0),
    "mmd2_real": ("MMD² × 10³, real", 1e3),
    "mmd2_model": ("MMD² × 10³, π", 1e3),
    "mean_reward": ("E[r]", 1.0),
    "judge_accuracy": ("judge accuracy", 1.0),
    "diversity": ("diversity", 1.0),
    "log_z": ("log Ẑ", 1.0),
    "log_z_error": ("log Z error", 1.0),
    "distinct": ("distinct leaves", 1.0),
    "roots": ("roots", 1.0),
    "ess": ("ESS", 1.0),
    "samples": ("leaves", 1.0),
}
DUELS = {name: METRICS[name] for name in ("mmd2_model", "fid_real")}
EXPLAINED = (
    "Means ± standard errors over seeds, of 2,000 draws with replacement, in features of the judge's penultimate "
    "layer: FID is not on Inception's scale. MMD² is unbiased. E[r]: of log p(c | x), the literature's E[log r], where "
    "the target is a class. log Z error: |log Ẑ - log Z| of the pool. Roots: lineages, distinct x_T among the draws. A "
    "dash: the method has no Ẑ, or its distances were not taken. Tuned and published settings are lines of their own "
    "where they differ."
)
SEARCHED = (
    "Search: means over seeds. B: the largest budget. Matched: NFE that best-of-N needs for the method's reward at B, "
    "over B. Saved: B over the NFE that the method needs for best-of-N's reward at B. Ahead: NFE from which its curve "
    "stays above best-of-N's. In brackets: 95 % bootstrap intervals over seeds; < and > where the budgets do not "
    f"reach. {FEW_SEEDS}"
)


class Names(NamedTuple):
    """Everything that could be run, and the budgets that are asked for."""

    targets: Sequence[str]
    methods: Sequence[str]
    rewards: Sequence[str]
    searchers: Sequence[str]
    budgets: Sequence[int] = (50_000, 1_000_000)
    levels: Sequence[int] = ()


# targets


def reference_table(found: Found) -> str:
    """What the targets are; the largest pool of each."""
    body = [
        [
            name,
            f"{row['ess_fraction']:.3g}",
            f"{row['log_z']:.3f} ± {row['log_z_se']:.3f}",
            f"{row['prior_reward']:.2f} → {row['mean_reward']:.2f}",
            f"{row['how']}, {row['distinct']:,} of {row['pool']:,}",
            f"{row['real']:,}",
            f"{row['model_to_fid_real']:.3g}",
            f"{row['model_to_mmd2_real'] * 1e3:.3g}",
            f"{row['floor_mmd2_model'] * 1e3:.2g}",
            f"{row['floor_mmd2_real'] * 1e3:.2g}",
        ]
        for name, row in found.references.items()
    ]
    columns = ("target", "ESS fraction of IS", "log Z", "E[r], prior → π", "draws of π", "real images")
    columns += ("FID, π to real", "MMD² × 10³, π to real", "floor to π", "floor to real")
    return markdown_table(body, columns) if body else NOT_RUN


# search


@cache
def _shares(n: int, sizes: tuple[int, ...]) -> NDArray[np.float64]:
    """Row k: chances that the i-th smallest of n is the largest of a subset of size k."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # log n!
    shares = np.zeros((len(sizes), n))
    for row, k in zip(shares, sizes, strict=True):
        i = np.arange(k, n + 1)
        row[k - 1 :] = np.exp(logs[i - 1] - logs[k - 1] - logs[i - k] - (logs[n] - logs[k] - logs[n - k]))
    return shares


def expected_best(rewards: NDArray[np.float64], sizes: Sequence[int]) -> NDArray[np.float64]:
    """Mean over subsets of each size of their largest value.

    Raises:
        ValueError: there are no subsets of a size.
    """
    if not all(1 <= k <= len(rewards) for k in sizes):
        raise ValueError(f"subsets of {list(sizes)} out of {len(rewards)}: expected 1..{len(rewards)}")
    return _shares(len(rewards), tuple(sizes)) @ np.sort(rewards)


def curve_of(seeds: Sequence[Sequence[Row]], low: int) -> Curve:
    """Mean best reward of a method over seeds, each of them its rows."""
    first = seeds[0][0]
    if "rewards" in first:
        pooled = np.concatenate([np.asarray(rows[0]["rewards"], float) for rows in seeds])
        at = grid(low, T * len(pooled))
        return at, expected_best(pooled, [max(1, min(len(pooled), int(n / T + 1e-9))) for n in at])
    if "curve" in first:
        at = grid(low, first["budget"])
        return at, np.mean([_steps(rows[0]["curve"], at) for rows in seeds], axis=0)
    at = np.array([row["budget"] for row in seeds[0]], float)
    return at, np.mean([[row["best"] for row in rows] for rows in seeds], axis=0)


def _steps(curve: Sequence[Sequence[float]], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Best reward within each budget; before the first sample, the first one's."""
    n, best = np.asarray(curve, float).T
    return best[np.maximum(np.searchsorted(n, at, side="right") - 1, 0)]


Seeds = dict[int, list[Row]]


def by_seed(rows: Sequence[Row], reward: str, method: str) -> Seeds:
    """Rows of each seed, small budgets first, of seeds with all budgets."""
    found: Seeds = {}
    for row in _searches(rows, reward):
        if row["method"] == method and "error" not in row:
            found.setdefault(row["seed"], []).append(row)
    most = max((len(each) for each in found.values()), default=0)
    whole = {seed: each for seed, each in found.items() if len(each) == most}
    return {seed: sorted(each, key=lambda row: row["budget"]) for seed, each in sorted(whole.items())}


def _searches(rows: Sequence[Row], reward: str) -> list[Row]:
    return [row for row in rows if row["kind"] == "search" and row["target"] == reward]


def matched(one: Seeds, other: Seeds, low: int) -> Compared | None:
    """Ratios and crossing of a method against best-of-N, over the seeds of both."""
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None

    def curves(picks: NDArray[np.int64]) -> tuple[Curve, Curve]:
        mine, base = (curve_of([each[seeds[i]] for i in picks], low) for each in (one, other))
        return mine, base

    return compare(curves, len(seeds), goal=max(each[-1]["budget"] for each in other.values()))


def levels_of(rows: Sequence[Row], reward: str, names: Names) -> list[int]:
    """Budgets of a search, those asked for among them."""
    return sorted({row["budget"] for row in _searches(rows, reward)} | set(names.levels)) or [T]


def searchers_of(rows: Sequence[Row], reward: str, names: Names) -> list[str]:
    """Methods of a search, those asked for first."""
    return list(dict.fromkeys((*names.searchers, *(row["method"] for row in _searches(rows, reward)))))


def best_table(rows: Sequence[Row], reward: str, names: Names) -> str:
    """Best reward at each budget, and its mean over log NFE."""
    levels = levels_of(rows, reward, names)
    mean = "mean over log NFE"

    def one(method: str, column: str) -> str | None:
        curves = [curve_of([each], levels[0]) for each in by_seed(rows, reward, method).values()]
        if column == mean:
            whole = [area(c, c[0][0], c[0][-1]) for c in curves if c[0][0] == levels[0]]
            return mean_se(whole).text() if whole else None
        n = int(column.split()[0].replace(",", ""))
        inside = [value_at(c, n) for c in curves if c[0][0] <= n <= c[0][-1] * 1.001]
        return mean_se(inside).text() if inside else None

    return table(searchers_of(rows, reward, names), [*(f"{n:,} NFE" for n in levels), mean], one)


def ratio_table(rows: Sequence[Row], reward: str, names: Names) -> str:
    """Every method against best-of-N."""
    low, other = levels_of(rows, reward, names)[0], by_seed(rows, reward, BASE)
    methods = [method for method in searchers_of(rows, reward, names) if method != BASE]
    known = {method: matched(by_seed(rows, reward, method), other, low) for method in methods}

    def one(method: str, column: str) -> str | None:
        found = known[method]
        return None if found is None else getattr(found, column.split()[0])

    return table(methods, ["matched by best-of-N", "saved to best-of-N", "ahead of best-of-N from"], one)


def spent_table(rows: Sequence[Row], reward: str, names: Names) -> str:
    """What each method took at its largest budget, and how sure the judge is of a class of its best image."""
    judged = "judge's surest class of the best"
    columns = {title: name for name, title in COSTS.items()}

    def one(method: str, column: str) -> str | None:
        last = [each[-1] for each in by_seed(rows, reward, method).values()]
        if not last:
            return None
        found = [max(row["judge_of_best"]) if column == judged else row.get(columns[column]) for row in last]
        return "-" if None in found else mean_se(found).text()

    return table(searchers_of(rows, reward, names), [*columns, judged], one)


def search_section(rows: Sequence[Row], reward: str, names: Names) -> list[str]:
    """One reward."""
    if not _searches(rows, reward):
        return [f"## Search: {reward}\n\n{NOT_RUN}"]
    parts = [f"## Search: {reward}", best_table(rows, reward, names), ratio_table(rows, reward, names)]
    return [*parts, spent_table(rows, reward, names)]


# report


def failed_searches(rows: Sequence[Row]) -> list[str]:
    """A line for every search that failed."""
    failed = [row for row in rows if row["kind"] == "search" and "error" in row]
    return list(dict.fromkeys(f"- search, {row['target']}, {row['method']}: {row['error']}" for row in failed))


def compose(rows: Sequence[Row], names: Names, figures: Sequence[str]) -> str:
    """The report."""
    found = sampling_of(rows, names)
    parts = ["# MNIST: sampling and search at equal NFE", *(f"![{name}]({name})" for name in figures)]
    parts.append("## What was run\n\n" + shared.coverage_table(found, names.budgets, SEEDS))
    if absent := [method for method in names.methods if not _ran(rows, method)]:
        parts.append(f"Of no target: {', '.join(absent)}.")
    parts.append("## Targets\n\n" + reference_table(found))
    parts += [
        *shared.sections(found, METRICS, names.budgets),
        EXPLAINED,
        f"## Who is best, or level with the best\n\nBy MMD² to π. {duels.RULE}",
        duels.verdict(found, "mmd2_model"),
        *(duels.rare_section(found, name, "mmd2_model") for name in OWN),
        duels.duel_section(found, DUELS),
        shared.tuning_section(found),
    ]
    for reward in names.rewards:
        parts += search_section(rows, reward, names)
    parts.append(SEARCHED)
    parts += [
        f"## Anytime: MMD² to π × 10³, mean over log NFE\n\n{duels.area_table(found, 'mmd2_model')}",
        duels.crossing_section(found, "mmd2_model", floors_of(rows)),
        "## Ended below their NFE\n\n" + shared.below(found),
        "## Failed\n\n" + "\n".join([shared.failures(found), *failed_searches(rows)]),
        "## Where\n\n" + shared.where(rows),
    ]
    return "\n\n".join(parts) + "\n"


def sampling_of(rows: Sequence[Row], names: Names) -> Found:
    """Rows of the sampling part; methods that ran on no target have no line."""
    ran = [method for method in names.methods if _ran(rows, method)]
    return gather(rows, "target", dict.fromkeys(names.targets, ran))


def _ran(rows: Sequence[Row], method: str) -> bool:
    return any(row["kind"] in ("choice", "cell") and row["method"] == method for row in rows)


def floors_of(rows: Sequence[Row]) -> dict[str, float]:
    """MMD² of exact sampling of π, by target."""
    return {row["target"]: row["floor_mmd2_model"] for row in rows if row["kind"] == "reference"}


def draw(rows: Sequence[Row], names: Names, out: Path) -> list[str]:
    """MMD² to π of the lines of each target; best reward and MMD against NFE."""
    found = sampling_of(rows, names)

    def dots(axis: Any, target: str) -> None:
        for budget in found.budgets:
            each = {line.label: found.values(target, line, budget, "mmd2_model") for line in found.lines(target)}
            pairs = [(1e3 * value, label) for label, values in each.items() for value in values.values()]
            if pairs:
                axis.plot(*zip(*pairs, strict=True), "o", label=f"{budget:,} NFE", alpha=0.7, markersize=4)
        axis.set(xlabel="MMD² × 10³ to π")
        axis.tick_params(axis="y", labelsize=7)

    def curves(axis: Any, reward: str) -> None:
        methods = searchers_of(rows, reward, names)
        look = drawn.styles(methods, (BASE,))
        for method in methods:
            if seeds := by_seed(rows, reward, method):
                at, best = curve_of(list(seeds.values()), levels_of(rows, reward, names)[0])
                inside = at <= max(row["budget"] for row in _searches(rows, reward))
                every = {"markevery": max(1, int(inside.sum()) // 8), "markersize": 4}
                axis.plot(at[inside], best[inside], label=method, **look[method], **every)
                axis.set(xscale="log", xlabel="NFE", ylabel="best reward")

    figures = [drawn.panels(names.targets, out.with_name(f"{out.stem}_sampling.png"), dots, height=4.5)]
    figures.append(drawn.panels(names.rewards, out.with_name(f"{out.stem}_search.png"), curves, height=4.0))
    if len(found.budgets) > 1:
        file = out.with_name(f"{out.stem}_anytime.png")
        figures.append(drawn.distance_figure(found, "mmd2_model", floors_of(rows), file))
    return figures


def write(files: Sequence[Path], out: Path, key: Sequence[str], names: Names) -> str:
    """Write the report and its figures; returns the report."""
    rows = shared.read_all(files, key)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = compose(rows, names, draw(rows, names, out))
    out.write_text(text, "utf-8")
    return text
