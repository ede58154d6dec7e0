"""Best reward against what it costs, with drafts and without, on the shipped MNIST model at T = 50.

    python -m experiments.drafts.search run
    python -m experiments.drafts.search report

Best-of-N with drafts (`treesearch.methods.racing`) beside the methods of `experiments.mnist.evidence`, whose rows are
read. Walks do not depend on the reward, so that rewards and settings share them: the searches are those of
`BestOfN(draft=...)`, asked and told here, and what they ask for is looked up in a pool of drafts and rollouts, one a
seed, which is filled as it is asked for. NFE and calls are those that the search is charged with. Best-of-N's rollouts
are a pool of their own.

    saved      best-of-N's reward at its 10^5 NFE: its cost over the method's, of mean curves over seeds
    cost       NFE + k calls of the reward, k = 0, 1, 10: what the wall clock knows where a call costs k evaluations
    in a tree  TreeSearch's cost over that of TreeSearch with drafts or with looks, to best-of-N's reward at 10^5 NFE
    blind      a reward that no draft predicts, (10^4 mean pixel) mod 1: what switching drafts off has cost

Rows of other methods have no calls at each improvement: there they are taken to go with NFE. `clock` rows are whole
searches with a reward that sleeps for k = 10 evaluations, beside the seconds that the count says.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import treesearch as ts
from experiments.drafts.values import draft, model_of, walk
from experiments.mnist.report import BASE, by_seed, expected_best
from experiments.mnist.targets import SEARCHED, T, kernel_on
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.curves import DRAWS, FEW_SEEDS, Curve, compare, grid, nfe_for, value_at
from experiments.shared.sweep import Sweep, command_line
from treesearch.backends.base import describe
from treesearch.core.noise import child_keys, root_key
from treesearch.engine.asking import without_graph
from treesearch.methods.base import Problem
from treesearch.report.tables import markdown_table
from treesearch.rewards.base import Reward
from treesearch.runs.files import write_text

F64 = NDArray[np.float64]
Ids = NDArray[np.int64]
KEY = ("kind", "target", "method", "budget", "seed")
ARMS: dict[str, Any] = {
    "best_of_n(draft=5)": ts.BestOfN(draft=5),
    "best_of_n(draft=10)": ts.BestOfN(draft=10),
    "best_of_n(draft=(5, 10))": ts.BestOfN(draft=(5, 10)),
}
TREES = ("tree_search_drafts", "tree_search_looks")
BESIDE = (BASE, "beam", "fk_max", "tree_search", *TREES)
CALLS = (0, 1, 10)  # evaluations that a call of the reward costs
BATCH, LOW, GOAL = 64, 1000, 100_000
BLIND = "blind"


def blind(images: Tensor, prompts: Any) -> Tensor:
    """(10^4 mean pixel) mod 1."""
    return (1e4 * images.double().mean((1, 2, 3))) % 1


def reward_of(target: str) -> Reward:
    return Reward(blind, BLIND) if target == BLIND else SEARCHED[target]()


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    kind: str
    target: str
    method: str
    budget: int
    seed: int


class Pool:
    """Rewards of a seed's drafts and rollouts, kept in a file.

    Args:
        work: folder of the files.
        seed: of the candidates' keys.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.file, self.seed = work / f"{seed}.npz", seed
        stored = dict(np.load(self.file)) if self.file.exists() else {}
        self.known: dict[tuple[int, str], dict[int, float]] = {}
        for name in {key.rsplit("/", 1)[0] for key in stored}:
            m, target = name.split("/")
            pairs = zip(stored[f"{name}/who"], stored[f"{name}/reward"], strict=True)
            self.known[int(m), target] = {int(i): float(r) for i, r in pairs}

    def __call__(self, m: int, target: str, who: Ids) -> F64:
        """Rewards (n,) of candidates' drafts of m evaluations, or of their rollouts for 0."""
        known = self.known.get((m, target), {})
        missing = np.array([i for i in who.tolist() if i not in known], np.int64)
        for first in range(0, len(missing), BATCH):
            self._walk(m, missing[first : first + BATCH])
        if len(missing):
            self._keep()
        return np.array([self.known[m, target][i] for i in who.tolist()])

    @without_graph()
    def _walk(self, m: int, who: Ids) -> None:
        model = model_of("")
        key = child_keys(np.array([root_key(self.seed, 0)], np.uint64), T + 1, who, at_root=True)
        x, _ = model.prior(np.zeros(len(who), np.int64), model.prior_noise(key))
        x = draft(model, m, x, T, key) if m else walk(model, x, T, key)
        samples = model.kernel.decode(x)
        for target in (*SEARCHED, BLIND):
            of = reward_of(target)(samples, None).double().tolist()
            self.known.setdefault((m, target), {}).update(zip(who.tolist(), of, strict=True))

    def _keep(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        columns = {}
        for (m, target), known in self.known.items():
            columns[f"{m}/{target}/who"] = np.array(list(known), np.int64)
            columns[f"{m}/{target}/reward"] = np.array(list(known.values()))
        part = self.file.with_suffix(".part.npz")
        np.savez_compressed(part, **columns)
        part.replace(self.file)


@cache
def spec() -> Any:
    return describe(kernel_on("cpu"))


def searched(job: Job, pool: Pool) -> Row:
    """A search, asked and told."""
    key = root_key(job.seed, 0)
    search = ARMS[job.method].start(Problem(0, spec(), key, ts.Budget(nfe=job.budget).share(1)))
    ordinal = {
        int(k): i
        for i, k in enumerate(child_keys(np.array([key], np.uint64), T + 1, np.arange(job.budget), at_root=True))
    }
    nfe = draft_nfe = calls = 0
    curve: list[list[float]] = []
    while len((segments := search.ask(BATCH)).first):
        who = np.array([ordinal[int(k)] for k in search.tree.key[segments.last]])
        found = pool(segments.draft, job.target, who)
        price = int(spec().draft_prices(segments.draft)[-1]) if segments.draft else T
        nfe, calls = nfe + price * len(who), calls + len(who)
        draft_nfe += price * len(who) * (segments.draft > 0)
        search.tree.reward[segments.last] = found
        search.tell(segments)
        if not segments.draft and (not curve or found.max() > curve[-1][2]):
            curve.append([nfe, calls, float(found.max())])
    extra = search.readout().extra
    return job.row | {
        "nfe": nfe, "draft_nfe": draft_nfe, "reward_calls": calls, "best": curve[-1][2], "curve": curve,
        "finished": extra["finished"], "drafts": extra["drafts"], "plan": extra.get("plan"),
        "correlation": extra.get("correlation"),
        "levels": {m: list(spec().draft_levels(m)) for m in ARMS[job.method].rungs},
    } | where_it_ran()  # fmt: skip


def clocked(job: Job) -> Row:
    """Seconds of a search with a sleeping reward, beside those that NFE and calls say."""
    budget, real = ts.Budget(nfe=job.budget), reward_of(job.target)
    each = _seconds(ts.search(kernel_on("cpu"), real, ts.BestOfN(), budget=budget, seed=job.seed)) / job.budget

    def sleeping(images: Tensor, prompts: Any) -> Tensor:
        time.sleep(CALLS[-1] * each * len(images))
        return real(images, prompts)

    found = ts.search(kernel_on("cpu"), Reward(sleeping, "sleeping"), ARMS[job.method], budget=budget, seed=job.seed)
    counted = each * (found.cost.nfe + CALLS[-1] * found.cost.reward_calls)
    return job.row | {"seconds": _seconds(found), "counted": counted, "seconds_per_nfe": each} | where_it_ran()


def _seconds(found: Any) -> float:
    return float(found.cost.seconds)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    nfe: int = 25_000
    """network evaluations of a search"""
    seeds: tuple[int, ...] = tuple(range(100, 110))
    """of searches"""
    methods: tuple[str, ...] = tuple(ARMS)
    """which of them"""
    clock: int = 3000
    """network evaluations of a search by the clock; 0 for none"""
    blind: int = 5000
    """network evaluations of a search of the reward that no draft predicts; 0 for none"""
    out: Path = Path("runs/results/drafts/search.jsonl")
    """one row a cell"""
    work: Path = Path("runs/drafts_search")
    """the pool"""

    def run(self) -> int:
        torch.set_num_threads(1)
        cells = Cells(self.out, KEY)
        for method in self.methods:
            for seed in self.seeds:
                pool = Pool(self.work, seed)
                every: Sweep[Job] = Sweep(cells, lambda job, pool=pool: searched(job, pool), _words)
                every.fill(Job("search", target, method, self.nfe, seed) for target in SEARCHED)
                if self.blind and seed in self.seeds[:3]:
                    every.fill([Job("search", BLIND, method, self.blind, seed)])
            if self.clock:
                by_clock: Sweep[Job] = Sweep(cells, clocked, lambda row: f"{row['counted']:.1f} s counted")
                by_clock.fill([Job("clock", "compressibility", method, self.clock, self.seeds[0])])
        return 0


def _words(row: Row) -> str:
    return f"{row['best']:.4g}, {row['finished']} finished"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page of the rows."""

    rows: Path = Path("runs/results/drafts/search.jsonl")
    """what `run` wrote"""
    beside: Path = Path("experiments/results/mnist/mnist_search.jsonl")
    """rows of the other methods"""
    out: Path = Path("runs/results/drafts/search.md")
    """the page"""

    def run(self) -> int:
        write_text(self.out, report(Cells(self.rows, KEY).rows, Cells(self.beside, KEY).rows))
        print(self.out)
        return 0


def report(rows: Sequence[Row], beside: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    done = [row for row in rows if "error" not in row]
    if not done:
        raise ValueError("there are no rows: run the experiment first")
    every = [*done, *(row for row in beside if row["method"] in BESIDE and row["kind"] == "search")]
    parts = [
        "# Search with drafts",
        f"`mnist(num_steps={T})`; what the columns are is in the head of `experiments/drafts/search.py`. Costs are in "
        "evaluations of the network, drafts among them. Saved: best-of-N's cost at its own 100,000 NFE over the "
        "method's for the same mean reward, with 95 % bootstrap intervals over seeds; < and > where the budgets do not "
        f"reach. {FEW_SEEDS}",
        *(section(every, target) for target in SEARCHED),
        tree_section(every),
        blind_section(done),
        clock_section(done),
        f"Machine: {done[0]['machine']}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def section(rows: Sequence[Row], target: str) -> str:
    """A reward's table."""
    base, lines = by_seed(rows, target, BASE), []
    for method in (*ARMS, *BESIDE[1:]):
        if not (mine := by_seed(rows, target, method)):
            continue
        last = [each[-1] for each in mine.values()]
        saved = [_saved(mine, base, k) for k in CALLS]
        at = [value_at(_curve(list(mine.values()), 0), n) for n in (10_000, 25_000)]
        share = np.mean([row.get("draft_nfe", 0) / row["nfe"] for row in last])
        know = [row["correlation"] for row in last if row.get("correlation")]
        told = ", ".join(f"{m}: {np.mean([c[m] for c in know]):.2f}" for m in know[0]) if know else "-"
        lines.append([method, str(len(mine)), *(f"{b:.3g}" for b in at), *saved, f"{share:.0%}", told])
    heads = ("method", "seeds", "best at 10,000", "at 25,000", *(f"saved, k = {k}" for k in CALLS), "NFE of drafts",
             "correlation of scores")  # fmt: skip
    goal = value_at(_curve(list(base.values()), 0), GOAL)
    return f"## {target}\n\nBest-of-N at {GOAL:,} NFE: {goal:.3g}.\n\n{markdown_table(lines, heads)}"


def tree_section(rows: Sequence[Row]) -> str:
    """TreeSearch with drafts or looks beside TreeSearch, on the seeds that both have."""
    lines = []
    for target, method in product(SEARCHED, TREES):
        plain, mine = (by_seed(rows, target, name) for name in ("tree_search", method))
        if both := set(plain) & set(mine):
            goal = value_at(_curve(list(by_seed(rows, target, BASE).values()), 0), GOAL)
            lines.append([target, method, str(len(both)), *(_sooner(mine, plain, k, goal) for k in CALLS)])
    if not lines:
        return ""
    heads = ("reward", "method", "seeds", *(f"k = {k}" for k in CALLS))
    what = (
        f"Cost of TreeSearch over the method's for best-of-N's mean reward at {GOAL:,} NFE, on the same seeds, with "
        "95 % bootstrap intervals; - where one of both has not reached it."
    )
    return f"## In a tree\n\n{what}\n\n{markdown_table(lines, heads)}"


def _sooner(one: dict[int, list[Row]], other: dict[int, list[Row]], k: int, goal: float) -> str:
    seeds, chance = sorted(set(one) & set(other)), np.random.default_rng(0)

    def ratio(picks: Ids) -> float:
        spent = [nfe_for(_curve([each[seeds[i]] for i in picks], k), goal) for each in (other, one)]
        return spent[0] / spent[1] if spent[1] and not np.isinf(spent).all() else math.nan

    found = ratio(np.arange(len(seeds)))
    again = [ratio(chance.integers(0, len(seeds), len(seeds))) for _ in range(DRAWS)]
    low, high = np.nanquantile(again, [0.025, 0.975], method="nearest") if not np.isnan(again).all() else (found, found)
    return "-" if math.isnan(found) else f"{found:.2f} ({low:.2f} to {high:.2f})"


def _saved(one: dict[int, list[Row]], other: dict[int, list[Row]], k: int) -> str:
    seeds = sorted(set(one) & set(other))

    def curves(picks: Ids) -> tuple[Curve, Curve]:
        mine, base = ([each[seeds[i]] for i in picks] for each in (one, other))
        return _curve(mine, k), _curve(base, k)

    return compare(curves, len(seeds), goal=GOAL * (T + k) / T).saved


def _curve(seeds: Sequence[Sequence[Row]], k: int) -> Curve:
    """Mean best reward against NFE + k calls."""
    first = seeds[0][0]
    if "rewards" in first:
        pooled = np.concatenate([np.asarray(rows[0]["rewards"], float) for rows in seeds])
        at = grid(LOW, T * len(pooled))
        return at * (T + k) / T, expected_best(pooled, [max(1, int(n / T + 1e-9)) for n in at])
    if "curve" in first:
        known = [_steps(rows[0], k) for rows in seeds]
        at = grid(LOW, min(n[-1] for n, _ in known))
        return at, np.mean([best[np.maximum(np.searchsorted(n, at, "right") - 1, 0)] for n, best in known], axis=0)
    cost = np.mean([[row["nfe"] + k * row["reward_calls"] for row in rows] for rows in seeds], axis=0)
    return cost, np.mean([[row["best"] for row in rows] for rows in seeds], axis=0)


def _steps(row: Row, k: int) -> tuple[F64, F64]:
    """Costs at which the best rose, and the whole cost at the end."""
    each = row["reward_calls"] / row["nfe"]
    points = [p if len(p) == 3 else [p[0], p[0] * each, p[1]] for p in row["curve"]]
    nfe, calls, best = np.array([*points, [row["nfe"], row["reward_calls"], row["best"]]], float).T
    return nfe + k * calls, best


def blind_section(rows: Sequence[Row]) -> str:
    """What drafts cost where they predict nothing."""
    lines = []
    for method in ARMS:
        found = [row for row in rows if row["target"] == BLIND and row["method"] == method]
        if found:
            share = np.mean([row["draft_nfe"] / row["nfe"] for row in found])
            kept = np.mean([row["finished"] / (row["nfe"] // T) for row in found])
            lines.append([method, str(len(found)), f"{share:.1%}", f"{kept:.1%}"])
    if not lines:
        return ""
    heads = ("method", "seeds", "NFE of drafts", "samples, of best-of-N's")
    return f"## A reward that no draft predicts\n\n{markdown_table(lines, heads)}"


def clock_section(rows: Sequence[Row]) -> str:
    """Seconds beside what is counted."""
    found = [row for row in rows if row["kind"] == "clock"]
    if not found:
        return ""
    body = [
        [r["method"], f"{r['seconds']:.1f}", f"{r['counted']:.1f}", f"{r['seconds'] / r['counted']:.2f}"] for r in found
    ]
    heads = ("method", "seconds", "counted", "ratio")
    what = f"A reward that sleeps for {CALLS[-1]} evaluations a sample."
    return f"## By the clock\n\n{what}\n\n{markdown_table(body, heads)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("search", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
