"""How far networks are from being scores: a small trained one beside the exact field, and the shipped model.

    python -m experiments.diagnose.conservative --out experiments/results/diagnose/conservative.json

On three Gaussians in the plane (linear β of 1,000 steps): asymmetry of the Jacobian of ε̂ at 256 noised points and the
loop ∮ s·dl on a circle of radius 1, of the exact score and of a perceptron trained for a few seconds. On the shipped
MNIST model: asymmetry of the endpoint's Jacobian on states of its own chain, and what one deterministic step misses.
One seed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treesearch.backends import mnist
from treesearch.backends.diagnostics.conservative import Field, asymmetry, endpoint_field, loop
from treesearch.backends.diagnostics.straightness import gaps, path
from treesearch.runs.files import write_json

MEANS = torch.tensor([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.5]], dtype=torch.float64, device="cpu")
STD = 0.3
BAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")).cumprod(0)
STEPS = (20, 100, 300, 600)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the script."""

    out: Path = Path("runs/results/conservative.json")
    """result file"""
    iterations: int = 3_000
    """of training"""
    states: int = 16
    """of the MNIST chain at each level"""
    seed: int = 0
    """of everything"""


def exact(k: int) -> Field:
    """ε of the noised mixture at training step k."""
    bar = BAR[k - 1]
    var = bar * STD**2 + 1 - bar

    def eps(x: Tensor) -> Tensor:
        gap = bar.sqrt() * MEANS.to(x) - x[:, None]
        share = (-0.5 * (gap**2).sum(2) / var.to(x)).softmax(1)
        return -(1 - bar).sqrt().to(x) * (share[..., None] * gap / var.to(x)).sum(1)

    return eps


def noised(k: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_k (n, 2) and its noise."""
    pick = torch.randint(3, (len(k),), generator=draw)
    x0, eps = (torch.randn(len(k), 2, dtype=torch.float64, generator=draw) for _ in range(2))
    bar = BAR[k - 1, None]
    return bar.sqrt() * (MEANS[pick] + STD * x0) + (1 - bar).sqrt() * eps, eps


class Network(nn.Module):
    """ε̂(x, k)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        ).double()

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        told = BAR[k - 1, None].to(x)
        return self.layers(torch.cat([x, told, told.sqrt(), (1 - told).sqrt(), k[:, None].to(x) / 1000], 1))


def trained(iterations: int, draw: torch.Generator) -> Network:
    """A network that fits the noise."""
    network = Network()
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for _ in range(iterations):
        k = torch.randint(1, 1001, (512,), generator=draw)
        x, eps = noised(k, draw)
        optimiser.zero_grad()
        ((network(x, k) - eps) ** 2).mean().backward()
        optimiser.step()
        rate.step()
    return network.requires_grad_(False)


def plane(network: Network, draw: torch.Generator) -> dict[str, Any]:
    """Asymmetry and loops at four noise levels."""
    found: dict[str, Any] = {}
    for k in STEPS:
        x, _ = noised(torch.full((256,), k), draw)
        z = torch.randn(x.shape, dtype=x.dtype, generator=draw)
        scale = -1 / float((1 - BAR[k - 1]).sqrt())  # s = -ε / σ
        fields: dict[str, Field] = {
            "exact": exact(k),
            "network": lambda y, k=k: network(y, torch.full((len(y),), k)),
        }
        east, north = torch.eye(2, dtype=torch.float64)
        for name, field in fields.items():
            around = loop(lambda y, f=field, c=scale: c * f(y), torch.zeros(2, dtype=torch.float64), east, north, 1.0)
            ratio = asymmetry(field, x, z)
            found[f"{k} {name}"] = {
                "asymmetry": ratio.value, "se": ratio.se, "loop": around.integral, "total": around.total,
            }  # fmt: skip
    return found


def shipped(states: int, draw: torch.Generator) -> dict[str, Any]:
    """The MNIST model on its own chain of fifty steps, and its deterministic paths."""
    kernel = mnist(num_steps=50)
    begin = torch.randn(states, 1, 28, 28, generator=draw)
    x, found = kernel.prior(begin), {}
    with torch.no_grad():
        for t in range(50, 0, -1):
            if t in (45, 30, 15, 3):
                ratio = asymmetry(endpoint_field(kernel, t), x, torch.randn(x.shape, generator=draw))
                found[f"{20 * t}"] = {"asymmetry": ratio.value, "se": ratio.se}
            noise = torch.randn(x.shape, generator=draw)
            x = kernel.transition(x, torch.full((states,), t)).sample(noise)
        missed = gaps(*path(mnist(num_steps=10), begin))
    return {"asymmetry": found, "one step": {str(t): float(g.mean()) for t, g in missed.items()}}


def main(args: Args) -> None:
    """Write the figures."""
    torch.manual_seed(args.seed)
    draw = torch.Generator().manual_seed(args.seed)
    found = {"plane": plane(trained(args.iterations, draw), draw), "mnist": shipped(args.states, draw)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, found)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, ImportError) as error:
        print(f"conservative: {error}", file=sys.stderr)
        sys.exit(1)
