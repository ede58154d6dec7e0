"""The bare denoising loop, which a search must not change, and what an engine hands to a kernel in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treesearch.backends.base import Kernel, Shared, Spec, describe
from treesearch.core.noise import child_keys, normals, root_key


def noise(spec: Spec, keys: np.ndarray, t: int) -> Tensor:
    """Standard normals (n, *noise_shape) of the step t -> t - 1; t = T + 1 for the prior."""
    draws = normals(keys, np.full(len(keys), t), math.prod(spec.noise_shape))
    return torch.from_numpy(draws).reshape(len(keys), *spec.noise_shape).to(spec.device)


def conditioning(kernel: Kernel, prompts: Sequence[Any] | None, task: np.ndarray) -> dict[str, Any]:
    """What the engine hands to the kernel for rows of the given tasks."""
    rows, encoded = torch.from_numpy(task), (kernel.encode(prompts) if prompts is not None else None) or {}
    return {k: v.value if isinstance(v, Shared) else v[rows] for k, v in encoded.items()} | {"task": rows}


def bare_chain(
    kernel: Kernel, n: int, *, seed: int = 0, task: int = 0, prompts: Sequence[Any] | None = None
) -> list[Tensor]:
    """States x_T, ..., x_0 of a task's first n rollouts: the loop that a search must not change."""
    spec = describe(kernel)
    root = np.array([root_key(seed, task)], np.uint64)
    keys = child_keys(root, spec.num_steps + 1, np.arange(n), at_root=True)
    cond = conditioning(kernel, prompts, np.full(n, task))
    path = [kernel.prior(noise(spec, keys, spec.num_steps + 1), cond)]
    for t in range(spec.num_steps, 0, -1):
        path.append(kernel.transition(path[-1], torch.full((n,), t, device="cpu"), cond).sample(noise(spec, keys, t)))
    return path
