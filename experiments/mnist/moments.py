"""Mean and leading principal components of the MNIST training images, as `teleport(mnist())` reads them.

    python -m experiments.mnist.moments --data mnist.npz --out mnist_moments.safetensors

Deterministic: all images, in units of states (-1..1); each component has its largest entry positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.mnist.train_mnist import load_images
from treesearch.backends.exact.moments import Moments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the script."""

    data: Path
    """npz file with train_x: uint8 images (n, 28, 28)."""
    out: Path = Path("runs/mnist_moments.safetensors")
    rank: int = 100
    limit: int | None = None
    """Use only this many images (smoke runs)."""


def main(args: Args) -> None:
    """Measure and write."""
    states = load_images(args.data, "train", args.limit).double() / 127.5 - 1
    moments = Moments.of(states, args.rank)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    moments.save(args.out)
    total = states.flatten(1).var(0).sum()
    print(f"{args.out}: {args.rank} components, {float(moments.eigenvalues.sum() / total):.1%} of the variance, "
          f"eigenvalues {float(moments.eigenvalues[0]):.3g} to {float(moments.eigenvalues[-1]):.3g}")  # fmt: skip


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
