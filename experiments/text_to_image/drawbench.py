"""Best reward against NFE on 200 prompts: the protocol of DTS* on Stable Diffusion 1.5, for any kernel and reward.

    python -m experiments.text_to_image.drawbench run --prompts drawbench.csv --out runs/drawbench
    python -m experiments.text_to_image.drawbench report runs/drawbench

Published: 200 DrawBench prompts, ImageReward, 1k to 100k NFE a prompt, DDIM with eta = 1 and 50 steps, branching and
resampling at five equally spaced levels; best-of-N, FK steering (max potential, λ = 10, ESS-adaptive) and DTS* with
(C, α) = (2, .8), λ = 1, one selection at a time. The paper gives neither c_uct (1 here) nor the guidance scale (7.5).

DrawBench's prompts have no licence that we know of and are not shipped: experiments/prompts/README.md says where they
are. Without --prompts the run uses 200 prompts of our own, and every output says that they are not DrawBench.

A cell is a batch of prompts, a method and a seed. Best-of-N, DTS and DTS* run once, to the largest level; a level is
what the run had sampled when the next iteration would have exceeded it, which is the run of that smaller budget node
for node. FK steering has samples only at its end: it runs once a level, as published, one population of
K = floor(level / T), and so spends the sum of the levels where the others spend the largest. All methods start from
the same noise. Finished cells are rows of cells.jsonl and are not run again; a cell under way goes on from its run
folder. Methods, seeds and levels may be added later: a larger level goes on from run folders that --keep-runs left, and
starts again without. Wall clock is a share of a batch's, memory its whole.

Every row has, beside the best reward: rewards that were not optimised (--also), how many draws of x_T the k best
samples descend from, and how far apart they are.

Source: Diffusion Tree Sampling: Scalable Inference-time Alignment of Diffusion Models (Jain et al., 2025), appendix
F; Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022), appendix C.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from experiments.shared.cells import append, locked
from experiments.shared.sweep import command_line
from experiments.text_to_image import report as drawbench_report
from experiments.text_to_image.grades import Graders, extractor, grade, picture
from experiments.text_to_image.machine import Peak, machine
from experiments.text_to_image.prompts import OWN, select
from experiments.text_to_image.report import ROWS, read
from experiments.text_to_image.searches import Job, plan, search, slug
from treesearch.backends.base import Kernel, describe
from treesearch.cli.arguments import count
from treesearch.errors import StoreError
from treesearch.registry import registry as specs
from treesearch.registry.recipe import place
from treesearch.report.progress import Progress
from treesearch.rewards.base import Reward

KERNEL = (
    'diffusers("stable-diffusion-v1-5/stable-diffusion-v1-5", '
    'num_steps=50, eta=1.0, guidance_scale=7.5, dtype="float16")'
)
PROTOCOL = {
    "best_of_n": "best_of_n()",
    "fk": 'fk(potential="max", lam=10.0, ess_threshold=0.5, resampling="multinomial")',
    "dts_star": "dts_star(lam=1.0, c_uct=1.0, widening_c=2.0, widening_alpha=0.8, wave=1)",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Search, into a folder; run again to go on."""

    out: Path
    """folder of the results"""
    kernel: str = KERNEL
    """expression, as for `treesearch run`; of full-size random weights, where only time and memory matter,
    experiments.bench.architectures:random_weights("sdxl"), and likewise sd, sd3, flux, qwen_image, wan"""
    reward: str = "image_reward()"
    """what is optimised"""
    also: tuple[str, ...] = ("clip_score()",)
    """rewards that are not optimised, evaluated on the returned samples"""
    methods: tuple[str, ...] = tuple(PROTOCOL)
    """names of the protocol, or expressions such as "dts_star(c_uct=0.3)" """
    nfe: tuple[str, ...] = ("1k", "2.5k", "5k", "10k", "25k", "50k", "100k")
    """levels, network evaluations of a prompt"""
    prompts: Path | None = None
    """CSV with the columns Prompts and Category; the 200 of our own by default"""
    limit: int | None = None
    """this many prompts, evenly spaced in the file"""
    seeds: tuple[int, ...] = (0,)
    """of all noise"""
    top_k: int = 8
    """returned samples of a prompt"""
    features: str = "clip"
    """for the distance of samples: clip, clip:FOLDER_OR_HUB_ID (1 - cosine), pixels (root mean square)"""
    prompts_per_batch: int = 16
    """prompts that share their forward passes"""
    batch_size: int = 64
    """rows of a forward pass"""
    device: str | None = None
    """of the kernel, such as cuda; where its expression says by default"""
    pictures: bool = True
    """write the k best samples of the largest level"""
    keep_runs: bool = False
    """keep the run folders of finished cells"""

    def run(self) -> int:
        levels = self._levels()
        chosen, label, known = select(self.prompts or OWN, self.limit)
        made = {name: specs.method(PROTOCOL.get(name, name)) for name in self.methods}
        reward, others = specs.reward(self.reward), self._others()
        kernel = place(specs.kernel(self.kernel), self.device)
        graders = Graders(others, *extractor(self.features, describe(kernel).device), self.top_k, label)
        jobs = list(plan(made, levels, chosen, self.seeds, self.prompts_per_batch, describe(kernel).num_steps))
        header = {"kind": "header", "label": label, "prompts": known, "protocol": self._protocol()}
        session = machine(kernel) | {"methods": {name: repr(method) for name, method in made.items()}}
        print(f"{label}\n{len(chosen)} prompts, {len(jobs)} searches")
        with locked(self.out):
            done = begin(self.out, header, session)
            for i, job in enumerate(jobs):
                if not job.keys <= done:
                    with Progress(f"{i + 1}/{len(jobs)} {job.label} {job.levels[-1]} x {len(job.prompts)}") as live:
                        self._cell(job, kernel, reward, graders, live)
        print(f"python -m experiments.text_to_image.drawbench report {self.out}")
        return 0

    def _levels(self) -> tuple[int, ...]:
        for name in ("top_k", "prompts_per_batch", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("methods", "nfe", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")
        return tuple(sorted({n for text in self.nfe if (n := count(text)) is not None}))

    def _others(self) -> dict[str, Reward]:
        """Rewards that were not optimised.

        Raises:
            ValueError: there is none, or one of them is part of what is optimised.
        """
        if not self.also:
            raise ValueError("also is empty: a search is judged by a reward that it did not optimise, name one")
        for expression in self.also:
            if shared := terms(expression) & terms(self.reward):
                raise ValueError(
                    f"--also {expression!r} holds {', '.join(sorted(shared))}, which --reward optimises: name another"
                )
        return {expression: specs.reward(expression) for expression in self.also}

    def _protocol(self) -> dict[str, Any]:
        """What must not change when a run goes on; methods, levels and seeds may be added."""
        names = ("kernel", "reward", "also", "top_k", "features", "prompts_per_batch")
        return json.loads(json.dumps({name: getattr(self, name) for name in names}))

    def _cell(self, job: Job, kernel: Kernel, reward: Reward, graders: Graders, live: Progress) -> None:
        """One search and its rows."""
        folder, peak = self.out / "runs" / job.folder, Peak(describe(kernel).device)
        result = search(job, kernel, reward, folder, self.batch_size, live)
        known = {"kind": "run", "folder": job.folder, "label": job.label, "seed": job.seed, "levels": job.levels}
        found = {"cost": result.cost.as_dict(), "device": peak.name, "memory_mb": peak.megabytes()}
        began = time.perf_counter()
        rows = [row for i in range(len(job.prompts)) for row in grade(job, result, i, graders)]
        rows = [{"kind": "row", "set": graders.label, "memory_mb": found["memory_mb"]} | row for row in rows]
        if self.pictures and job.levels[-1] == self._levels()[-1]:
            for prompt, task in zip(job.prompts, result.tasks, strict=True):
                file = self.out / "pictures" / slug(job.label) / f"seed{job.seed}" / f"{prompt.index:03d}.png"
                picture(task.best(graders.top_k)[0], file)
        found["grading_seconds"] = round(time.perf_counter() - began, 3)
        append(self.out / ROWS, [known | found, *rows])
        if not self.keep_runs:
            shutil.rmtree(folder)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables and a figure from what a run has finished."""

    folder: Positional[Path]

    def run(self) -> int:
        print(drawbench_report.write(self.folder))
        return 0


def terms(expression: str) -> set[str]:
    """Rewards that an expression is made of, as calls; a plug-in is one term."""
    try:
        nodes = list(ast.walk(ast.parse(expression.strip(), mode="eval")))
    except SyntaxError:
        return {expression.strip()}
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    called = {id(call.func) for call in calls}
    bare = {f"{node.id}()" for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
    return {ast.unparse(call) for call in calls} | bare


# files


def begin(out: Path, header: dict[str, Any], session: dict[str, Any]) -> set[tuple[str, int, int, int]]:
    """Open a folder and return the rows that it has.

    Raises:
        StoreError: it holds a run of another protocol.
    """
    file = out / ROWS
    if not file.exists() or not (records := read(out)):
        append(file, [header, session])
        return set()
    unchanged(out, fixed(records[0]), fixed(header))
    for earlier in (r for r in records if r["kind"] == "session"):
        unchanged(out, earlier["methods"], session["methods"])
    append(file, [session])
    return {(r["method"], r["seed"], r["prompt"], r["level"]) for r in records if r["kind"] == "row"}


def fixed(header: dict[str, Any]) -> dict[str, Any]:
    """What all sessions of a folder share."""
    return header["protocol"] | {"prompts": header["prompts"]["sha256"], "limit": header["prompts"]["count"]}


def unchanged(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises:
    StoreError: something that both name differs.
    """
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise StoreError(f"{out} was begun with {key} = {old[key]}, not {new[key]}: name another folder with --out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("drawbench", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
