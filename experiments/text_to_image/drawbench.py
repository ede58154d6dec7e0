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
import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor
from tyro.conf import Positional

import treesearch as ts
from experiments.text_to_image import report as drawbench_report
from experiments.text_to_image.report import ROWS, read
from treesearch.backends.base import Kernel, describe
from treesearch.cli.arguments import count
from treesearch.core.noise import root_key
from treesearch.core.tree import Tree
from treesearch.errors import StoreError, TreeSearchError
from treesearch.methods.base import Method
from treesearch.registry import registry as specs
from treesearch.report.media import write_image
from treesearch.report.progress import Progress
from treesearch.results.result import SearchResult, TaskResult
from treesearch.rewards.base import Reward, RewardError

KERNEL = (
    'diffusers("stable-diffusion-v1-5/stable-diffusion-v1-5", '
    'num_steps=50, eta=1.0, guidance_scale=7.5, dtype="float16")'
)
PROTOCOL = {
    "best_of_n": "best_of_n()",
    "fk": 'fk(potential="max", lam=10.0, ess_threshold=0.5, resampling="multinomial")',
    "dts_star": "dts_star(lam=1.0, c_uct=1.0, widening_c=2.0, widening_alpha=0.8, wave=1)",
}
OWN = Path(__file__).parents[1] / "prompts" / "own200.csv"
OWN_LABEL = "NOT DrawBench: prompts written for this repository in its eleven categories"
OFFICIAL_LABEL = "DrawBench (Saharia et al., 2022)"
OTHER_LABEL = "NOT DrawBench: prompts of the user's file"
SIZES = {  # of the official file
    "Colors": 25,
    "Conflicting": 10,
    "Counting": 19,
    "DALL-E": 20,
    "Descriptions": 20,
    "Gary Marcus et al.": 10,
    "Misspellings": 10,
    "Positional": 20,
    "Rare Words": 7,
    "Reddit": 38,
    "Text": 21,
}
COLORS_DIGEST = "8f21418225842008e713cd2434adbc2973cd1b1c289044707f8abaa89a9ca6a1"  # of its first category
CLIP = "openai/clip-vit-large-patch14"
ANYTIME = (ts.BestOfN, ts.DiffusionTreeSampling, ts.DiffusionTreeSearch)
PACKAGES = ("treesearch", "torch", "diffusers", "transformers", "numpy")
Features = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Prompt:
    """A line of a prompt file."""

    index: int
    text: str
    category: str


@dataclass(frozen=True)
class Job:
    """A search over a batch of prompts that fills one or more levels."""

    label: str
    method: Method
    seed: int
    prompts: tuple[Prompt, ...]
    levels: tuple[int, ...]

    @property
    def keys(self) -> set[tuple[str, int, int, int]]:
        """What identifies its rows."""
        return {(self.label, self.seed, p.index, n) for p, n in product(self.prompts, self.levels)}

    @property
    def folder(self) -> str:
        """Name of its run folder; a change of method, seed or prompts is another one."""
        known = json.dumps([repr(self.method), [p.text for p in self.prompts]])
        digest = hashlib.sha256(known.encode()).hexdigest()[:10]
        return f"{slug(self.label)}-{digest}-seed{self.seed}-prompt{self.prompts[0].index:03d}"


@dataclass(frozen=True)
class Graders:
    """What looks at the samples that a cell returns.

    Args:
        others: rewards that were not optimised, by their expressions.
        features: samples -> (n, d) in float64, compared by `distance`.
        distance: features -> distances (n, n).
        top_k: how many of the best samples.
        label: what the prompts are, for every row.
    """

    others: dict[str, Reward]
    features: Features
    distance: Callable[[Tensor], Tensor]
    top_k: int
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Search, into a folder; run again to go on."""

    out: Path
    """folder of the results"""
    kernel: str = KERNEL
    """expression, as for `treesearch run`"""
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
        kernel = specs.place(specs.kernel(self.kernel), self.device)
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
        append(self.out, [known | found, *rows])
        if not self.keep_runs:
            shutil.rmtree(folder)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables and a figure from what a run has finished."""

    folder: Positional[Path]

    def run(self) -> int:
        print(drawbench_report.write(self.folder))
        return 0


