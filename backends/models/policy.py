"""Diffusion policies: a state is a chunk of actions, and the observation is what the network is told.

    x_k = α_k x_0 + σ_k ε,  x_0 = (a_0..a_{H-1}) normalised        x̂_0 = f(x_k, k, o)

o is the observation history, the last h observations in a row. A prompt is {"start": o}, and samples are actions
(n, H, A) in their own units: rows of a plan without observations, `Channels(0, A)`, so that `ts.Planner` executes them.
With η = 0 the chain is a function a = π(o, w) of the noise w that it begins with (`treesearch.policies`).

References:
    Diffusion Policy: Visuomotor Policy Learning via Action Diffusion (Chi et al., 2023), sec. 3: chunks of actions,
        observation histories, receding horizon; the network here is a small perceptron.
    Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 17, the cosine schedule.
The shipped weights are the project's own: `backends/weights/README.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Wrapper, fingerprint
from treesearch.backends.chains.diffusion import CONDITION, Chain, DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.models.card import Normalisation
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.backends.models.shipped import shipped_file, whole
from treesearch.rewards.channels import Channels, entry
from treesearch.rewards.numeric import is_whole

Told = Callable[[Tensor], Tensor]
WAVES = 16  # frequencies of the embedded time


@final
class PolicyNetwork(nn.Module):
    """A perceptron x̂_0 = f(x, k, o).

    Args:
        chunk: H.
        actions: A.
        observation: numbers that it is told, of the whole history.
        width: of its hidden layers.
    """

    def __init__(self, chunk: int, actions: int, observation: int, width: int = 192) -> None:
        super().__init__()
        self.shape = (chunk, actions)
        size = chunk * actions
        self.layers = nn.Sequential(
            nn.Linear(size + 2 * WAVES + observation, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size),
        )  # fmt: skip

    def forward(self, x: Tensor, timestep: Tensor, told: Tensor) -> Tensor:
        """x̂_0 (n, H, A) for states x (n, H, A), timesteps (n,) in 0..999 and normalised observations (n, O)."""
        rates = torch.exp(torch.linspace(0, math.log(200), WAVES, dtype=x.dtype, device=x.device))
        angle = timestep.to(x.dtype)[:, None] / 1000 * rates
        features = torch.cat([x.flatten(1), angle.sin(), angle.cos(), told.to(x.dtype)], 1)
        return self.layers(features).unflatten(1, self.shape)


@dataclass(frozen=True, kw_only=True)
class PolicyCard:
    """What a trained policy is of; stored with its weights.

    Args:
        actions: normalisation of an action (A,).
        observations: normalisation of an observation (S,).
        chunk: H, actions of a state.
        history: h, observations that the network is told, the last one last.
        width: of the network.
        clip: limit of |x̂_0|, the largest entry of the normalised training data; None for none.
        environment: name of what it was trained for.
    """

    actions: Normalisation
    observations: Normalisation
    chunk: int
    history: int
    width: int
    clip: float | None = None
    environment: str = ""

    def build(self) -> PolicyNetwork:
        """Its network, untrained."""
        told = self.history * len(self.observations.mean)
        return PolicyNetwork(self.chunk, len(self.actions.mean), told, self.width)


@final
@dataclass(frozen=True, eq=False)
class PolicyKernel(Wrapper):
    """A chain of action chunks, told what was observed.

    Args:
        kernel: of states (H, A), a `DiffusionKernel` whose condition is rows made of observations.
        told: observations (n, observed) -> the rows that the network is told.
        actions: between states and actions.
        observed: numbers in the observation of a prompt, of the whole history.
        window: rows of a chunk that are samples, the ones that are to be made; None for all.

    Raises:
        ValueError: a normalisation of another size, or states that are no chunks.
    """

    told: Told
    actions: Normalisation
    observed: int
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        shape = self.kernel.state_shape
        if len(shape) != 2 or shape[1] != len(self.actions.mean):
            raise ValueError(f"states have shape {shape}, expected (chunk, {len(self.actions.mean)}), as the actions")

    @property
    def channels(self) -> Channels:
        """Rows are actions and nothing else."""
        return Channels(0, self.kernel.state_shape[1])

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What the network is told for prompts {"start": observation history}.

        Raises:
            ValueError: a prompt without a start of as many numbers as the policy observes.
        """
        starts = [entry(prompt, "start", self.observed) for prompt in prompts]
        if any(start is None for start in starts):
            raise ValueError(f'a policy needs what was observed: prompts={{"start": [{self.observed} numbers]}}')
        return self.seen(torch.tensor(starts, dtype=torch.float32, device="cpu"))

    def seen(self, observations: Tensor) -> dict[str, Any]:
        """Conditioning of observation histories (n, observed): `encode` of many at once."""
        return {CONDITION: self.told(observations.to(self.kernel.device, torch.float32))}

    def decode(self, x0: Tensor) -> Tensor:
        return self.actions.decode(x0 if self.window is None else x0[:, slice(*self.window)])

    @property
    def encode_samples(self) -> Callable[[Tensor], Tensor] | None:
        """States of actions (n, H, A), the inverse of `decode`; None where samples are parts of chunks."""
        return self._encoded if self.window is None else None

    def _encoded(self, samples: Tensor) -> Tensor:
        return self.actions.encode(samples.to(self.kernel.device, torch.float32))

    def renoise(self, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Tensor) -> Tensor:
        """x_{t_to} ~ q(x_{t_to} | x_{t_from} = x), rows (n, H, A) with t_to >= t_from >= 0 (n,)."""
        return self.kernel.chain.renoise(x, t_from, t_to, noise)

    def _settings(self) -> str | None:
        return fingerprint.of([self.told, repr(self.actions), self.observed, self.window])


