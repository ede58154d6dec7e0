"""Score-difference distillation: a one-step student's samples, noised, get a score that agrees with the teacher's.

    G = x̂_0^θ(y, level)                    y noise (level T), or what is to be restored, a state of the level
    x_t = α_t G + σ_t ε
    ∇_θ KL ∝ E[ w (x̂_0^φ(x_t) - x̂_0*(x_t)) ∂G/∂θ ],   w = 1 / mean |G - x̂_0*|
    φ: the fake score, taught on G by its ordinary diffusion loss, a step of its own before each of the student's
    loss = ‖G - stop-gradient(G - w (x̂_0^φ - x̂_0*))‖² / 2 + regression · pseudo-Huber(G - x_0)

Scope (InstaRevive): noise levels n = σ/α that the difference is taken at are log-uniform up to
    n_max = clip(2 · mean over steps of rms(G - x_0), low, high)              "dynamic", follows the discrepancy
    n_max = high                                                              "fixed"
Scale (SNOOPI, PG-SB): the teacher is guided by κ ~ U(0.5, 4), new in each row: x̂_0* = x̂_0(∅) + κ (x̂_0(c) - x̂_0(∅)); one
fixed scale makes the student's quality hang on it.

InstaRevive's rule of the scope and its weights were published nowhere that we could read: the constants are ours. That
a dynamic scope is better than a fixed one was not found on our beds.

Sources: InstaRevive: One-Step Image Enhancement via Dynamic Score Matching (Zhu et al., 2025). SNOOPI: Supercharged
One-step Diffusion Distillation with Proper Guidance (Nguyen et al., 2024). One-step Diffusion with
Distribution Matching Distillation (Yin et al., 2024), eqs. 7-8, the gradient and w.
"""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Kernel
from treesearch.backends.chains.diffusion import CONDITION, Chain, from_endpoint
from treesearch.backends.chains.inversion import predicted
from treesearch.backends.training.distil import Pairs, Student, chain_of, levels, noised, normal, pseudo_huber
from treesearch.backends.training.loop import Stateful
from treesearch.rewards.numeric import is_number, is_positive

Scope = Literal["dynamic", "fixed"]
GAIN, MEMORY = 2.0, 0.95  # of the dynamic scope: n_max over the discrepancy, and the decay of its mean


