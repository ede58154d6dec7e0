"""Tables and figures of `experiments.mnist_evidence`, from its rows alone.

Search. b(n) is the mean over seeds of the best reward within n NFE; that of best-of-N is the expectation over subsets
of all its rollouts, Σ_i x_(i) C(i - 1, k - 1) / C(N, k) with k = n / T, which reaches beyond the budget B of one run:

    matched by     n with b_BoN(n) = b(B), over B:      what best-of-N pays for the same reward
    saved          B over n with b(n) = b_BoN(B):       how much earlier best-of-N's reward is there

Curves are interpolated in log NFE; intervals are of the bootstrap over seeds, of both methods at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.evidence import NOT_RUN, Row, mean_se, read, table
from treesearch.errors import missing
from treesearch.report import DASH, markdown

T = 50
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
}
COSTS = {
    "nfe": "NFE",
    "work": "NFE + 2·backward",
    "reward_calls": "reward calls",
    "seconds": "seconds",
    "nodes": "nodes",
    "tree_bytes": "tree, bytes",
    "state_bytes": "states, bytes",
}
FAILED = "failed"
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
EXPLAINED = (
    "Means ± standard errors over seeds, of 2,000 draws with replacement, in features of the judge's penultimate "
    "layer: FID is not on Inception's scale. MMD² is unbiased. log Z error: |log Ẑ - log Z| of the pool. A dash: the "
    "method has no Ẑ, or its distances were not taken. Published settings are a line of their own where tuning chose "
    "others."
)


# sampling


def _text(settings: Row) -> str:
    return json.dumps(settings, sort_keys=True)


def lines_of(rows: Sequence[Row], target: str, methods: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Label -> method and settings as JSON; None for a method of which nothing is known."""
    lines: dict[str, tuple[str, str | None]] = {}
    for method in methods:
        mine = [row for row in rows if row.get("target") == target and row.get("method") == method]
        choice = next((row for row in mine if row["kind"] == "choice"), None)
        run = list(dict.fromkeys(_text(row["settings"]) for row in mine if row["kind"] == "cell"))
        if choice is None:
            lines[method] = (method, run[0] if run else None)
            continue
        picked, published = _text(choice["picked"]), _text(choice["published"])
        lines[method] = (method, picked)
        if picked != published:
            lines[f"{method}, published"] = (method, published)
    return lines


class Cell(NamedTuple):
    """Rows of one line and budget, distances merged in."""

    rows: list[Row]

    def text(self, name: str, scale: float = 1.0) -> str | None:
        """Mean ± standard error, None where nothing was run."""
        if not self.rows:
            return None
        if any("error" in row for row in self.rows):
            return FAILED
        values = [row[name] for row in self.rows if row.get(name) is not None]
        return mean_se(values).text(scale) if len(values) == len(self.rows) else DASH


def cell(rows: Sequence[Row], target: str, method: str, settings: str | None, budget: int) -> Cell:
    """The cells of a line, each with its distances to the largest pool."""
    known: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: (row["kind"] != "cell", row.get("pool") or 0)):
        same = (row.get("target"), row.get("method"), row.get("budget")) == (target, method, budget)
        if same and row["kind"] in ("cell", "cell distances") and _text(row["settings"]) == settings:
            known[row["seed"]] = known.get(row["seed"], {}) | row
    return Cell(list(known.values()))


def sampling_table(rows: Sequence[Row], target: str, budget: int, methods: Sequence[str], columns: Row) -> str:
    """One target at one budget: methods by metrics or costs."""
    lines = lines_of(rows, target, methods)
    scale = {(c if isinstance(c, str) else c[0]): (n, 1.0 if isinstance(c, str) else c[1]) for n, c in columns.items()}

    def one(label: str, column: str) -> str | None:
        return cell(rows, target, *lines[label], budget).text(*scale[column])

    return table(list(lines), list(scale), one)


