"""Gaussian data on any schedule: the exact denoiser in the steps of `Chain`, and laws that a chain can be held to."""

from dataclasses import replace

import torch

from treesearch.backends.base import Wrapper, expand
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.moments import Moments

F64 = torch.float64


class GaussianFlow:
    """The chain of N(mean, Σ λ u uᵀ) data with its exact x̂_0."""

    dtype = F64

    def __init__(self, schedule, moments, eta=0.0, step="ddim"):
        self.schedule, self.moments = schedule, moments
        self.num_steps, self.state_shape = schedule.num_steps, tuple(moments.mean.shape)
        self.chain = Chain(schedule, eta=eta, step=step)
        self.stochastic, self.fingerprint = self.chain.stochastic, "gaussian-flow"

    def prior(self, noise, cond=None):
        return noise.to(F64)

    def transition(self, x, t, cond=None):
        alpha, sigma = (expand(v[t], x) for v in (self.schedule.alpha, self.schedule.sigma))
        return self.chain.law(x, t, self.moments.endpoint(x, alpha, sigma))

    def decode(self, x0):
        return x0

    def level(self, t):
        return self.schedule.alpha[t], self.schedule.sigma[t]

    def flow(self, x, t_from, t_to):
        """The closed form of the probability flow."""
        return self.moments.move(x, self.level(t_from), self.level(t_to))


class Around(Wrapper):
    """A kernel of states (n, 3) whose chain is on x - μ."""

    def offset(self, x, cond=None):
        return x.new_tensor([1.0, -2.0, 3.0]).expand_as(x)

    def transition(self, x, t, cond=None):
        mu = self.offset(x)
        law = self.kernel.transition(x - mu, t)
        return replace(law, mean=law.mean + mu, endpoint=law.endpoint + mu)


def log_snr(steps, low=-4.0, high=5.0):
    """A variance preserving grid, even in log α/σ; x_0 has noise left."""
    half = torch.linspace(high, low, steps + 1, dtype=F64)
    told = torch.arange(1, steps + 1)
    return Schedule(told, torch.sigmoid(2 * half).sqrt(), torch.sigmoid(-2 * half).sqrt(), "sample")


def scaled_linear():
    """ᾱ of the 1,000 training steps of Stable Diffusion."""
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2).cumprod(0)


def between(steps):
    """A grid from the first training step of `scaled_linear` to the last, log ᾱ linear between training steps."""
    at = torch.linspace(0, 999, steps + 1, dtype=F64)
    low = at.floor().long().clamp_max(998)
    logs = scaled_linear().log()
    bar = (logs[low] + (at - low) * (logs[low + 1] - logs[low])).exp()
    return Schedule(torch.arange(1, steps + 1), bar.sqrt(), (1 - bar).sqrt(), "sample")


def spectrum():
    """Data of 20 dimensions, variances 10 to 1e-3, about 0."""
    chance = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=chance, dtype=F64)).Q.T
    return Moments(torch.zeros(20, dtype=F64), basis, torch.logspace(1, -3, 20, dtype=F64))


def diagonal(mean, variances):
    """Data with independent entries."""
    return Moments(torch.tensor(mean, dtype=F64), torch.eye(len(mean), dtype=F64), torch.tensor(variances, dtype=F64))


THREE = diagonal([0.5, -1.0, 2.0], [4.0, 1.0, 0.05])


def draws(n, *shape, seed=1):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def run(kernel, x, down_to=0):
    """Means of the steps from x_T on: the chain without noise."""
    for t in range(kernel.num_steps, down_to, -1):
        x = kernel.transition(x, torch.full((len(x),), t)).mean
    return x


def affine(kernel, t, at):
    """A, b and std of the step from t, x_s = A x + b + std z, by probes about states like `at` (n, *state)."""
    size = at[0].numel()
    probes = at[:1].flatten(1) + torch.cat([torch.zeros(1, size, dtype=F64), torch.eye(size, dtype=F64)])
    law = kernel.transition(probes.reshape(size + 1, *at.shape[1:]), torch.full((size + 1,), t))
    mean = law.mean.flatten(1)
    slope = (mean[1:] - mean[0]).T
    std = law.std.expand(law.mean.shape)[0].flatten()
    return slope, mean[0] - slope @ probes[0], std


def law_of(kernel, mean, cov, at=None):
    """Mean and covariance of x_0 of a linear chain whose x_T has these; `at` are states to probe at, one a level."""
    for t in range(kernel.num_steps, 0, -1):
        probe = torch.zeros(1, *kernel.state_shape, dtype=F64) if at is None else at(t)
        slope, offset, std = affine(kernel, t, probe)
        mean, cov = slope @ mean + offset, slope @ cov @ slope.T + torch.diag(std**2)
    return mean, cov
