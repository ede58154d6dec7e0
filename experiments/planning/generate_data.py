"""Trajectories under a target policy, as Minari datasets: unguided, guided as published, and by search; their figures.

    target   π(τ) ∝ p(τ) Π_h π(a_h | s_h)^λ

    unguided   draws of p
    guided     policy-guided diffusion as published: draws of the guided chain, no weights, a law of its own; at
               several coefficients, as it has no λ
    fk         Feynman-Kac steering over the likelihood-consistent proposal: draws of its estimate of the target
    dts        diffusion tree sampling over the same proposal
    tree_sampling    tree sampling over it, which the table below leaves out

At equal NFE, by default that of n plain draws. Draws repeat trajectories: `distinct` says how many differ. Figures:

    return          of the reward channel, or of a reward that the bed names, mean over episodes
    log π           (1/H) Σ_h log π(a_h | s_h), mean over episodes
    dynamics error  root mean square of s_{h+1} - f(s_h, a_h)
    coverage        share of the cells of positions that unguided data visit which these data visit too

and for the linear-Gaussian bed, whose target is known, the relative errors of mean and covariance. ± is the standard
error over seeds. "exact" are draws of the target itself, n of them: what sampling error leaves.

    python -m experiments.planning.generate_data --bed gaussian
    python -m experiments.planning.generate_data --bed maze --n 32

Deviation of guided: actions are clipped to the bed's bounds before π judges them, so that those outside feel no
gradient, where the released code squashes them by tanh.

Source: Policy-Guided Diffusion (Jackson et al., 2024), section 5: likelihood, dynamics error and coverage of synthetic
data; Conservatism and coverage are counted here in cells of a grid.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import treesearch as ts
from experiments.shared.cells import rounded, where_it_ran
from experiments.shared.stats import mean_se
from experiments.shared.tables import table
from treesearch.backends.base import optional
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import TDS
from treesearch.backends.guidance.policy import PolicyGuided
from treesearch.backends.models.trajectory import maze_kernel
from treesearch.export.minari import Episodes, collect, write_episodes
from treesearch.methods.base import Method
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import known
from treesearch.rewards.trajectories.dynamics import PointMass, dynamics_consistency
from treesearch.rewards.trajectories.policy import PolicyLikelihood
from treesearch.rewards.trajectories.trajectory import discounted_return, goal_reaching

Figures = dict[str, float]


@dataclass(frozen=True)
class Kind:
    """How a kind of data is made.

    Args:
        guide: (kernel, log-likelihood reward, λ) -> the kernel that proposes.
        method: (n, λ, T) -> the search.
        raw: every sample is an episode; else episodes are draws of the estimate.
    """

    guide: Callable[[Any, Reward, float], Any]
    method: Callable[[int, float, int], Method]
    raw: bool = False


def _bare(kernel: Any, reward: Reward, lam: float) -> Any:
    return kernel


def _twisted(kernel: Any, reward: Reward, lam: float) -> Any:
    return TDS(kernel, reward, lam=lam)


def published(kernel: Any, reward: Reward, lam: float, coefficient: float = 1.0) -> PolicyGuided:
    return PolicyGuided(kernel, reward, coefficient=coefficient)


def _plain(n: int, lam: float, steps: int) -> ts.BestOfN:
    return ts.BestOfN(n=n, lam=0.0)


KINDS = {
    "unguided": Kind(_bare, _plain, raw=True),
    "guided": Kind(published, _plain, raw=True),
    "fk": Kind(_twisted, lambda n, lam, t: ts.FeynmanKac(num_particles=n, lam=lam, schedule=(*range(t, 1, -1), 0))),
    "dts": Kind(_twisted, lambda n, lam, t: ts.DiffusionTreeSampling(lam=lam)),
    "tree_sampling": Kind(_twisted, lambda n, lam, t: ts.TreeSampling(lam=lam)),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Generated:
    """Data of one method.

    Args:
        method: its name.
        episodes: n trajectories (n, H, C) a prompt, and what is known of each.
        result: of the search.
        folder: of the dataset, None if it was not written.
    """

    method: str
    episodes: Episodes
    result: ts.SearchResult
    folder: Path | None = None

    @property
    def samples(self) -> Tensor:
        return self.episodes.samples


def generate(
    kernel: Any,
    policy: Any,
    method: str | Method | Kind,
    n: int,
    *,
    lam: float = 1.0,
    nfe: int | None = None,
    prompts: Sequence[Any] | None = None,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    folder: Path | None = None,
) -> Generated:
    """n trajectories of a model under a target policy, written as a Minari dataset.

    Args:
        kernel: of trajectories, with `channels`; differentiable for the guided recipes.
        policy: π, as `PolicyLikelihood` takes it.
        method: a name of `KINDS`, a kind, or a method of treesearch, which runs on the kernel as it is.
        n: episodes of each prompt.
        lam: λ; a method that is given has its own.
        nfe: budget a prompt; None for that of n plain draws.
        prompts: what is known of the trajectories, one task each; None for nothing.
        bounds: of the actions, to which the likelihood clips.
        seed: of all noise.
        batch_size: rows of a network call.
        folder: of the dataset, such as data/maze-fk-v0; None writes nothing.

    Raises:
        ValueError: an unknown kind, or n below 1.
        TypeError: a kernel without channels.
    """
    if (channels := optional(kernel, "channels")) is None:
        raise TypeError(f"{type(kernel).__name__} has no `channels`: expected a kernel of trajectories")
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    reward = PolicyLikelihood(policy, channels, bounds)
    kind = _kind(method)
    guided = kind.guide(kernel, reward, lam)
    result = ts.search(
        guided,
        reward,
        kind.method(n, lam, kernel.num_steps),
        prompts=prompts,
        budget=ts.Budget(nfe=(nfe or n * kernel.num_steps) * len(prompts or [None])),
        seed=seed,
        batch_size=batch_size,
    )
    found = collect(result, seed=seed, draws=None if kind.raw else n)
    name = method if isinstance(method, str) else type(method).__name__
    facts = {"recipe": name, "lam": lam, "policy": type(policy).__name__, "departs": getattr(guided, "departs", None)}
    episodes = replace(found, facts=found.facts | facts)
    written = None if folder is None else write_episodes(episodes, folder, channels)
    return Generated(method=name, episodes=episodes, result=result, folder=written)


def _kind(method: str | Method | Kind) -> Kind:
    if isinstance(method, Kind):
        return method
    if not isinstance(method, str):
        return Kind(_bare, lambda n, lam, steps: method)
    if method not in KINDS:
        raise ValueError(f"unknown kind {method!r}, expected {', '.join(KINDS)} or a method of treesearch")
    return KINDS[method]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bed:
    """A model of trajectories and what its data are judged by.

    Args:
        kernel: the model.
        policy: the target.
        model: (observations, actions) -> the observations after them.
        returns: what an episode is worth; None for the sum of its reward channel, if it has one.
        cell: side of a cell of positions.
        position: which entries of an observation are the position.
        bounds: of the actions.
        moments: of the target: mean (H C,) and covariance (H C, H C); None where it is not known.
    """

    kernel: Any
    policy: Any
    model: Callable[[Tensor, Tensor], Tensor]
    returns: Reward | None = None
    cell: float = 0.5
    position: tuple[int, ...] = (0, 1)
    bounds: tuple[float, float] | None = None
    moments: tuple[Tensor, Tensor] | None = None


def figures(samples: Tensor, bed: Bed, reference: Tensor) -> Figures:
    """What the data of a bed are worth; `reference` are unguided data (m, H, C)."""
    channels = bed.kernel.channels
    likelihood = PolicyLikelihood(bed.policy, channels, bed.bounds)(samples) / samples.shape[1]
    errors = -dynamics_consistency(channels, bed.model)(samples)
    returns = bed.returns or (discounted_return(channels, 1.0) if channels.reward else None)
    known = [channels.observations(x)[..., list(bed.position)] for x in (samples, reference)]
    return {
        "distinct": len(samples.unique(dim=0)),
        "return": math.nan if returns is None else float(returns(samples).mean()),
        "log π": float(likelihood.mean()),
        "dynamics error": float(errors.mean().sqrt()),
        "coverage": coverage(known[0], known[1], bed.cell),
    } | ({} if bed.moments is None else moment_errors(samples, *bed.moments))


def coverage(data: Tensor, reference: Tensor, cell: float) -> float:
    """Share of the grid cells that the reference's positions (m, H, P) visit which those of the data visit too."""
    cells = [(x.flatten(0, -2) / cell).floor().long().unique(dim=0) for x in (data, reference)]
    visited = [{tuple(c) for c in found.tolist()} for found in cells]
    return len(visited[0] & visited[1]) / len(visited[1])