def reference_table(rows: Sequence[Row]) -> str:
    """What the targets are; the largest pool of each."""
    largest = {row["target"]: row for row in sorted(_kind(rows, "reference"), key=lambda row: row["pool"])}
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
        ]
        for name, row in largest.items()
    ]
    columns = ("target", "ESS fraction of IS", "log Z", "E[r], prior → π", "draws of π", "real images")
    return markdown(body, (*columns, "FID, π to real", "MMD² × 10³, π to real", "floor to π"))


def choice_table(rows: Sequence[Row]) -> str:
    """Chosen settings and their MMD² beside the published settings'."""
    body = []
    for row in _kind(rows, "choice"):
        if len(row["grid"]) > 1:
            score = {_text(g["settings"]): g["mmd2"] for g in row["grid"]}
            shown = [score[_text(row[which])] for which in ("picked", "published")]
            cells = [FAILED if value is None else f"{value * 1e3:.3g}" for value in shown]
            body.append([row["target"], row["method"], f"`{_text(row['picked'])}`", *cells])
    return markdown(body, ("target", "method", "chosen", "MMD² × 10³", "of the published")) if body else NOT_RUN


def _kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


# search


def expected_best(rewards: NDArray[np.float64], k: int) -> float:
    """Mean over subsets of size k of their largest value."""
    x, n = np.sort(rewards), len(rewards)
    if not 1 <= k <= n:
        raise ValueError(f"subsets of {k} out of {n}: expected 1..{n}")
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # log n!
    i = np.arange(k, n + 1)
    log_p = logs[i - 1] - logs[k - 1] - logs[i - k] - (logs[n] - logs[k] - logs[n - k])
    return float(np.exp(log_p) @ x[k - 1 :])


def grid(low: int, high: int) -> NDArray[np.float64]:
    """Budgets, equally spaced in log NFE."""
    return np.geomspace(low, high, 100)


def curve_of(seeds: Sequence[Sequence[Row]], low: int) -> Curve:
    """Mean best reward of a method over seeds, each of them its rows."""
    if "rewards" in seeds[0][0]:
        pooled = np.concatenate([np.asarray(rows[0]["rewards"], float) for rows in seeds])
        at = grid(low, T * len(pooled))
        return at, np.array([expected_best(pooled, max(1, min(len(pooled), round(n / T)))) for n in at])
    if "curve" in seeds[0][0]:
        at = grid(low, seeds[0][0]["budget"])
        return at, np.mean([_steps(rows[0]["curve"], at) for rows in seeds], axis=0)
    at = np.array([row["budget"] for row in seeds[0]], float)
    return at, np.mean([[row["best"] for row in rows] for rows in seeds], axis=0)