@final
class ScoreDifference(nn.Module):
    """Samples on which a score taught on them agrees with the teacher's.

    Args:
        fake: φ, a network like the student, as a rule a copy of the teacher's; trained in place.
        level: of what the student is given, None for T.
        scope: of the noise.
        noise: (low, high), of n = σ/α.
        regression: weight of the loss to x_0.
        scales: (low, high) of κ, None for a teacher as it is.
        absent: what ∅ is told (1, ...), where there are scales.
        lr: of the fake score.
        c: where the regression turns from squared to absolute.

    Raises:
        ValueError: a setting out of range, or scales without an ∅.
    """

    discrepancy: Tensor  # rms(G - x_0), a mean over steps
    fake_loss: Tensor  # of the fake score, likewise

    def __init__(
        self,
        fake: nn.Module,
        *,
        level: int | None = None,
        scope: Scope = "dynamic",
        noise: tuple[float, float] = (0.05, 10.0),
        regression: float = 0.0,
        scales: tuple[float, float] | None = None,
        absent: Tensor | None = None,
        lr: float = 1e-3,
        c: float = 0.001,
    ) -> None:
        super().__init__()
        if scope not in ("dynamic", "fixed"):
            raise ValueError(f"scope is {scope!r}, choose dynamic or fixed")
        _range("noise", noise)
        if scales is not None:
            _range("scales", scales)
        if (scales is None) != (absent is None):
            raise ValueError("scales and absent go together: the teacher is guided away from what ∅ is told")
        if not is_number(regression, 0) or not is_positive(lr) or not is_positive(c):
            raise ValueError(f"expected regression >= 0 and lr, c > 0, got {regression!r}, {lr!r} and {c!r}")
        self.fake, self.level, self.scope, self.noise = fake.train().requires_grad_(True), level, scope, noise
        self.regression, self.scales, self.absent, self.c = regression, scales, absent, c
        self.optimizer = torch.optim.AdamW(fake.parameters(), lr=lr, betas=(0.0, 0.99), weight_decay=0.0)
        self.register_buffer("discrepancy", torch.full((), torch.nan))
        self.register_buffer("fake_loss", torch.full((), torch.nan))

    @property
    def kept(self) -> dict[str, Stateful]:
        """What a checkpoint holds beside the student."""
        return {"score_difference": self, "fake_optimizer": self.optimizer}

    def loss(self, teacher: Kernel, student: Student, average: Student, rows: Pairs, rng: torch.Generator) -> Tensor:
        chain, n = student.chain, len(rows.x0)
        level = chain.schedule.num_steps if self.level is None else self.level
        made = student.endpoint(rows.noise, torch.full((n,), level, device=rows.noise.device), rows.told)
        self._teach(Student(self.fake, chain), made.detach(), rows.told, rng)
        self._look(made.detach(), rows.x0)
        t = _log_uniform(chain, *self.scope_of(made), made, rng)
        x = noised(chain, made.detach(), t, normal(made, rng))
        with torch.no_grad():
            real = self._real(teacher, x, t, rows.told, rng)
            gap = Student(self.fake, chain).endpoint(x, t, rows.told) - real
            scale = (made - real).abs().flatten(1).mean(1).clamp_min(torch.finfo(made.dtype).tiny)
            goal = made - gap / scale.reshape(n, *(1,) * (made.ndim - 1))
        loss = 0.5 * (made - goal).square().mean()
        return loss + self.regression * pseudo_huber(made, rows.x0, self.c) if self.regression else loss

    def scope_of(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(low, n_max) that the difference is taken at now."""
        low, high = (like.new_tensor(each) for each in self.noise)
        if self.scope == "fixed":
            return low, high
        return low, (GAIN * self.discrepancy.to(low)).clamp(low, high)

    def _teach(self, fake: Student, made: Tensor, cond: Cond, rng: torch.Generator) -> None:
        """One step of the fake score on the student's samples, at levels from all of the scope's range."""
        chain, (low, high) = fake.chain, (made.new_tensor(each) for each in self.noise)
        t = _log_uniform(chain, low, high, made, rng)
        eps = normal(made, rng)
        x = noised(chain, made, t, eps)
        output = fake.called(x, chain.timestep[t], cond)
        loss = (output - from_endpoint(chain.schedule.prediction, made, eps, *levels(chain, t, x))).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.fake_loss.copy_(_mean(self.fake_loss, loss.detach()))

    def _look(self, made: Tensor, x0: Tensor) -> None:
        """See how far the samples are from where they should be."""
        self.discrepancy.copy_(_mean(self.discrepancy, (made - x0).square().mean().sqrt()))

    def _real(self, teacher: Kernel, x: Tensor, t: Tensor, cond: Cond, rng: torch.Generator) -> Tensor:
        """x̂_0 of the teacher (n, *state), guided by a scale of each row where there are scales."""
        told = _endpoint(teacher, x, t, cond)
        if self.scales is None or self.absent is None:
            return told
        if cond is None or CONDITION not in cond:
            raise ValueError("scales guide towards a condition, and the teacher is told none: give its pairs prompts")
        low, high = self.scales
        kappa = (low + (high - low) * torch.rand(len(x), generator=rng, device=rng.device, dtype=torch.float32)).to(x)
        untold = _endpoint(teacher, x, t, cond | {CONDITION: self.absent.to(x.device).expand_as(cond[CONDITION])})
        return untold + kappa.reshape(-1, *(1,) * (x.ndim - 1)) * (told - untold)


def _endpoint(teacher: Kernel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x̂_0 of a teacher."""
    law: Any = teacher.transition(x, t, cond)
    return predicted(chain_of(teacher), law, x, t)[0].to(x.dtype)


def _log_uniform(chain: Chain, low: Tensor, high: Tensor, like: Tensor, rng: torch.Generator) -> Tensor:
    """Levels (n,) whose noise n_t = σ_t/α_t is the next above one that is log-uniform in low..high."""
    u = torch.rand(len(like), generator=rng, device=rng.device, dtype=torch.float32).to(like)
    wanted = torch.exp(low.log() + u * (high.log() - low.log()))
    noise = (chain.schedule.sigma / chain.schedule.alpha)[1:].to(like)
    return 1 + torch.searchsorted(noise, wanted).clamp_max(len(noise) - 1)


def _mean(before: Tensor, now: Tensor) -> Tensor:
    """A mean that forgets."""
    return torch.where(before.isnan(), now, MEMORY * before + (1 - MEMORY) * now)


def _range(name: str, pair: tuple[float, float]) -> None:
    if not all(is_positive(each) for each in pair) or pair[0] > pair[1]:
        raise ValueError(f"{name} is {pair!r}, expected (low, high), positive, low first")