# prompts


def select(file: Path, limit: int | None) -> tuple[list[Prompt], str, dict[str, Any]]:
    """The prompts of a run, how its outputs name them, and what identifies them."""
    found = read_prompts(file)
    if limit is not None and not 1 <= limit <= len(found):
        raise ValueError(f"limit is {limit}, expected 1 to {len(found)}, the prompts of {file.name}")
    n = len(found) if limit is None else limit
    official = is_official(found)
    label = OFFICIAL_LABEL if official else OWN_LABEL if file == OWN else OTHER_LABEL
    digest = hashlib.sha256("\n".join(p.text for p in found).encode()).hexdigest()
    chosen = [found[i * len(found) // n] for i in range(n)]
    known = {"file": file.name, "sha256": digest, "official": official, "of": len(found), "count": n}
    return chosen, label, known


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts and categories of a CSV file.

    Raises:
        ValueError: no such file, a missing column, an empty prompt, or none at all.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {file}: {error}") from error
    reader = csv.DictReader(text.splitlines())
    columns = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
    if lacking := [name for name in ("Prompts", "Category") if name.lower() not in columns]:
        raise ValueError(f"{file} lacks the column {lacking[0]}: expected Prompts,Category, got {reader.fieldnames}")
    found = []
    for line in reader:
        prompt, category = ((line[columns[name]] or "").strip() for name in ("prompts", "category"))
        if not prompt:
            raise ValueError(f"{file}, line {reader.line_num}: the prompt is empty, remove the line")
        found.append(Prompt(len(found), prompt, category))
    if not found:
        raise ValueError(f"{file} holds no prompts below its header")
    return found


def is_official(prompts: Sequence[Prompt]) -> bool:
    """Whether these are DrawBench's: sizes of its categories, and the text of the first one."""
    texts = sorted(p.text.lower() for p in prompts if p.category == "Colors")
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return Counter(p.category for p in prompts) == SIZES and digest == COLORS_DIGEST


# searches


def plan(
    methods: dict[str, Method],
    levels: tuple[int, ...],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    per_batch: int,
    num_steps: int,
) -> Iterator[Job]:
    """Every search, batch by batch, so that what is there after an interruption can be compared.

    Raises:
        ValueError: a level below one rollout.
    """
    if levels[0] < num_steps:
        raise ValueError(f"nfe {levels[0]} is below one rollout of this kernel: the minimum is {num_steps}")
    for first, seed in product(range(0, len(prompts), per_batch), seeds):
        batch = tuple(prompts[first : first + per_batch])
        for label, method in methods.items():
            if anytime(method):
                yield Job(label, method, seed, batch, levels)
            else:
                yield from (Job(label, sized(method, n // num_steps), seed, batch, (n,)) for n in levels)


def anytime(method: Method) -> bool:
    """Whether the first part of a long run is the run of a smaller budget."""
    return isinstance(method, ANYTIME) and method.mode == "wave"


def sized(method: Method, particles: int) -> Method:
    """A method with one population of the given size, unless its own is given."""
    if getattr(method, "num_particles", 0) is None:
        return replace(method, num_particles=particles)  # type: ignore[type-var]
    return method


def search(job: Job, kernel: Kernel, reward: Reward, folder: Path, batch_size: int, live: Progress) -> SearchResult:
    """Run a job, or go on with it."""
    budget = ts.Budget(nfe=job.levels[-1] * len(job.prompts))
    if (folder / "run.json").exists():
        return ts.resume(folder, kernel, reward, budget=budget, batch_size=batch_size, callbacks=[live])
    return ts.search(
        kernel,
        reward,
        job.method,
        prompts=[p.text for p in job.prompts],
        budget=budget,
        seed=root_key(job.seed, job.prompts[0].index),  # tasks are numbered within a batch: batches draw apart
        batch_size=batch_size,
        store=folder,
        callbacks=[live],
    )


def spent(tree: Tree, num_steps: int) -> NDArray[np.int64]:
    """NFE up to each sample of an anytime search, in order of creation.

    An iteration adds a chain of nodes that ends in a sample; it costs the level that the chain leaves from.
    """
    t = tree.t.astype(np.int64)
    first = np.flatnonzero(np.concatenate([[False, True], t[1:-1] == 0])[: len(t)])
    return np.minimum(t[tree.parent[first]], num_steps).cumsum()


# grades


def grade(job: Job, result: SearchResult, i: int, graders: Graders) -> Iterator[dict[str, Any]]:
    """Rows of one prompt, one a level."""
    task, batch = result.tasks[i], len(job.prompts)
    if anytime(job.method):
        price = [spent(t.tree, int(t.tree.t[0]) - 1) for t in result.tasks]
        cuts = [[int(np.searchsorted(p, level, side="right")) for p in price] for level in job.levels]
        nfe = [[int(p[n - 1]) for p, n in zip(price, cut, strict=True)] for cut in cuts]
        calls = [cut[i] for cut in cuts]
    else:
        cuts = [[len(t.leaves) for t in result.tasks]]
        nfe = [[result.cost.nfe // batch] * batch]
        calls = [int((~np.isnan(task.tree.reward)).sum())]
    seen = look(task, [cut[i] for cut in cuts], graders)
    known = {"method": job.label, "kind_of_method": type(job.method).__name__, "seed": job.seed}
    known |= {"prompt": job.prompts[i].index, "text": job.prompts[i].text, "category": job.prompts[i].category}
    for level, cost, scored, found in zip(job.levels, nfe, calls, seen, strict=True):
        yield known | {
            "level": level,
            "nfe": cost[i],
            "reward_calls": scored,
            "backward_nfe": round(cost[i] * result.cost.backward_nfe / result.cost.nfe),
            "seconds": round(elapsed(result.history, sum(cost)) / batch, 4),
            **found,
        }


def look(task: TaskResult, cuts: Sequence[int], graders: Graders) -> list[dict[str, Any]]:
    """Best reward, other rewards, roots and distances of the k best among the first n samples, for each n."""
    rewards = task.rewards.numpy()
    tops = [np.argsort(-rewards[:n], kind="stable")[: graders.top_k] for n in cuts]
    union = np.unique(np.concatenate(tops))
    samples, prompts = task.fetch(task.leaves[union]), [task.prompt] * len(union)
    others = {name: other(samples, prompts).numpy() for name, other in graders.others.items()}
    gaps = graders.distance(graders.features(samples))
    found = []
    for n, top in zip(cuts, tops, strict=True):
        at, k = np.searchsorted(union, top), len(top)
        between = gaps[np.ix_(at, at)].sum() / (k * (k - 1)) if k > 1 else None
        found.append(
            {
                "samples": n,
                "k": k,
                "best": float(rewards[top[0]]),
                "top": float(rewards[top].mean()),
                "also_best": {name: float(values[at[0]]) for name, values in others.items()},
                "also_top": {name: float(values[at].mean()) for name, values in others.items()},
                "roots": len(np.unique(task.tree.roots(task.leaves[top]))),
                "distance": None if between is None else float(between),
            }
        )
    return found


def elapsed(history: Sequence[dict[str, Any]], nfe: int) -> float:
    """Seconds until a search had spent this much, linear between its waves."""
    return float(np.interp(nfe, [0, *(h["nfe"] for h in history)], [0.0, *(h["seconds"] for h in history)]))


def extractor(spec: str, device: torch.device) -> tuple[Features, Callable[[Tensor], Tensor]]:
    """Features and their distance.

    Raises:
        ValueError: an unknown extractor.
        CheckpointError: CLIP's weights are absent; nothing has been spent yet.
    """
    if spec == "pixels":
        return flat_pixels, lambda x: torch.cdist(x, x) / x.shape[1] ** 0.5
    name, _, checkpoint = spec.partition(":")
    if name != "clip":
        raise ValueError(f"unknown features {spec!r}: expected clip, clip:FOLDER_OR_HUB_ID or pixels")
    return clip_features(checkpoint or CLIP, str(device)), lambda x: 1 - x @ x.T


def flat_pixels(samples: Any) -> Tensor:
    """Pixels of images, (n, c h w)."""
    if not isinstance(samples, Tensor):
        from treesearch.rewards.images.vision import pixels

        samples = pixels(samples)
    return samples.double().flatten(1).cpu()


def clip_features(checkpoint: str, device: str) -> Features:
    """Unit image embeddings of a CLIP model of transformers."""
    from treesearch.rewards.images.clip import Clip

    clip = Clip(checkpoint=checkpoint, processor=checkpoint)

    @torch.no_grad()
    def features(samples: Any) -> Tensor:
        parts = [clip.images(samples[start : start + 32], device) for start in range(0, len(samples), 32)]
        return torch.cat(parts).double().cpu()

    features(torch.zeros(1, 3, 64, 64))  # absent weights are an error before anything is spent
    return features


def picture(samples: Any, file: Path) -> None:
    """One row of images, if the samples are images."""
    if isinstance(samples, Tensor) and samples.ndim == 4 and samples.shape[1] in (1, 3):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_image(torch.cat(list(samples), 2), file)


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
        file.write_bytes(b"")
        append(out, [header, session])
        return set()
    with open(file, "r+b") as whole:  # a kill may leave part of a line, which would spoil the next one
        whole.truncate(whole.read().rfind(b"\n") + 1)
    unchanged(out, fixed(records[0]), fixed(header))
    for earlier in (r for r in records if r["kind"] == "session"):
        unchanged(out, earlier["methods"], session["methods"])
    append(out, [session])
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


def append(out: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to the folder's JSONL at once."""
    with open(out / ROWS, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds a folder for one process.

    Raises:
        StoreError: another one has it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / "lock")
        lock.acquire(timeout=0)
    except OSError as error:
        if isinstance(error, Timeout):
            raise StoreError(f"{out} is in use by another process: wait for it, or name another with --out") from error
        raise StoreError(f"cannot make the folder {out}: {error.strerror}") from error
    with lock:
        yield


def slug(text: str) -> str:
    """A label as part of a file name; labels that differ stay apart."""
    plain = re.sub(r"\W+", "_", text).strip("_")
    return plain if plain == text else f"{plain[:40]}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


# machine


class Peak:
    """Peak memory from here on: of the GPU where the kernel is on one, else of this process since its start."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.name = torch.cuda.get_device_name(device) if self._cuda is not None else "cpu, whole process"
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def megabytes(self) -> float:
        """In units of 2^20 bytes."""
        if self._cuda is not None:
            return round(torch.cuda.max_memory_allocated(self._cuda) / 2**20, 1)
        unit = 1 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def machine(kernel: Kernel) -> dict[str, Any]:
    """Record of where and with what a session computes."""
    spec = describe(kernel)
    device = torch.cuda.get_device_name(spec.device) if spec.device.type == "cuda" else platform.machine()
    return {
        "kind": "session",
        "machine": {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "num_steps": spec.num_steps,
        "rows_per_nfe": spec.rows_per_nfe,
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    try:
        command = tyro.extras.subcommand_cli_from_dict({"run": Run, "report": Report}, args=argv, description=__doc__)
        return command.run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except (TreeSearchError, RewardError, ValueError, ImportError, OSError) as error:
        print(f"drawbench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndrawbench: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