def _steps(curve: Sequence[Sequence[float]], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Best reward within each budget; before the first sample, the first one's."""
    n, best = np.asarray(curve, float).T
    return best[np.maximum(np.searchsorted(n, at, side="right") - 1, 0)]


def value_at(curve: Curve, n: float) -> float:
    """b(n)."""
    return float(np.interp(math.log(n), np.log(curve[0]), curve[1]))


def nfe_for(curve: Curve, level: float) -> float:
    """Smallest n with b(n) >= level; infinite where it is not reached."""
    n, best = np.log(curve[0]), np.maximum.accumulate(curve[1])
    reached = np.flatnonzero(best >= level)
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0 or best[i] == best[i - 1]:
        return float(curve[0][i])
    return float(math.exp(n[i - 1] + (level - best[i - 1]) / (best[i] - best[i - 1]) * (n[i] - n[i - 1])))


def by_seed(rows: Sequence[Row], reward: str, method: str) -> list[list[Row]]:
    """Rows of each seed, small budgets first, of seeds with all budgets."""
    found: dict[int, list[Row]] = {}
    for row in _kind(rows, "search"):
        if (row["target"], row["method"]) == (reward, method) and "error" not in row:
            found.setdefault(row["seed"], []).append(row)
    most = max((len(each) for each in found.values()), default=0)
    return [sorted(each, key=lambda row: row["budget"]) for each in found.values() if len(each) == most]


class Match(NamedTuple):
    """Ratios of NFE."""

    matched: float
    saved: float


def match(one: Curve, best_of_n: Curve, budget: int) -> Match:
    """What best-of-N needs for a method's reward at the budget, and the method for best-of-N's."""
    matched = nfe_for(best_of_n, value_at(one, budget)) / budget
    return Match(matched, budget / nfe_for(one, value_at(best_of_n, budget)))


def matched(one: Sequence[Sequence[Row]], other: Sequence[Sequence[Row]], low: int, draws: int = 200) -> list[str]:
    """Both ratios with their 95 % intervals."""
    budget = one[0][-1]["budget"]
    point = match(curve_of(one, low), curve_of(other, low), budget)
    chance = np.random.default_rng(0)

    def again(seeds: Sequence[Sequence[Row]]) -> list[Sequence[Row]]:
        return [seeds[i] for i in chance.integers(0, len(seeds), len(seeds))]

    found = np.array([match(curve_of(again(one), low), curve_of(again(other), low), budget) for _ in range(draws)])
    limit = f"> {curve_of(other, low)[0][-1] / budget:.2g}"
    texts = []
    for i, beyond in enumerate((limit, "0")):
        low_end, high_end = np.quantile(found[:, i], [0.025, 0.975], method="nearest")
        texts.append(f"{_ratio(point[i], beyond)} ({_ratio(low_end, beyond)} to {_ratio(high_end, beyond)})")
    return texts


def _ratio(value: float, beyond: str) -> str:
    return beyond if math.isinf(value) else f"{value:.2f}"


def area(curve: Curve, low: int, high: int) -> float:
    """Mean of b over log NFE between two budgets."""
    at = grid(low, high)
    values = [value_at(curve, n) for n in at]
    return float(np.mean([(a + b) / 2 for a, b in pairwise(values)]))


def search_table(rows: Sequence[Row], reward: str, methods: Sequence[str]) -> str:
    """Best reward at each budget, ratios, area, costs."""
    budgets = sorted({row["budget"] for row in _kind(rows, "search") if row["target"] == reward}) or [T]
    other = by_seed(rows, reward, "best_of_n")
    columns = [f"{n:,} NFE" for n in budgets]
    columns += ["matched by best-of-N at", "saved", "mean over log NFE", "seconds", "tree and states, MB"]

    def line(method: str) -> list[str]:
        seeds = by_seed(rows, reward, method)
        if not seeds:
            return [method, *[NOT_RUN] * len(columns)]
        low, last = budgets[0], [each[-1] for each in seeds]
        curves = [curve_of([each], low) for each in seeds]
        held = [c for c in curves if c[0][0] <= low]
        cells = [_level(curves, n) for n in budgets]
        cells += matched(seeds, other, low) if other and method != "best_of_n" else [DASH, DASH]
        cells.append(mean_se([area(c, low, last[0]["budget"]) for c in held]).text() if held else DASH)
        megabytes = [(row["tree_bytes"] + row["state_bytes"]) / 1e6 for row in last]
        return [method, *cells, mean_se([row["seconds"] for row in last]).text(), f"{np.mean(megabytes):.1f}"]

    return markdown([line(method) for method in methods], ("method", *columns))


def _level(curves: Sequence[Curve], n: int) -> str:
    inside = [c for c in curves if c[0][0] <= n <= c[0][-1] * 1.001]
    return mean_se([value_at(c, n) for c in inside]).text() if inside else NOT_RUN


# anytime


def mmd_area(rows: Sequence[Row], target: str, methods: Sequence[str]) -> str:
    """Mean of MMD² × 10³ to π over log NFE, where several budgets were run."""
    body = []
    for label, (method, settings) in lines_of(rows, target, methods).items():
        curve: dict[int, float] = {}
        for budget in sorted({row["budget"] for row in _kind(rows, "cell distances")}):
            found = cell(rows, target, method, settings, budget).rows
            values = [row["mmd2_model"] for row in found if "mmd2_model" in row]
            if values and len(values) == len(found):
                curve[budget] = float(np.mean(values)) * 1e3
        mean = (np.array(list(curve), float), np.array(list(curve.values())))
        value = f"{area(mean, min(curve), max(curve)):.3g}" if len(curve) > 1 else NOT_RUN
        body.append([label, value, ", ".join(f"{n:,}" for n in curve) or DASH])
    return markdown(body, ("method", "MMD² × 10³, mean over log NFE", "budgets"))


# report


def compose(rows: Sequence[Row], names: Names, figures: Sequence[str]) -> str:
    """The report."""
    parts = ["# MNIST: sampling and search at equal NFE", *(f"![{name}]({name})" for name in figures)]
    parts.append("## Targets\n\n" + (reference_table(rows) if _kind(rows, "reference") else NOT_RUN))
    budgets = sorted({row["budget"] for row in _kind(rows, "cell")}) or [50_000]
    for target in names.targets:
        for budget in budgets:
            parts.append(f"## Sampling: {target}, {budget:,} NFE")
            parts.append(sampling_table(rows, target, budget, names.methods, METRICS))
            parts.append(sampling_table(rows, target, budget, names.methods, COSTS))
    parts += [EXPLAINED, "## Tuning\n\n" + choice_table(rows)]
    for reward in names.rewards:
        parts.append(f"## Search: {reward}\n\n{search_table(rows, reward, names.searchers)}")
    for target in names.targets:
        parts.append(f"## Anytime: {target}\n\n{mmd_area(rows, target, names.methods)}")
    failed = [row for row in rows if "error" in row and row["kind"] != "tuning"]
    errors = dict.fromkeys(f"- {row['target']}, {row['method']}: {row['error']}" for row in failed)
    parts.append("## Failed\n\n" + ("\n".join(errors) or "None."))
    where = dict.fromkeys(f"- {row['machine']}; {row['versions']}" for row in rows if "machine" in row)
    hours = sum(row.get("seconds") or 0 for row in rows) / 3600
    parts.append("## Where\n\n" + "\n".join(where) + f"\n\n{hours:.2f} h in all cells.")
    return "\n\n".join(parts) + "\n"


class Names(NamedTuple):
    """Everything that could be run."""

    targets: Sequence[str]
    methods: Sequence[str]
    rewards: Sequence[str]
    searchers: Sequence[str]


def draw(rows: Sequence[Row], names: Names, path: Path) -> list[str]:
    """MMD² to π of the methods of each target; best reward against NFE."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing("matplotlib", "plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def panels(titles: Sequence[str], file: Path, panel: Callable[[Any, str], None]) -> str:
        figure, axes = plt.subplots(1, len(titles), figsize=(5 * len(titles), 4), squeeze=False)
        for axis, title in zip(axes.flat, titles, strict=True):
            panel(axis, title)
            axis.set(title=title)
            axis.grid(alpha=0.25)
        figure.tight_layout()
        figure.savefig(file, dpi=120)
        plt.close(figure)
        return file.name

    def bars(axis: Any, target: str) -> None:
        lines = lines_of(rows, target, names.methods)
        budgets = sorted({row["budget"] for row in _kind(rows, "cell distances")})
        for budget in budgets:
            cells = {label: cell(rows, target, *line, budget).rows for label, line in lines.items()}
            pairs = [
                (label, 1e3 * row["mmd2_model"]) for label, each in cells.items() for row in each if "mmd2_model" in row
            ]
            if pairs:
                labels, values = zip(*pairs, strict=True)
                axis.plot(values, labels, "o", label=f"{budget:,} NFE", alpha=0.7)
                axis.legend()
        axis.set(xlabel="MMD² × 10³ to π")

    def curves(axis: Any, reward: str) -> None:
        for method in names.searchers:
            if seeds := by_seed(rows, reward, method):
                axis.plot(*curve_of(seeds, 1_000), label=method)
                axis.set(xscale="log", xlabel="NFE", ylabel="best reward")
                axis.legend(fontsize=7)

    sampling = panels(names.targets, path.with_name(f"{path.stem}_sampling.png"), bars)
    return [sampling, panels(names.rewards, path.with_name(f"{path.stem}_search.png"), curves)]


def write(file: Path, out: Path, names: Names) -> str:
    """Write the report and its figures; returns the report."""
    rows = read(file)
    text = compose(rows, names, draw(rows, names, out))
    out.write_text(text, "utf-8")
    return text
