"""Few-step students as kernels: a network that was distilled from a teacher, on the teacher's states and levels.

    x_s = α_s x̂_0 + σ_s z,   s the next of m levels; each step is noised anew, so that a tree can branch at each

On as many levels as its teacher has steps, the student is a kernel of the same states, levels and prior, whose x̂_0 is
near a sample at every level: a draft of the teacher, or a score of the states that a search holds. Its law is its own,
not the teacher's.

A shipped student is the difference of its weights to the teacher's, in eight bits with one scale a tensor, and a card
of how it came about; `training.distil` trains others.

Source: Consistency Models (Song et al., 2023), algorithm 1, multistep sampling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treesearch.backends.chains.diffusion import Chain, DiffusionKernel
from treesearch.backends.models.mnist import load_network, mnist_kernel
from treesearch.backends.models.shipped import shipped_file

WEIGHTS = "mnist_student.safetensors"
SCALE = ".scale"
EIGHT_BITS = torch.float8_e4m3fn


def student(
    weights: str | Path | nn.Module = WEIGHTS,
    num_steps: int = 2,
    *,
    teacher: DiffusionKernel | None = None,
    device: str | torch.device = "cpu",
) -> DiffusionKernel:
    """A student as a kernel of its own.

    Args:
        weights: a shipped file by name, the path of one that `save_student` wrote, or a network that `distil` trained.
        num_steps: m, how many times it is evaluated on the way from noise to a sample; as many as the teacher has steps
            to stand beside it at every level.
        teacher: of a network: its kernel, whose levels are chosen from. A file says its own, the MNIST model.
        device: where the network of a file runs.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a network without a teacher, a file with one, or a teacher that is no `DiffusionKernel`.
        ValueError: a file of another kind, or more steps than the teacher has.
    """
    if isinstance(weights, nn.Module):
        if not isinstance(teacher, DiffusionKernel):
            got = "none" if teacher is None else f"a {type(teacher).__name__}"
            raise TypeError(f"a student that is a network needs its teacher, a DiffusionKernel, got {got}: make it by "
                            "DiffusionKernel(network, ..., step='renoise') where that is another")  # fmt: skip
        return _renoising(teacher, weights, num_steps)
    if teacher is not None:
        raise TypeError("teacher is for students that are networks: a file is of the MNIST model")
    return _renoising(mnist_kernel(num_steps, device=device), load_student(weights), num_steps)


def _renoising(teacher: Any, network: nn.Module, num_steps: int) -> DiffusionKernel:
    own: Chain = teacher.chain
    chain = Chain(own.schedule.coarse(num_steps), step="renoise", clip_sample=own.clip_sample)
    return teacher.with_network(network, chain, f"student of {teacher.name}")


def load_student(name: str | Path = WEIGHTS) -> nn.Module:
    """The network of a file: evaluation mode, float32, no gradients to weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = load_network()
    weights = network.state_dict()
    try:
        with shipped_file(name) as path:
            held = load_file(path)
        weights = {key: w + held[key].float() * held[key + SCALE] for key, w in weights.items()}
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{str(name)!r} is no student of the MNIST model: save one with save_student") from error
    network.load_state_dict(weights)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def card_of(name: str | Path = WEIGHTS) -> dict[str, Any]:
    """What a file says of how its student came about."""
    from safetensors import safe_open

    with shipped_file(name) as path, safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("student", "{}"))


def save_student(network: nn.Module, path: Path, card: Mapping[str, Any]) -> None:
    """Write a student of the MNIST model as the difference to it, replaced atomically.

    Args:
        network: of the same shapes.
        path: of the file.
        card: how it came about, of what JSON can hold.
    """
    from safetensors.torch import save_file

    held = dict[str, Tensor]()
    for (key, weight), taught in zip(load_network().state_dict().items(), network.state_dict().values(), strict=True):
        gap = taught.detach().float().cpu() - weight
        scale = (gap.abs().max() / torch.finfo(EIGHT_BITS).max).clamp_min(torch.finfo(torch.float32).tiny)
        held |= {key: (gap / scale).to(EIGHT_BITS).contiguous(), key + SCALE: scale.reshape(1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    save_file(held, part, {"student": json.dumps(dict(card))})
    part.chmod(0o644)
    part.replace(path)
