"""Laws of kernels: shapes, dtypes, noise as an argument, rows that do not know their batch, densities, searches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treesearch.api import search
from treesearch.backends.base import Kernel, Spec, Transition, Wrapper, describe, optional
from treesearch.budget import Budget
from treesearch.methods.base import Method
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.diffusion_tree import DiffusionTreeSampling
from treesearch.methods.feynman_kac import FeynmanKac
from treesearch.testing.chains import bare_chain, conditioning, noise
from treesearch.testing.compare import LAM, UNSEEN, Room, require, same, short


def check_kernel(
    kernel: Kernel,
    prompts: Sequence[Any] | None = None,
    *,
    rows: int = 16,
    atol: float | None = None,
    proposal: bool = False,
) -> None:
    """Laws of a kernel.

    Args:
        kernel: the kernel.
        prompts: conditioning to try it with; rows take them in turn.
        rows: states at each level.
        atol: how far a row may move with its batch, None for what rounding explains.
        proposal: whether its steps carry log p/q (a guided kernel); otherwise `log_weight` must be zero.

    Raises:
        CheckFailed: a law does not hold; the message names it, the rows and the gap.
    """
    spec, room = describe(kernel), rounding(kernel) if atol is None else Room(atol)
    task = np.arange(rows) % len(prompts) if prompts is not None else np.zeros(rows, np.int64)
    cond = conditioning(kernel, prompts, task)
    keys = [np.arange(rows, dtype=np.uint64) + np.uint64(1000 * k) for k in range(2)]
    state = torch.random.get_rng_state()
    path = [_check_prior(kernel, spec, cond, keys)]
    for t in range(spec.num_steps, 0, -1):
        path.append(_check_step(kernel, spec, path[-1], t, cond, keys, room, proposal))
    _check_mixed_levels(kernel, spec, path, cond, keys[0], room)
    for n in (1, rows):
        shown = kernel.decode(path[-1][:n])
        require(len(shown) == n, f"decode: expected {n} samples of {n} states, got {len(shown)}")
        low, high = spec.sample_range or (-math.inf, math.inf)
        inside = spec.sample_range is None or all(((x >= low) & (x <= high)).all() for x in shown)
        require(inside, f"sample_range: expected entries of samples in {low:g}..{high:g}")
    again = describe(kernel).fingerprint
    require(spec.fingerprint == again, f"fingerprint: expected {spec.fingerprint!r} twice, got {again!r}")
    same = torch.equal(state, torch.random.get_rng_state())
    require(same, "the kernel drew from torch's global generator: expected all randomness from `noise`")
    _check_search_keeps_p(kernel, spec, prompts, room.times(spec.num_steps))


def _check_prior(kernel: Kernel, spec: Spec, cond: dict[str, Any], keys: list[np.ndarray]) -> Tensor:
    one, other = (noise(spec, k, spec.num_steps + 1) for k in keys)
    x, want = kernel.prior(one, cond), (len(one), *spec.state_shape)
    require(tuple(x.shape) == want, f"prior: expected shape {want}, got {tuple(x.shape)}")
    require(x.dtype == spec.dtype, f"prior: expected kernel.dtype {spec.dtype}, got {x.dtype}")
    same("prior: two calls with one noise", kernel.prior(one, cond), x)
    _agrees(spec.stochastic[0], x, kernel.prior(other, cond), 0)
    return x


def _check_step(
    kernel: Kernel, spec: Spec, x: Tensor, t: int, cond: dict[str, Any], keys: list[np.ndarray], room: Room, q: bool
) -> Tensor:
    n, before, level = len(x), x.clone(), torch.full((len(x),), t, device="cpu")
    one, other = (noise(spec, k, t) for k in keys)
    law = kernel.transition(x, level, cond)
    require(isinstance(law, Transition), f"transition: expected the methods of Transition, got {type(law).__name__}")
    y = law.sample(one)
    for name, got in (("sample", y), ("endpoint", law.endpoint)):
        require(got.shape == x.shape, f"{name} at t = {t}: expected shape {tuple(x.shape)}, got {tuple(got.shape)}")
    require(y.dtype == spec.dtype, f"sample at t = {t}: expected {spec.dtype}, got {y.dtype}")
    require(torch.isfinite(y.double()).all(), f"sample at t = {t}: expected finite states")
    same(f"sample at t = {t}: two calls with one noise", law.sample(one), y)
    same(f"transition at t = {t} wrote into its input", x, before)
    _agrees(spec.stochastic[t], y, law.sample(other), t)
    log_q, log_w = law.log_prob(y), law.log_weight(y)
    for name, got in (("log_prob", log_q), ("log_weight", log_w)):
        require(got.shape == (n,), f"{name} at t = {t}: expected shape ({n},), got {tuple(got.shape)}")
        finite = torch.isfinite(got).all()
        require(finite, f"{name} of the law's own sample at t = {t}: expected finite, got {short(got.tolist())}")
    zeros = f"log_weight at t = {t}: expected zeros of a base kernel, got {short(log_w.tolist())}"
    require(q or not log_w.any(), zeros)
    mean, std = getattr(law, "mean", None), getattr(law, "std", None)
    if isinstance(mean, Tensor) and isinstance(std, Tensor) and mean.shape == y.shape and (std > 0).all():
        _check_density(f"log_prob at t = {t} beside N(mean, std²)", log_q, y, mean, std)
    pick = torch.tensor([0, 0, n - 1, n // 2], device="cpu")
    picked = {k: v[pick] if isinstance(v, Tensor) and len(v) == n else v for k, v in cond.items()}
    alone = kernel.transition(x[pick], level[pick], picked)
    same(
        f"take with repeats at t = {t}",
        law.take(pick).sample(other[:4]),
        alone.sample(other[:4]),
        room.times(_gain(kernel, t)),
    )
    return y


def _check_density(what: str, log_q: Tensor, x: Tensor, mean: Tensor, std: Tensor) -> None:
    """log N(x; mean, std²): a sum of D terms, each with the rounding of (x - mean)/std in the dtype of log_q or x."""
    z, size = (x.double() - mean.double()) / std.double(), torch.maximum(x.abs(), mean.abs()).double()
    terms = -0.5 * z**2 - std.double().log() - 0.5 * math.log(2 * math.pi)
    eps = max(torch.finfo(v.dtype).eps for v in (log_q, x))
    parts = 0.5 * z**2 + std.double().log().abs() + 1
    room = LAM * eps * (math.sqrt(z[0].numel()) * parts + (z * size / std.double()).abs()).flatten(1).sum(1)
    same(what, log_q.double(), terms.flatten(1).sum(1), room)


def _check_mixed_levels(
    kernel: Kernel, spec: Spec, path: list[Tensor], cond: dict[str, Any], keys: np.ndarray, room: Room
) -> None:
    """Rows of one call may have different t: each must come out as it does alone."""
    n = len(keys)
    t = torch.arange(n, device="cpu") % spec.num_steps + 1
    x = torch.stack([path[spec.num_steps - int(level)][i] for i, level in enumerate(t)])
    draws = torch.cat([noise(spec, keys[[i]], int(level)) for i, level in enumerate(t)])
    law = kernel.transition(x, t, cond)
    together = law.sample(draws)
    for i in range(n):
        row = {k: v[[i]] if isinstance(v, Tensor) and len(v) == n else v for k, v in cond.items()}
        one = kernel.transition(x[[i]], t[[i]], row)
        where = f"row {i} at t = {int(t[i])} in a batch of mixed levels, beside the row alone"
        near = room.times(_gain(kernel, int(t[i])))
        same(f"sample: {where}", together[[i]], one.sample(draws[[i]]), near)
        same(f"endpoint: {where}", law.endpoint[[i]], one.endpoint, near)


def _check_search_keeps_p(kernel: Kernel, spec: Spec, prompts: Sequence[Any] | None, room: Room) -> None:
    methods: list[Method] = [BestOfN(lam=0.0)]
    reward = optional(kernel, "scores") if spec.valued else _indifferent  # declared values are of their reward alone
    if all(spec.branchable(t) for t in range(1, spec.num_steps + 1)):
        # Without resampling: proposals rightly resample on their p/q.
        methods += [FeynmanKac(num_particles=4, lam=0.0, ess_threshold=0.0), DiffusionTreeSampling(lam=0.0, wave=5)]
    tasks = 1 if prompts is None else len(prompts)
    for method in methods:
        budget = Budget(nfe=12 * spec.num_steps * tasks)
        found = search(kernel, reward, method, prompts=prompts, budget=budget, batch_size=5)
        for i, task in enumerate(found.tasks):
            want = kernel.decode(bare_chain(kernel, 12, task=i, prompts=prompts)[-1])
            same(f"{type(method).__name__} with lam = 0, task {i}, beside the bare chain", task.samples, want, room)


def _indifferent(samples: Any) -> Tensor:
    return torch.zeros(len(samples), device="cpu")


def _agrees(stochastic: bool, one: Tensor, other: Tensor, t: int) -> None:
    differ = not torch.equal(one, other)
    gave = "different states" if differ else "the same states"
    require(differ == stochastic, f"stochastic[{t}] is {stochastic}, but two noises gave {gave}")


def rounding(kernel: Kernel) -> Room:
    """What rounding explains in one evaluation: λ u Σ √n of a row's largest entry, u half of ε."""
    weights = [w for network in _networks(kernel) for w in network.parameters()]
    length = sum(math.sqrt(math.prod(w.shape[1:])) for w in weights if w.ndim > 1)
    dtypes = [w.dtype for w in weights if w.is_floating_point()] + [describe(kernel, identify=False).dtype]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
    return Room(share=LAM * eps / 2 * max(length, UNSEEN))


def _networks(kernel: Any) -> Iterator[nn.Module]:
    """Networks that a kernel, the kernels that it wraps, or their pipelines hold."""
    if isinstance(kernel, Wrapper):
        yield from _networks(kernel.kernel)
    for value in (kernel, *getattr(kernel, "__dict__", {}).values()):
        parts = getattr(value, "components", None)  # of a pipeline
        held = (value, *parts.values()) if isinstance(parts, Mapping) else (value,)
        yield from (part for part in held if isinstance(part, nn.Module))


def _gain(kernel: Kernel, t: int) -> float:
    """How often more the rounding of a network's output counts in x̂_0: 1/α_t where it predicts ε."""
    chain = optional(kernel, "chain")
    alpha: Any = getattr(chain, "alpha", None)
    if getattr(getattr(chain, "schedule", None), "prediction", "") != "epsilon" or not isinstance(alpha, Tensor):
        return 1.0
    return 1 / float(alpha[t])
