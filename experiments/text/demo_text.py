"""make demo-text: the shipped text model towards positive film reviews and towards a JSON schema, in a minute or two.

    python -m experiments.text.demo_text

Prints texts with their rewards: unguided draws, what `TreeSampling` draws of the law that a reward tilts, and the best
that `TreeSearch` finds, each with what a judge says that no search reads; then records of sentences, unsteered and
steered to what stands in them. The same is in texts.jsonl.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import treesearch as ts
from experiments.text import corpus
from experiments.text.bed import JUDGES
from treesearch.backends import scaffold, small_text
from treesearch.rewards import grounding, json_schema, ngrams, text_length
from treesearch.runs.files import write_text
from treesearch.text import plain

SENTENCES = (  # the first has words that records of the training had, the others names that none had
    "ada smith was born in paris .",
    "ada green lived in oslo in 1901 .",
    "carl turner came to us in 1950 in rome .",
)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Search over texts."""

    weights: str = "text.safetensors"
    """of the model"""
    num_steps: int = 16
    """T of reviews; records take half"""
    length: int = 32
    """tokens of a review"""
    prompt: str = "the film"
    """what reviews begin with"""
    lam: float = 8.0
    """λ of the tilted law"""
    nfe: int = 1_600
    """budget of a search of reviews"""
    record_nfe: int = 128
    """budget of a sentence's record"""
    seed: int = 0
    """of the searches"""
    out: Path = Path("runs/demo-text")
    """folder of the results"""

    def run(self) -> int:
        torch.set_num_threads(1)
        self.out.mkdir(parents=True, exist_ok=True)
        rows = [*self._reviews(), *self._records()]
        write_text(self.out / "texts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(self.out / "texts.jsonl")
        return 0

    def _reviews(self) -> list[dict[str, Any]]:
        kernel = small_text(self.weights, num_steps=self.num_steps, length=self.length)
        reward = ngrams("text_sentiment.safetensors", "positive") + 0.1 * text_length(12).clip(-10)
        judge = ngrams(str(JUDGES / "text_sentiment_judge.safetensors"), "positive")
        how = {"prompts": [self.prompt], "seed": self.seed}
        unguided = ts.search(kernel, reward, ts.BestOfN(), budget=ts.Budget(nfe=8 * self.num_steps), **how)
        tilted = ts.search(kernel, reward, ts.TreeSampling(lam=self.lam), budget=ts.Budget(nfe=self.nfe), **how)
        best = ts.search(kernel, reward, ts.TreeSearch(looks="endpoints"), budget=ts.Budget(nfe=self.nfe), **how)
        shown = {
            "unguided": unguided.samples[:3],
            f"drawn, λ = {self.lam:g}": tilted.draw(3, seed=self.seed),
            "the best found": best.best(3)[0],
        }
        print(f"Positive reviews that begin with {self.prompt!r}: reward, and the judge's log p(positive)\n")
        rows = []
        for name, texts in shown.items():
            rewards, judged = reward(list(texts)).tolist(), judge(list(texts)).tolist()
            for text, value, said in zip(texts, rewards, judged, strict=True):
                rows.append({"what": name, "text": text, "reward": value, "judge": said})
        self._print(rows)
        return rows

    def _records(self) -> list[dict[str, Any]]:
        kernel = small_text(self.weights, num_steps=self.num_steps // 2)
        records = scaffold(kernel, corpus.SCHEMA, blanks=corpus.FIELD, null=corpus.NONE)
        reward = 0.5 * grounding() + 0.5 * json_schema(corpus.SCHEMA)
        how = {"prompts": list(SENTENCES), "seed": self.seed}
        one = ts.Budget(nfe=len(SENTENCES) * kernel.num_steps)
        one_draw = ts.search(records, reward, ts.BestOfN(), budget=one, **how)
        method, budget = ts.FeynmanKac(lam=10.0), ts.Budget(nfe=len(SENTENCES) * self.record_nfe)
        steered = ts.search(records, reward, method, budget=budget, **how)
        print("\nRecords of sentences: half of the reward is the schema, half that values stand in the sentence\n")
        rows = []
        for name, result in (("one draw", one_draw), ("steered", steered)):
            for task, sentence in zip(result.tasks, SENTENCES, strict=True):
                (text,), (value,) = task.best(1)
                rows.append({"what": f"{name}: {sentence}", "text": text, "reward": float(value)})
        self._print(rows)
        return rows

    def _print(self, rows: Sequence[dict[str, Any]]) -> None:
        last = ""
        for row in rows:
            if row["what"] != last:
                print(last := row["what"])
            judge = f" {row['judge']:7.3f}" if "judge" in row else ""
            print(f"    {row['reward']:7.3f}{judge}   {plain(row['text'])}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit code."""
    import tyro

    return tyro.cli(Demo, args=argv, description=__doc__).run()


if __name__ == "__main__":
    sys.exit(main())
