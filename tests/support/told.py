"""Gaussian trajectories that are told what is known, with the exact denoiser given that."""

import torch

from treesearch.backends.base import Gaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.models.trajectory import clamped
from treesearch.rewards.channels import entry

F64 = torch.float64


class Told(GaussianTrajectories):
    """x̂_0 = E[x_0 | x_t on the free entries, known], in the steps of the chain."""

    def encode(self, prompts):
        known = torch.zeros(len(prompts), *self.state_shape, dtype=F64)
        mask = torch.zeros_like(known, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            for name, at in (("start", 0), ("goal", -1)):
                if (given := entry(prompt, name)) is not None:
                    known[row, at, : len(given)] = torch.tensor(given, dtype=F64)
                    mask[row, at, : len(given)] = True
        return {"known": known, "mask": mask}

    def prior(self, noise, cond=None):
        return torch.where(cond["mask"], cond["known"], noise.to(F64)) if cond else noise.to(F64)

    def clamp(self, x, cond):
        return torch.where(cond["mask"], cond["known"], x)

    def transition(self, x, t, cond=None):
        if not cond:
            return super().transition(x, t)
        mean, std, endpoint = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        alike: dict[tuple[object, ...], list[int]] = {}
        for row in range(len(x)):
            alike.setdefault((*cond["mask"][row].flatten().tolist(), int(t[row])), []).append(row)
        for rows in alike.values():
            law = self._law(x[rows], t[rows], cond["known"][rows], cond["mask"][rows])
            mean[rows], std[rows], endpoint[rows] = law.mean, law.std, law.endpoint
        return Gaussian(mean, std, endpoint)

    def _law(self, x, t, known, mask):
        """Rows at one level that know the same entries: the posterior mean of free entries f given known k."""
        x, k = torch.where(mask, known, x), mask[0].flatten()
        f, mean, a = ~k, self.mean.flatten(), self.chain.alpha[t[0]]
        pull = torch.linalg.solve(self.cov[k][:, k], self.cov[k][:, f]).T
        at = mean[f] + (known.flatten(1)[:, k] - mean[k]) @ pull.T
        left = self.cov[f][:, f] - pull @ self.cov[k][:, f]
        noisy = a**2 * left + self.chain.sigma[t[0]] ** 2 * torch.eye(len(left), dtype=F64)
        end = x.clone().flatten(1)
        end[:, f] = at + torch.linalg.solve(noisy, (end[:, f] - a * at).T).T @ left * a
        return clamped(self.chain.law(x, t, end.reshape(x.shape)), known, mask)
