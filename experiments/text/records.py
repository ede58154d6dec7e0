"""Records from sentences: S³ beside S² and no scaffold, then with search against what is made up.

    python -m experiments.text.records run
    python -m experiments.text.records report

Sentences are of made-up people (`experiments.text.corpus`) whose name, year or place is left out in three of ten;
the model has learnt such sentences, not these. Of "new" people names and places are words that no record of its
training had. A cell is a batch of sentences of one seed.

    no scaffold     the record is written behind the sentence, most confident positions first
    S²              structure stands from the start, every field is filled: the null word is never drawn
    S³              the same, and what is left of a field, or all of it, says the null word
    S³, FK          four particles, rewarded by grounding, at temperature 1, in eight steps
    S³, order       DTS over which field is written first (`FieldOrder`), as many NFE
    hot             the same at temperature 2, sixteen rollouts: alone (the best by grounding), or as particles

    adherence       share of samples that are JSON and fit the schema
    F1              of the words of values against those of what the sentence says, as far as it fits into a field
    exact           share of the fields that the sentence tells of whose value is that and nothing else
    hallucination   share of fields that the sentence says nothing of and that have a value
    invented        share of values that do not stand in the sentence
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import treesearch as ts
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.stats import mean_se
from experiments.shared.sweep import Sweep, command_line, reporting
from experiments.text import corpus
from treesearch.backends import scaffold, small_text
from treesearch.backends.text.turns import FieldOrder
from treesearch.report.tables import markdown_table
from treesearch.rewards import grounding, json_schema
from treesearch.rewards.analytic import constant

KEY = ("people", "method", "steps", "seed")
COLD, HOT = 0.01, 2.0  # temperatures, the first all but argmax
STEPS = (2, 8, 16, 32)
PEOPLE = {"known": corpus.KNOWN, "new": corpus.NEW}
PARTICLES = 4
SEARCH_STEPS = 8
TURNS = 6  # steps of the fields in turn, two for each
NAMES = tuple(corpus.SCHEMA["properties"])


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    people: str
    method: str
    steps: int
    seed: int


def sentences_of(people: str, n: int, seed: int) -> list[tuple[str, dict[str, str | None]]]:
    """Sentences and what they say."""
    draw = random.Random(f"records/{seed}")
    return [corpus.person(draw, PEOPLE[people]) for _ in range(n)]


@cache
def _model(weights: str, steps: int) -> Any:
    return small_text(weights, num_steps=steps)


def records(kernel: Any, null: str | None = corpus.NONE) -> Any:
    return scaffold(kernel, corpus.SCHEMA, blanks=corpus.FIELD, null=null)


def unscaffolded(kernel: Any) -> Any:
    return kernel.with_settings(reveal="confidence", temperature=COLD)


def s2(kernel: Any) -> Any:
    never = sorted({*kernel.plain(corpus.NONE), kernel.words.filler, kernel.words.tokenizer.eos_token_id})
    return records(kernel.with_settings(reveal="confidence", temperature=COLD, forbid=never), None)


def s3(kernel: Any) -> Any:
    return records(kernel.with_settings(reveal="confidence", temperature=COLD))


def warm(kernel: Any) -> Any:
    return records(kernel.with_settings(reveal="confidence"))


def hot(kernel: Any) -> Any:
    return records(kernel.with_settings(reveal="confidence", temperature=HOT))


def turns(kernel: Any) -> Any:
    return FieldOrder(records(kernel))


ALONE: dict[str, Callable[[Any], Any]] = {"no scaffold": unscaffolded, "S²": s2, "S³": s3}
SEARCHED: dict[str, tuple[Callable[[Any], Any], Any, int]] = {
    "S³, one draw": (warm, ts.BestOfN(), 1),
    "S³, best of 4": (warm, ts.BestOfN(), PARTICLES),
    "S³, FK": (warm, ts.FeynmanKac(num_particles=PARTICLES, lam=10.0, schedule=(6, 4, 2, 0)), PARTICLES),
    "S³, order": (
        turns,
        ts.DiffusionTreeSearch(branch_at=(TURNS, TURNS - 2, TURNS - 4), widening_c=1.0, widening_alpha=0.5),
        PARTICLES,
    ),
    "S³, hot, best of 16": (hot, ts.BestOfN(), 16),
    "S³, hot, FK": (hot, ts.FeynmanKac(num_particles=16, lam=10.0, schedule=(6, 4, 2, 0)), 16),
}


def made(job: Job, weights: str, sentences: Sequence[str]) -> tuple[list[str], Any]:
    """The best text of each sentence, and what it cost."""
    if job.method in ALONE:
        kernel, method, rollouts, reward = ALONE[job.method](_model(weights, job.steps)), ts.BestOfN(), 1, constant(0.0)
    else:
        around, method, rollouts = SEARCHED[job.method]
        kernel, reward = around(_model(weights, TURNS if around is turns else job.steps)), grounding()
    budget = ts.Budget(nfe=rollouts * job.steps * len(sentences))
    result = ts.search(kernel, reward, method, prompts=sentences, budget=budget, seed=job.seed)
    return [task.best(1)[0][0] for task in result.tasks], result.cost


def searched(job: Job, weights: str, sentences: int) -> Row:
    """A cell's row."""
    began = time.monotonic()
    told = sentences_of(job.people, sentences, job.seed)
    texts, cost = made(job, weights, [sentence for sentence, _ in told])
    answers = [text.removeprefix(sentence).strip() for text, (sentence, _) in zip(texts, told, strict=True)]
    fits = json_schema(corpus.SCHEMA)(answers) == 1
    words = _model(weights, job.steps).words
    found = [parsed(answer) for answer in answers]
    counts = counted(found, [fitted(says, words) for _, says in told])
    counts |= stand(found, [sentence for sentence, _ in told])
    spent = {"nfe": cost.nfe, "reward_calls": cost.reward_calls, "seconds": time.monotonic() - began}
    row = job.row | {"sentences": sentences, "fits": int(fits.sum())} | counts | spent
    return row | {"some": [told[0][0], answers[0]]} | where_it_ran()


