"""The page of the rows: returns by data and learner, differences in pairs, and what the data are worth."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.offline_rl.study import kept
from experiments.offline_rl.synthetic import DATA
from experiments.shared.cells import Row
from experiments.shared.stats import over_seeds
from experiments.shared.tables import table

BASE = "guided"
LABELS = {
    "unguided": "unguided",
    "guided": "guided, published",
    "fk": "FK",
    "tree_sampling": "TreeSampling",
    "fk_chosen": "FK, λ chosen",
    "tree_sampling_chosen": "TreeSampling, λ chosen",
}
FIGURES = ("log π", "dynamics error", "reward error", "reward", "coverage", "distinct")


def page(rows: Sequence[Row]) -> str:
    """A section for each environment and protocol."""
    found = kept(rows)
    places = sorted({(row["env"], row["protocol"]) for row in found})
    parts = ["# Offline RL on synthetic data", WORDS]
    for env, protocol in places:
        here = [row for row in found if (row["env"], row["protocol"]) == (env, protocol)]
        picked = [row for row in rows if row.get("kind") == "choice" and row.get("protocol") == protocol]
        parts += _section(env, here, [row for row in picked if row["env"] == env])
    return "\n\n".join([*parts, ""])


WORDS = (
    "Normalised return (0 random, 100 expert: D4RL's reference returns, in mazes those of a scripted controller) of "
    "learners that go on from a warm-up on real data; means over seeds with 95 % intervals by Student's t. Differences "
    "are in pairs: same weights at the start, same draws, same first states. Every synthetic set costs n·T NFE at "
    "most. A kind whose chosen λ is the protocol's has no cells of its own."
)


def _section(env: str, rows: Sequence[Row], choices: Sequence[Row]) -> list[str]:
    learners = sorted({row["learner"] for row in rows}, reverse=True)
    columns = [f"{learner}, {mix}" for learner in learners for mix in ("synthetic", "mixed")]
    kinds = [kind for kind in DATA if any(row["data"] == kind for row in rows)]
    sizes, wrong = rows[0]["sizes"], [row for row in rows if row["diverged"]]
    told = ", ".join(f"{name} {value}" for name, value in sizes.items())
    chosen = "; ".join(
        f"{LABELS[row['data']]}, {row['learner']} {row['strength']:g} of {', '.join(row['scores'])}" for row in choices
    )
    lines = [
        f"## {env}",
        f"{told}; {_seeds(rows, learners)}; {rows[0]['machine']}. "
        f"Chosen strengths: {chosen or 'not chosen'}. "
        f"Cells that diverged, with their last finite weights: {len(wrong)} of {len(rows)}.",
    ]
    others = [kind for kind in kinds if kind not in ("real", BASE)]
    lines += ["Normalised return:", _table(rows, kinds, columns)]
    lines += ["Less published guidance's:", _table(rows, [*(k for k in kinds if k == "real"), *others], columns, BASE)]
    lines += ["The data, for the policies after the warm-up, ± half a 95 % interval over seeds and learners:"]
    return [*lines, _data_table(rows, kinds)]


def _seeds(rows: Sequence[Row], learners: Sequence[str]) -> str:
    found = {name: sorted({row["seed"] for row in rows if row["learner"] == name}) for name in learners}
    return "; ".join(f"{name}: seeds {', '.join(map(str, seeds))}" for name, seeds in found.items())


def _table(rows: Sequence[Row], kinds: Sequence[str], columns: Sequence[str], base: str | None = None) -> str:
    def scores(kind: str, column: str) -> dict[int, float]:
        learner, mix = column.split(", ")
        mix = "real" if kind == "real" else mix
        return {r["seed"]: r["score"] for r in rows if (r["learner"], r["data"], r["mix"]) == (learner, kind, mix)}

    def cell(kind: str, column: str) -> str | None:
        mine, theirs = scores(kind, column), scores(base, column) if base else {}
        shared = sorted(mine.keys() & theirs.keys()) if base else sorted(mine)
        values = [mine[s] - theirs.get(s, 0.0) for s in shared]
        return _text(values) if values else None

    names = {LABELS.get(kind, kind): kind for kind in kinds}
    return table(list(names), columns, lambda name, column: cell(names[name], column), corner="data")


def _text(values: Sequence[float]) -> str:
    found = over_seeds(values)
    return f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f})" if len(values) > 1 else f"{found.mean:.1f}"


def _data_table(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    def cell(kind: str, column: str) -> str | None:
        sets = {(r["learner"], r["seed"]): r["figures"][column] for r in rows if r["data"] == kind}
        if not sets:
            return None
        found = over_seeds(list(sets.values()))
        return f"{found.mean:.3g} ± {found.high - found.mean:.2g}" if len(sets) > 1 else f"{found.mean:.3g}"

    names = {LABELS.get(kind, kind): kind for kind in kinds}
    return table(list(names), FIGURES, lambda name, column: cell(names[name], column), corner="data")