def moment_errors(samples: Tensor, mean: Tensor, cov: Tensor) -> Figures:
    """|m̂ - m| / √tr Σ and |Σ̂ - Σ|_F / |Σ|_F of flattened samples."""
    x = samples.double().flatten(1)
    return {
        "mean error": float((x.mean(0) - mean).norm() / cov.trace().sqrt()),
        "covariance error": float((torch.cov(x.T) - cov).norm() / cov.norm()),
    }


# beds


def gaussian_bed(lam: float) -> Bed:
    """Noisy linear motion in the plane under a behaviour that returns to 0; the target policy runs away from it."""
    eye = torch.eye(2, dtype=torch.float64)
    kernel = GaussianTrajectories.of_system(
        0.9 * eye, 0.5 * eye, -0.4 * eye, horizon=8, start=1.0, noise=0.2, behaviour=0.6, num_steps=30
    )
    gain, offset = 0.3 * eye, torch.tensor([0.5, 0.0], dtype=torch.float64)
    return Bed(
        kernel=kernel,
        policy=lambda s: s @ gain.to(s).T + offset.to(s),
        model=lambda s, a: 0.9 * s + 0.5 * a,
        moments=kernel.reweighted(gain, offset, 1.0, lam),
    )


CORNER = (2.5, 2.5)
STARTS = ((-2.5, -2.5), (-2.5, 2.5), (2.5, -2.5))


