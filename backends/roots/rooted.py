"""Chains that begin at images that are given, in place of the prior.

    x_L = y_L                      on a path y_0..y_T that an inversion found, L steps from the end
    x_L = α_L y_0 + σ_L ε          noised: image-to-image

and x_L -> ... -> x_0 by the kernel's own steps. The law of such a chain is one of its own, of which log Z is; weights,
budgets, resume and workers are those of any kernel. Several images are tasks, one prompt each, in shared batches; one
image is that of every task. Guides, masks and interventions go inside or around, as around the kernel itself.

Sources: Denoising Diffusion Implicit Models (Song et al., 2021), section 4.3. SDEdit: Guided Image Synthesis and
Editing with Stochastic Differential Equations (Meng et al., 2022), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Shared, Spec, Wrapper, describe, expand, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.interventions.base import law_of
from treesearch.rewards.numeric import is_whole


@final
@dataclass(frozen=True, eq=False)
class Rooted(Wrapper):
    """A kernel whose chain begins at given images.

    Args:
        kernel: to be noised, on a `Chain` or with `renoise`.
        path: x_0..x_T of n images, (T + 1, n, *state), as `chains.inversion.invert` finds them; (1, n, *state), the
            images alone, where they are noised.
        level: L, the steps that are left, 1..T; None is T.
        noised: x_L is the image under fresh noise, and not the path's.

    Raises:
        TypeError: a kernel that cannot noise an image.
        ValueError: a path of another shape, images without a path, a level out of range, or entries that are not
            finite.
    """

    path: Tensor
    _: KW_ONLY
    level: int | None = None
    noised: bool = False

    withheld = frozenset({"prior_log_weight"})  # the root is no proposal for the kernel's own prior

    def __post_init__(self) -> None:
        spec, path = self._spec, self.path
        if not is_whole(self.num_steps, 1, spec.num_steps):
            raise ValueError(f"level is {self.level!r}, expected 1..T = {spec.num_steps} (denoising steps left)")
        lengths = (1, spec.num_steps + 1) if self.noised else (spec.num_steps + 1,)
        if path.ndim < 2 or tuple(path.shape[2:]) != spec.state_shape or len(path) not in lengths or not path.shape[1]:
            want = (" or ".join(map(str, lengths)), "n", *spec.state_shape)
            raise ValueError(f"path has shape {tuple(path.shape)}, expected {want}: from `invert`, or noised=True")
        if not path.isfinite().all():
            raise ValueError("the path has entries that are not finite")
        if self.noised and optional(self.kernel, "renoise") is None and self._chain is None:
            raise TypeError(
                f"{type(self.kernel).__name__} has no chain around 0 and no renoise: it cannot noise images"
            )
        object.__setattr__(self, "path", path.detach().to(spec.device, spec.dtype))

    @property
    def num_steps(self) -> int:
        return int(self.kernel.num_steps) if self.level is None else self.level

    @property
    def stochastic(self) -> tuple[bool, ...]:
        """As for the kernel; the root has noise where the images are noised."""
        return (self.noised, *self._spec.stochastic[1 : self.num_steps + 1])

    @property
    def base_law(self) -> str:
        """Whose law p is."""
        count, how = self.path.shape[1], "noised" if self.noised else "inverted"
        images = "1 image" if count == 1 else f"{count} images"
        return f"{law_of(self.kernel)} from {images} {how} to t = {self.num_steps}"

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any] | None:
        """Conditioning of prompts, one for each image.

        Raises:
            ValueError: another number of prompts than of images, where there are several.
        """
        count = self.path.shape[1]
        if count not in (1, len(prompts)):
            raise ValueError(f"{len(prompts)} prompts for {count} images: give each its own")
        encode = optional(self.kernel, "encode")
        found = {} if encode is None else encode(prompts) or {}
        return found | ({PICTURES: Shared(torch.tensor(count))} if count > 1 else {})

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        """x_L (n, *state) of the images of the tasks.

        Raises:
            ValueError: several images, and no prompts that say which task is whose.
        """
        if self.path.shape[1] > 1 and PICTURES not in (cond or {}):
            raise ValueError(f"{self.path.shape[1]} images are as many tasks: give prompts=[...], one for each")
        image = image_of(cond, self.path.shape[1])
        if not self.noised:
            return self._of(self.path[self.num_steps], image, noise)
        x0 = self._of(self.path[0], image, noise)
        levels = torch.full((len(x0),), self.num_steps, device=x0.device)
        return self._noise(x0, levels, noise.to(x0))

    def _of(self, images: Tensor, image: Tensor | None, noise: Tensor) -> Tensor:
        """The image (n, *state) of each row of noise."""
        if image is None:
            return images.expand(len(noise), *self._spec.state_shape).clone()
        return images[image.to(images.device)]

    def _noise(self, x0: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        renoise = optional(self.kernel, "renoise")
        if renoise is not None:
            return renoise(x0, torch.zeros_like(levels), levels, noise)
        schedule = self._chain.schedule
        alpha, sigma = (expand(v.to(x0)[levels], x0) for v in (schedule.alpha, schedule.sigma))
        return alpha * x0 + sigma * noise

    def _passed(self, name: str, value: Any) -> Any:
        if name == "chain":
            return value.on(value.schedule.last(self.num_steps))
        return value[: self.num_steps + 1] if name in BY_LEVEL and not isinstance(value, int) else value

    @property
    def _chain(self) -> Any:
        chain = optional(self.kernel, "chain")
        plain = self._spec.noise_shape == self._spec.state_shape and optional(self.kernel, "offset") is None
        return chain if plain and isinstance(chain, Chain) else None

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)


BY_LEVEL = frozenset({"rows_per_nfe", "backward_per_nfe", "rewards_per_nfe"})


PICTURES = "pictures"  # of conditioning: how many images there are, where prompts were given for each


def image_of(cond: Cond, count: int) -> Tensor | None:
    """Which of the images each row is of, (n,) of its task; None where there is one image.

    Raises:
        ValueError: conditioning that names no tasks.
    """
    if cond is None or count == 1:
        return None
    if "task" not in cond:
        raise ValueError(f"rows are of {count} images, and their conditioning has no task that says of which")
    return cond["task"]
