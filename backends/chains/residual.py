"""Residual diffusion: a chain from a clean image I_0 to a noisy copy of a degraded one, I_in, with I_res = I_in - I_0.

    I_t = I_0 + ā_t I_res + b̄_t ε,   ā_t = Σ a_i rises to 1, b̄_t² = Σ b_i²        prior I_T = I_in + b̄_T ε
    I_{t-1} = I_t - (ā_t - ā_{t-1}) Î_res - (b̄_t - √(b̄_{t-1}² - s̃²)) ε̂ + s̃ z,   s̃² = η² b_t² b̄_{t-1}² / b̄_t²

On y = I - I_in this is a chain with α_t = 1 - ā_t and σ_t = b̄_t that carries y_s whole (`Schedule.carry` = 1): a step
adds b_t ε whatever it adds of the residual. With ā = 1 - √ᾱ, b̄ = √(1 - ᾱ), I_in = 0 it is DDIM at η = 0; at η = 1 the
two differ, since DDIM carries α_t/α_s: the same s̃ gives the same step.

    residual+noise   two outputs, moved along each by its own schedule: they need not add up to I_t
    residual         ε̂ = (I_t - I_in + (1 - ā_t) Î_res)/b̄_t
    noise            Î_0 = (I_t - ā_t I_in - b̄_t ε̂)/(1 - ā_t): not where ā_t = 1

    a_i ∝ K - i + 1 (decreased), b_i² ∝ i (increased), i = 1..K, K = 1000; Σ b_i² = `sum_scale`

The paper's code has η where the formula above has η²; at 0 and 1 they agree. Whole training steps are visited.

Source: Residual Denoising Diffusion Models (Liu et al., 2024), eqs. 6, 8, 11-13 and sec. 4, with its code's schedules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from treesearch.backends.chains.schedules import Prediction, Schedule
from treesearch.rewards.numeric import is_positive, is_whole

Predicts = Literal["residual+noise", "residual", "noise"]


@final
@dataclass(frozen=True, kw_only=True)
class Residual:
    """The process.

    Args:
        predicts: what the network returns.
        sum_scale: b̄_K², variance of the prior around I_in.
        train_steps: K.

    Raises:
        ValueError: an unknown prediction, or a number out of range.
    """

    predicts: Predicts = "residual+noise"
    sum_scale: float = 1.0
    train_steps: int = 1000

    def __post_init__(self) -> None:
        if self.predicts not in get_args(Predicts):
            raise ValueError(f"unknown prediction {self.predicts!r}: choose {', '.join(get_args(Predicts))}")
        if not is_positive(self.sum_scale):
            raise ValueError(f"sum_scale is {self.sum_scale!r}, expected a variance above 0")
        if not is_whole(self.train_steps, 2):
            raise ValueError(f"train_steps is {self.train_steps!r}, expected at least 2")

    @property
    def outputs(self) -> int:
        """Tensors like x that the network returns."""
        return 2 if self.predicts == "residual+noise" else 1

    def bars(self) -> tuple[Tensor, Tensor]:
        """ā and b̄ of the training steps 0..K, (K + 1,) float64."""
        k, i = self.train_steps, torch.arange(self.train_steps + 1, dtype=torch.float64, device="cpu")
        whole = k * (k + 1)
        return i * (2 * k + 1 - i) / whole, (self.sum_scale * i * (i + 1) / whole).sqrt()

    def on(self, timestep: Tensor, a_bar: Tensor, b_bar: Tensor) -> Schedule:
        """A grid: what the network is told at I_1..I_T (T,), and ā and b̄ of I_0..I_T (T + 1,).

        Raises:
            ValueError: noise or residual that does not grow with t, or noise predicted where ā_T = 1.
        """
        of: Prediction = "epsilon" if self.predicts == "noise" else "sample"
        carry = torch.ones(len(timestep), dtype=torch.float64, device="cpu")
        return Schedule(timestep, 1 - a_bar.double(), b_bar.double(), of, float(b_bar[-1]), carry)

    def at(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the network is told, α and σ, at shares (n,) in 0..1 of the training steps, rounded to whole ones."""
        i, (a_bar, b_bar) = (self.train_steps * share.double().cpu()).round().long(), self.bars()
        return (i - 1).double(), 1 - a_bar[i], b_bar[i]

    def schedule(self, num_steps: int) -> Schedule:
        """T steps, evenly spaced over the training steps; the network is told i - 1 at I_i.

        Raises:
            ValueError: num_steps outside 1..K, or a process that predicts noise alone, whose ā must end below 1.
        """
        if not is_whole(num_steps) or num_steps > self.train_steps:
            raise ValueError(f"num_steps is {num_steps!r}, expected 1..{self.train_steps}")
        if self.predicts == "noise":
            raise ValueError("noise alone does not give Î_0 where ā_T = 1: give a grid that ends below with `on`")
        told, alpha, sigma = self.at(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device="cpu"))
        return self.on(told[1:].float(), 1 - alpha, sigma)

    def read(
        self, output: Tensor, y: Tensor, mu: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What `Chain.law` takes of a network output (n, outputs × C, ...) at y = I_t - I_in."""
        if self.predicts == "residual+noise":
            residual, eps = output.chunk(2, 1)
            return -residual, eps
        return -output if self.predicts == "residual" else output

    def target(self, clean: Tensor, mu: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should return."""
        if self.predicts == "residual+noise":
            return torch.cat([mu - clean, eps], 1)
        return mu - clean if self.predicts == "residual" else eps