@dataclass(frozen=True)
class Seen:
    """Observation histories (n, h S) with each observation normalised."""

    observations: Normalisation
    history: int

    def __call__(self, rows: Tensor) -> Tensor:
        return self.observations.encode(rows.unflatten(1, (self.history, -1))).flatten(1)


def save_policy(network: nn.Module, card: PolicyCard, path: Path) -> None:
    """Weights as float16 safetensors with the card as metadata, replaced atomically."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part, weights = path.with_suffix(".tmp"), {k: w.half().contiguous() for k, w in network.state_dict().items()}
    save_file(weights, part, {"policy": json.dumps(asdict(card))})
    part.chmod(0o644)
    part.replace(path)


def load_policy(name: str | Path) -> tuple[PolicyNetwork, PolicyCard]:
    """A saved network, in float32, and its card.

    Raises:
        FileNotFoundError: neither a file nor the name of one that is shipped.
        ValueError: a file of another kind, or a damaged one.
    """
    from safetensors import safe_open

    with shipped_file(name) as path, whole(path, "diffusion policy"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "policy" not in metadata:
            raise ValueError(f"{path.name} is no diffusion policy: it has no card; save one with save_policy")
        card = _card(metadata["policy"])
        with torch.device("cpu"):  # whatever torch's default device and dtype
            network = card.build().float()
        network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
    return network.eval().requires_grad_(False), card


def _card(text: str) -> PolicyCard:
    fields = json.loads(text)
    for side in ("actions", "observations"):
        fields[side] = Normalisation(**{k: tuple(v) for k, v in fields[side].items()})
    return PolicyCard(**fields)


def policy(
    weights: str | Path = "two_routes.safetensors", num_steps: int = 5, eta: float = 0.0, device: str = "cpu"
) -> PolicyKernel:
    """A saved diffusion policy as a kernel.

    Args:
        weights: a file that `save_policy` wrote, or the name of one that is shipped.
        num_steps: T.
        eta: 0 is a function of the noise, 1 is ancestral sampling, which trees branch below x_T.

    Raises:
        FileNotFoundError, ValueError: no such file, or a setting out of range.
    """
    if not is_whole(num_steps):
        raise ValueError(f"num_steps is {num_steps!r}, expected a whole number of denoising steps, 1 or more")
    network, card = load_policy(weights)
    kernel = DiffusionKernel(
        network,
        state_shape=network.shape,
        schedule=Schedule.variance_preserving(cosine_alphas_cumprod(), num_steps, prediction="sample"),
        eta=eta,
        clip_sample=card.clip,
        condition=untold,
        device=device,
        name=card.environment or "policy",
    )
    return PolicyKernel(
        kernel, Seen(card.observations, card.history), card.actions, card.history * len(card.observations.mean)
    )


def with_eta(kernel: PolicyKernel, eta: float) -> PolicyKernel:
    """The same policy on the same network, with other noise of its steps.

    Args:
        kernel: around a `DiffusionKernel` of DDIM steps.
        eta: 0 is a function of the noise.
    """
    inner = kernel.kernel
    chain = Chain(inner.chain.schedule, eta=eta, clip_sample=inner.chain.clip_sample)
    return replace(kernel, kernel=inner.with_network(inner.model, chain, inner.name))


def untold(prompts: Sequence[Any]) -> Tensor:
    """The kernel within is told by its wrapper."""
    raise TypeError(f"{len(prompts)} prompts came past the PolicyKernel: search that, not the kernel within")
