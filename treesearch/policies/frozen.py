"""A kernel without noise in its steps as a policy: a = π(s, w), a function of the observation and of the noise x_T.

    x_T = prior(w),  x_{t-1} = mean of p(x_{t-1} | x_t, s),  a = x_0

It is asked as a black box: no gradient, no look at its weights but for their hash.

Source: Steering Your Diffusion Policy with Latent Space Reinforcement Learning (Wagenmaker et al., 2025), sec. 4.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Kernel, Shared, describe, optional
from treesearch.rewards.channels import entry


class Ask(Protocol):
    """What observations stand for, where the kernel is no policy."""

    def __call__(self, observations: Tensor) -> Sequence[Any]:
        """Observations (n, O) -> prompts."""
        ...

    def marks(self, prompts: Sequence[Any]) -> Tensor:
        """The other way round."""
        ...


@final
class FrozenPolicy:
    """π(s, w) of a kernel with η = 0.

    Args:
        kernel: whose steps have no noise.
        ask: observations -> prompts; None for a kernel of policies, which is told observations (`seen`).
        batch_size: rows of a forward pass.
        encoded: of a policy: observations are what its network is told of them, pictures as its own encoders see them
            and numbers as it scales them; by default they are all that it observes.

    Attributes:
        size: d, numbers of the noise w of one action.
        observed: O, numbers of an observation; None of a kernel that is no policy.

    Raises:
        ValueError: a kernel with noise in its steps, or none in its prior, or one that takes no observations and there
            is no `ask`.
    """

    def __init__(
        self, kernel: Kernel, ask: Ask | None = None, batch_size: int = 4096, *, encoded: bool = False
    ) -> None:
        self.spec = describe(kernel, identify=False)
        if any(self.spec.stochastic[1:]):
            raise ValueError("the steps of this kernel have noise, so that w does not decide x_0: make it with eta=0")
        if not self.spec.stochastic[0]:
            raise ValueError("this kernel begins at noise of its own, so that w decides nothing: undo its from_noise")
        self._seen = optional(kernel, "seen")
        if ask is None and self._seen is None:
            raise ValueError(f"{type(kernel).__name__} is no policy: say by `ask` which prompts observations stand for")
        self.kernel: Any = kernel
        self.ask, self.batch_size, self.encoded = ask, batch_size, encoded
        self.size = math.prod(self.spec.noise_shape)
        self.observed: int | None = optional(kernel, "observed")
        if encoded:
            self._name, self.observed = self._encoding()
        self.evaluations = 0  # of the network, rows

    @torch.no_grad()
    def states(self, observations: Tensor, noise: Tensor) -> Tensor:
        """x_0 (n, *state) for observations (n, O) and noise w (n, d)."""
        made = [
            self._states(observations[i : i + self.batch_size], noise[i : i + self.batch_size])
            for i in range(0, len(noise), self.batch_size)
        ]
        return torch.cat(made) if made else torch.zeros(0, *self.spec.state_shape)

    def actions(self, observations: Tensor, noise: Tensor) -> Any:
        """Samples for observations (n, O) and noise w (n, d): chunks (n, H, A) of a policy."""
        return self.kernel.decode(self.states(observations, noise))

    @torch.no_grad()
    def features(self, observed: Tensor) -> Tensor:
        """Observations (n, O) of all that the policy observes."""
        return self._seen(observed)[self._name].float() if self.encoded else observed  # type: ignore[misc]

    def observations(self, prompts: Sequence[Any]) -> Tensor:
        """What was observed (n, O), as prompts say it: their `start`, or the place among those that `ask` knows.

        Raises:
            ValueError: a prompt without a start of as many numbers as the policy observes, or one that `ask` knows not.
        """
        if self.ask is not None:
            return self.ask.marks(prompts)  # type: ignore[attr-defined]
        starts = [entry(prompt, "start", self.kernel.observed) for prompt in prompts]
        if any(start is None for start in starts):
            raise ValueError("a policy needs what was observed: the `start` of a prompt")
        return self.features(torch.tensor(starts, dtype=torch.float32))

    @property
    def fingerprint(self) -> str | None:
        """The kernel's own, of all that decides its law, as it is now; None where that is unknown."""
        own = optional(self.kernel, "fingerprint")
        return f"{own} encoded" if own and self.encoded else own

    @property
    def weights(self) -> str:
        """Hash of the weights as they are now."""
        networks = optional(self.kernel, "network")
        digest = hashlib.blake2b(digest_size=16)
        for network in networks if isinstance(networks, tuple) else (networks,):
            weights = network.state_dict() if isinstance(network, nn.Module) else {}
            for name, tensor in sorted(weights.items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _states(self, observations: Tensor, noise: Tensor) -> Tensor:
        cond = self._cond(observations.detach())
        shape = (len(noise), *self.spec.noise_shape)
        x = self.kernel.prior(noise.detach().reshape(shape).to(self.spec.device), cond)
        for level in range(self.spec.num_steps, 0, -1):
            law = self.kernel.transition(x, torch.full((len(x),), level, device=x.device), cond)
            x = law.sample(torch.zeros(shape, device=x.device))
        self.evaluations += len(noise) * self.spec.num_steps
        return x

    def _cond(self, observations: Tensor) -> Cond:
        if self.ask is None:
            encoded = self._told(observations)
        else:
            encoded = self.kernel.encode(self.ask(observations)) if optional(self.kernel, "encode") else None
        cond = {k: v.value if isinstance(v, Shared) else v for k, v in (encoded or {}).items()}
        return cond | {"task": torch.zeros(len(observations), dtype=torch.int64, device=self.spec.device)}

    def _told(self, observations: Tensor) -> dict[str, Any]:
        """What a policy's network is told where something was observed."""
        if self.encoded:
            return {self._name: observations.to(self.spec.device)}
        return self._seen(observations)  # type: ignore[misc]

    @torch.no_grad()
    def _encoding(self) -> tuple[str, int]:
        """What the network is told, by its name, and how many numbers that is.

        Raises:
            ValueError: it is no row of numbers.
        """
        none = torch.zeros(1, self.observed or 0)
        told = [] if self._seen is None else list(self._seen(none).items())
        if len(told) != 1 or told[0][1].ndim != 2:
            raise ValueError("what this kernel's network is told is no row of numbers: leave encoded=True out")
        return told[0][0], told[0][1].shape[1]