def parsed(answer: str) -> Mapping[str, Any]:
    """A record, its null words stripped as a scaffold does; an empty one where it is none."""
    try:
        found = json.loads(answer)
    except ValueError:
        return {}
    return {name: stripped(value) for name, value in found.items()} if isinstance(found, dict) else {}


def stripped(value: Any) -> Any:
    """A text without null words, None where nothing else is in it."""
    if not isinstance(value, str):
        return value
    return " ".join(word for word in value.split() if word != corpus.NONE) or None


def counted(found: Sequence[Mapping[str, Any]], told: Sequence[Mapping[str, str | None]]) -> dict[str, int]:
    """Words given, right and told of; fields told of, exactly right, absent, and absent with a value."""
    counts = dict.fromkeys(("given", "right", "told", "fields", "exact", "absent", "made_up"), 0)
    for record, says in zip(found, told, strict=True):
        for name in NAMES:
            value, true = record.get(name), says[name]
            said, meant = (Counter(str(text).split()) for text in (value or "", true or ""))
            counts["given"] += said.total()
            counts["told"] += meant.total()
            counts["right"] += (said & meant).total()
            counts["fields"] += true is not None
            counts["exact"] += true is not None and value == true
            counts["absent"] += true is None
            counts["made_up"] += true is None and value is not None
    return counts


def stand(found: Sequence[Mapping[str, Any]], sentences: Sequence[str]) -> dict[str, int]:
    """Values, and those that stand in their sentence."""
    values = [(str(r[name]), text) for r, text in zip(found, sentences, strict=True) for name in NAMES if r.get(name)]
    return {"values": len(values), "stand": sum(value in text for value, text in values)}


def fitted(says: Mapping[str, str | None], words: Any) -> dict[str, str | None]:
    """What a sentence says, as far as it fits into fields."""
    cut = {name: words.plain(value)[: corpus.FIELD] for name, value in says.items() if value is not None}
    return dict.fromkeys(says) | {name: words.texts(torch.tensor([row]))[0] for name, row in cut.items()}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    weights: str = "text.safetensors"
    """of the model"""
    sentences: int = 24
    """of a cell"""
    steps: tuple[int, ...] = STEPS
    """T without a search"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    out: Path = Path("runs/results/text/records.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        every: Sweep[Job] = Sweep(
            Cells(self.out, KEY, {"weights": self.weights, "sentences": self.sentences}),
            lambda job: searched(job, self.weights, self.sentences),
            lambda row: f"{row['fits']} of {row['sentences']} fit, {row['exact']} of {row['fields']} exact",
        )
        for seed, people in itertools.product(self.seeds, PEOPLE):
            every.fill(Job(people, method, steps, seed) for steps in self.steps for method in ALONE)
            every.fill(Job(people, method, SEARCH_STEPS, seed) for method in SEARCHED)
        return 0


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no rows: run the experiment first")
    sentences = rows[0]["sentences"]
    parts = [
        "# Records from sentences",
        f"{len({row['seed'] for row in rows})} seeds of {sentences} sentences; mean ± standard error over seeds. What "
        "rows and columns are is in the head of `experiments/text/records.py`. Fields in turn take "
        f"{TURNS} steps, and so five rollouts for the NFE of four.",
    ]
    for people in dict.fromkeys(row["people"] for row in rows):
        parts += [f"## {people.capitalize()} people", section([row for row in rows if row["people"] == people])]
    return "\n\n".join([*parts, f"Machine: {rows[0]['machine']}."]) + "\n"


def section(rows: Sequence[Row]) -> str:
    """A table."""
    lines = []
    for method, steps in dict.fromkeys((row["method"], row["steps"]) for row in rows):
        mine = [row for row in rows if row["method"] == method and row["steps"] == steps]
        shares = [
            [row["fits"] / row["sentences"] for row in mine],
            [2 * row["right"] / max(row["given"] + row["told"], 1) for row in mine],
            [row["exact"] / max(row["fields"], 1) for row in mine],
            [row["made_up"] / max(row["absent"], 1) for row in mine],
            [1 - row["stand"] / max(row["values"], 1) for row in mine],
            [row["nfe"] / row["sentences"] for row in mine],
        ]
        lines.append([method, str(steps), *(mean_se(values).text() for values in shares)])
    lines.sort(key=lambda line: (line[0] not in ALONE, int(line[1])))
    return markdown_table(
        lines, ("method", "steps", "adherence", "F1", "exact", "hallucination", "invented", "NFE a sentence")
    )


Report = reporting("text/records", KEY, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("records", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