def maze_bed(num_steps: int = 20, horizon: int = 40) -> Bed:
    """The Medium maze; the target policy pushes towards a corner, straight through walls."""
    kernel = maze_kernel("medium", num_steps, horizon=horizon)
    stride = kernel.card.stride if kernel.card else 1

    def push(s: Tensor) -> Tensor:
        return (s.new_tensor(CORNER) - s[:, :2] - 0.3 * s[:, 2:4]).clamp(-1, 1)

    return Bed(
        kernel=kernel,
        policy=push,
        model=PointMass(stride=stride),
        returns=goal_reaching(kernel.channels, goal=CORNER),
        bounds=(-1.0, 1.0),
    )


# the command


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the experiment."""

    bed: Literal["gaussian", "maze"] = "gaussian"
    """linear-Gaussian trajectories with a known target, or the shipped maze model"""
    n: int = 2_000
    """trajectories of a seed; in the maze of each of three starts"""
    lam: float = 1.0
    """λ of the target"""
    coefficients: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 1.0)
    """of the guidance as published; it has no λ"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of all noise"""
    datasets: Path | None = None
    """folder for the Minari datasets of the first seed"""
    out: Path = Path("runs/results/policy_data.json")
    """gets or replaces the entry of this bed and λ"""


def kinds(args: Args) -> dict[str, Kind]:
    """What is compared, by name."""
    guided = {
        f"guided, coefficient {c:g}": replace(KINDS["guided"], guide=partial(published, coefficient=c))
        for c in args.coefficients
    }
    return {"unguided": KINDS["unguided"], **guided, "fk": KINDS["fk"], "dts": KINDS["dts"]}


def measured(args: Args) -> dict[str, list[Figures]]:
    """Figures by kind and seed."""
    bed = gaussian_bed(args.lam) if args.bed == "gaussian" else maze_bed()
    prompts = None if args.bed == "gaussian" else [known([*start, 0.0, 0.0]) for start in STARTS]
    found: dict[str, list[Figures]] = {name: [] for name in kinds(args)}
    if bed.moments is not None:
        found["exact"] = []
    for seed in args.seeds:
        made: dict[str, Tensor] = {}
        for name, kind in kinds(args).items():
            folder = (
                None if args.datasets is None or seed != args.seeds[0] else args.datasets / f"{slug(args.bed, name)}-v0"
            )
            data = generate(
                bed.kernel, bed.policy, kind, args.n, lam=args.lam, prompts=prompts, bounds=bed.bounds, seed=seed,
                folder=folder,
            )  # fmt: skip
            made[name] = data.samples
            print(f"seed {seed} {name}", flush=True)
        if bed.moments is not None:
            made["exact"] = exact_draws(bed, args.n, seed)
        for name, samples in made.items():
            found[name].append(figures(samples, bed, made["unguided"]))
    return found


def slug(bed: str, name: str) -> str:
    """A name that Minari takes."""
    return "-".join([bed, *name.replace(",", "").replace(".", "_").split()])


def exact_draws(bed: Bed, n: int, seed: int) -> Tensor:
    """n draws of the target of a bed that knows its moments."""
    assert bed.moments is not None
    mean, cov = bed.moments
    noise = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + noise @ torch.linalg.cholesky(cov).T).reshape(n, *bed.kernel.state_shape)


def report(found: dict[str, list[Figures]]) -> str:
    """A table, one line a kind."""
    columns = list(next(iter(found.values()))[0])
    return table(list(found), columns, lambda name, column: mean_se([row[column] for row in found[name]]).text())


def main(args: Args) -> None:
    """Generate, measure, print, and store the figures beside those of the other bed."""
    began = time.perf_counter()
    found = measured(args)
    print(f"\n{report(found)}\n\n{time.perf_counter() - began:.0f} s")
    asked = {"bed": args.bed, "n": args.n, "lam": args.lam, "seeds": list(args.seeds)}
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    kept = [row for row in rows if (row["bed"], row["lam"]) != (args.bed, args.lam)]
    rows = [*kept, asked | {"figures": rounded(found), **where_it_ran()}]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ts.TreeSearchError, ValueError, OSError, ImportError) as error:
        print(f"generate_data: {error}", file=sys.stderr)
        sys.exit(1)
