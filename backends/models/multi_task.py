"""Digits and their labels on one chain: one small network whose two heads give the image and p(y | z_t).

    E = (E_1(image), E_2(y))     a state (2, 28, 28): the image in [-1, 1], and a plane with the pattern of the label
    Ê = (D_1(z_t), Σ_y p_θ(y | z_t) E_2(y))

E_2(y) is 3a on the pixels k = y mod 10 and -a/3 elsewhere. Given y the two parts are independent, so that

    log p(y | z_t) = log p(y | image part) + (A <plane, E_2(y)> - A² |E_2(y)|²/2) / σ² + const

whose second term is exact and enters as it is; a head on the U-Net's way down, which sees the image part alone, learns
the first, and the way up is told the softmax of the second. E_2 is faint (a = 0.04): a digit is decided before its
label. A label that is known stands in that softmax and in Ê, a known image in Ê alone. The label head costs no
evaluation: every law carries its log-odds, and `LabelHead` reads them as a value of a noisy state.

Prompts: {"label": 8} or {"image": (1, 28, 28) in [0, 1]}; anything else asks for both.

Sources: Diffusion Models For Multi-Modal Generative Modeling (Chen et al., 2024), sections 3 and 4; Elucidating the
Design Space of Diffusion-Based Generative Models (Karras et al., 2022), section 5, for the image's output. That the
network is told a known label, and the exact term, are ours. The weights are the project's own:
`backends/weights/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treesearch.backends.base import Cond, Gaussian, expand, fingerprint
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.multi_task import multi_task
from treesearch.backends.models.mnist import cosine_alphas_cumprod, to_images
from treesearch.backends.models.shipped import load_weights
from treesearch.backends.models.unet2d import WIDTHS, SmallUNet
from treesearch.rewards.numeric import is_whole

CLASSES = 10
STATE_SHAPE = (2, 28, 28)
PIXELS = 28 * 28
FAINT = 0.04  # a, the root mean square of a pattern
SPREAD = 0.5  # standard deviation of pixels, about that of MNIST
UNKNOWN = -1
WEIGHTS = "mt.safetensors"


def patterns(amplitude: float = FAINT) -> Tensor:
    """E_2 of the ten labels, (10, 784)."""
    own = torch.arange(PIXELS, device="cpu") % CLASSES == torch.arange(CLASSES, device="cpu")[:, None]
    return amplitude * torch.where(own, 3.0, -1 / 3)


@final
class MultiTaskNetwork(nn.Module):
    """Ê and the log-odds of labels."""

    patterns: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(self) -> None:
        super().__init__()
        bars = cosine_alphas_cumprod()
        self.unet, deep = SmallUNet(1, 1, CLASSES), WIDTHS[-1]
        self.head = nn.Sequential(nn.Linear(2 * deep, deep), nn.SiLU(), nn.Linear(deep, CLASSES))
        self.register_buffer("patterns", patterns(), persistent=False)
        self.register_buffer("alpha", bars.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - bars).sqrt().float(), persistent=False)

    def forward(self, z: Tensor, timestep: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Ê and the two terms of log p(y | z_t), of states z at training steps (n,) in 0..999.

        Args:
            z, timestep: as said.
            label: known labels (n,), `UNKNOWN` where there is none.

        Returns:
            Ê (n, 2, 28, 28), log p(y | image part) and log p(plane | y), both up to a constant, (n, 10).
        """
        alpha, sigma = (expand(table[timestep].to(z.dtype), z) for table in (self.alpha, self.sigma))
        evidence = self.evidence(z[:, 1], alpha[:, 0, 0], sigma[:, 0, 0])
        told = evidence.softmax(1)
        if label is not None:
            told = torch.where(label[:, None] < 0, told, F.one_hot(label.clamp_min(0), CLASSES).to(z.dtype))
        variance = (alpha * SPREAD) ** 2 + sigma**2
        out, features = self.unet(z[:, :1] * variance.rsqrt(), timestep, told)
        image = alpha * SPREAD**2 / variance * z[:, :1] + SPREAD * sigma * variance.rsqrt() * out.to(z.dtype)
        seen = self.head(features.to(z.dtype))
        plane = self.plane((seen + evidence).softmax(1))
        return torch.cat([image, plane], 1), seen, evidence

    def evidence(self, plane: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(plane | y) up to a constant, (n, 10), of planes (n, 28, 28); alpha and sigma (n, 1)."""
        shown = plane.flatten(1) @ self.patterns.T
        return (alpha * shown - 0.5 * alpha**2 * self.patterns.square().sum(1)) / sigma**2

    def plane(self, probs: Tensor) -> Tensor:
        """Σ_y p(y) E_2(y), (n, 1, 28, 28)."""
        return (probs @ self.patterns).reshape(-1, 1, *STATE_SHAPE[1:])

    def labels(self, x0: Tensor) -> Tensor:
        """The label (n,) whose pattern is nearest to the plane of states x_0."""
        one = x0.new_ones(1, 1)
        return self.evidence(x0[:, 1], one, one).argmax(1)


@dataclass(frozen=True)
class Labelled(Gaussian):
    """A Gaussian step that remembers log p(y | z_t), up to a constant, of the state that it leaves: logits (n, 10)."""

    logits: Tensor | None = None

    def take(self, rows: Tensor) -> Labelled:
        kept = super().take(rows)
        logits = None if self.logits is None else self.logits[rows]
        return Labelled(kept.mean, kept.std, kept.endpoint, kept.base_mean, kept.rewards, logits)


@dataclass(frozen=True)
class LabelHead:
    """v(z_t, t) = log p_θ(y | z_t), from the law of the step: no evaluation of its own and no gradient.

    Args:
        label: y in 0..9.

    Raises:
        ValueError: no such label.
    """

    label: int

    def __post_init__(self) -> None:
        if not is_whole(self.label, 0, CLASSES - 1):
            raise ValueError(f"label is {self.label!r}, expected 0..{CLASSES - 1}")

    def __call__(self, x: Tensor, t: Tensor, law: Any, cond: Cond) -> Tensor:
        logits = getattr(law, "logits", None)
        if logits is None:
            raise TypeError(f"a label head reads laws with log-odds of labels, got {type(law).__name__}: put it around "
                            "a multitask kernel itself")  # fmt: skip
        return logits.log_softmax(1)[:, self.label]


@final
class MultiTaskKernel:
    """Digits with their labels; either may be known.

    Args:
        network: see `MultiTaskNetwork`.
        num_steps: T.
        eta: as for `Chain`.
    """

    state_shape = STATE_SHAPE
    dtype = torch.float32
    sample_range = (0.0, 1.0)

    def __init__(
        self, network: nn.Module, *, num_steps: int = 25, eta: float = 1.0, device: str | torch.device = "cpu"
    ) -> None:
        self.network, self.num_steps, self.device = network, num_steps, torch.device(device)
        schedule = multi_task(cosine_alphas_cumprod(), num_steps)
        self.chain = Chain(schedule, eta=eta, clip_sample=1.0).to(self.device)
        self.stochastic = self.chain.stochastic
        self._quiet = Quiet(network.to(self.device))

    def to(self, device: str | torch.device) -> MultiTaskKernel:
        """The same kernel, moved to a device."""
        self.device = torch.device(device)
        self.chain.to(self.device)
        self.network.to(self.device)
        return self

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        self._quiet.look()
        return noise.to(self.device, self.dtype)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Labelled:
        known = {} if cond is None else cond
        label, image = known.get("label"), known.get("image")
        with self._quiet, torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            ends, seen, evidence = self.network(x, self.chain.timestep[t], label)
            if label is not None:
                told = self.network.plane(F.one_hot(label.clamp_min(0), CLASSES).to(x.dtype))  # pyright: ignore[reportCallIssue]
                ends = torch.cat([ends[:, :1], torch.where(expand(label < 0, x), ends[:, 1:], told)], 1)
            if image is not None:
                ends = torch.cat([torch.where(image.isnan(), ends[:, :1], image.to(x.dtype)), ends[:, 1:]], 1)
            law = self.chain.law(x, t, ends)
            return Labelled(law.mean, law.std, law.endpoint, logits=seen + evidence)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """Labels (n,), `UNKNOWN` where a prompt has none, and images (n, 1, 28, 28) in [-1, 1], NaN where it has none.

        Raises:
            ValueError: a label that is none, or an image of another shape or out of range.
        """
        labels = [_label(prompt) for prompt in prompts]
        images = [_image(prompt) for prompt in prompts]
        return {"label": torch.tensor(labels, device=self.device), "image": torch.stack(images).to(self.device)}

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [0, 1]; `labels` has the labels."""
        return to_images(x0[:, :1])

    def labels(self, x0: Tensor) -> Tensor:
        """Labels (n,) of states x_0."""
        return self.network.labels(x0)  # pyright: ignore[reportCallIssue]

    @property
    def fingerprint(self) -> str | None:
        """Hash of the network as it is now and the grid."""
        found = fingerprint.of([self.chain.settings(), self.chain.tables(), self.network])
        return None if found is None else f"multitask:{found}"


def _label(prompt: Any) -> int:
    label = prompt.get("label") if isinstance(prompt, Mapping) else None
    if label is not None and not is_whole(label, 0, CLASSES - 1):
        raise ValueError(f"label is {label!r}, expected 0..{CLASSES - 1}")
    return UNKNOWN if label is None else int(label)


def _image(prompt: Any) -> Tensor:
    image = prompt.get("image") if isinstance(prompt, Mapping) else None
    shape = (1, *STATE_SHAPE[1:])
    if image is None:
        return torch.full(shape, torch.nan, dtype=torch.float32, device="cpu")
    image = torch.as_tensor(image).detach().to("cpu", torch.float32)
    if tuple(image.shape) != shape or not ((image >= 0) & (image <= 1)).all():
        raise ValueError(f"image has shape {tuple(image.shape)}, expected {shape} with pixels in 0..1")
    return 2 * image - 1


def multi_task_kernel(
    weights: str | Path = WEIGHTS, num_steps: int = 25, eta: float = 1.0, device: str | torch.device = "cpu"
) -> MultiTaskKernel:
    """A trained model of digits and labels as a kernel.

    Args:
        weights: a shipped file by name, or the path of one that `experiments/processes/train_multi_task.py` wrote.
        num_steps: T, up to 1000.
        eta: 1 is ancestral sampling, 0 is deterministic after the prior.
        device: where the network runs.

    Raises:
        FileNotFoundError: no such file.
    """
    network = load_weights(MultiTaskNetwork, weights)
    return MultiTaskKernel(network, num_steps=num_steps, eta=eta, device=device)
