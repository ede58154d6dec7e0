"""LeRobot's diffusion policies as kernels: state = chunk of actions, prompt = observation history.

    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    kernel = policy_kernel(DiffusionPolicy.from_pretrained("lerobot/diffusion_pusht"), stats=dataset.meta.stats)

The grid, the prediction and the clip are those of the policy's own scheduler; its network, image encoders included, is
called as it calls them. With η = 0 and a DDIM scheduler samples are those of its `generate_actions` for the same noise.
Observations are numbers in a row, frame by frame, the features in the order of `features`; `observed_by` makes a row of
named tensors. LeRobot is not imported: any object of the same parts will do.

Source: Diffusion Policy: Visuomotor Policy Learning via Action Diffusion (Chi et al., 2023), as LeRobot has it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule, clip_of
from treesearch.backends.models.card import Normalisation
from treesearch.backends.models.policy import PolicyKernel, untold

STATE, ENVIRONMENT, IMAGES = "observation.state", "observation.environment_state", "observation.images"
Stats = Mapping[str, Mapping[str, Any]]
"""Of each feature: min and max, or mean and std, as LeRobot's datasets have them."""
TINY = 1e-8  # LeRobot's own, where a feature is constant
SHOWN = {"agent_pos": STATE, "environment_state": ENVIRONMENT, "pixels": "observation.image"}
"""What gymnasium's environments call features."""


def from_pretrained(
    name: str | Path, num_steps: int | None = None, eta: float = 0.0, device: str = "cpu"
) -> tuple[PolicyKernel, Frames]:
    """A saved policy as a kernel in its environment's units, and how it reads what an environment shows.

    Args:
        name: a folder that `save_pretrained` wrote, of the policy and its two processors, or the id of a hub.
        num_steps, eta, device: as for `policy_kernel`.

    Raises:
        FileNotFoundError: no such folder, or one without a policy.
        ImportError: LeRobot is not installed here.
        ValueError: a policy of another kind, or one whose statistics are not there.
    """
    _check_folder(Path(name))
    try:
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
        from lerobot.policies.factory import make_pre_post_processors
    except ImportError as error:
        raise ImportError(
            f"{name} is a policy of LeRobot, which is not installed here ({error}): install lerobot and this library "
            "in an environment of their own"
        ) from error
    with redirect_stdout(sys.stderr):  # it prints
        policy = DiffusionPolicy.from_pretrained(str(name))
    try:
        stats = stats_of(make_pre_post_processors(policy.config, str(name)))
    except (OSError, ValueError) as error:
        if {_mode(mode) for mode in policy.config.normalization_mapping.values()} != {"IDENTITY"}:
            raise ValueError(
                f"{name} has no statistics to normalise by, save its processors beside it: {error}"
            ) from error
        stats = None
    return policy_kernel(policy, num_steps, eta, stats, device), Frames(features(policy))


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        if path.is_absolute() or len(path.parts) != 2 or path.suffix == ".safetensors":
            raise FileNotFoundError(
                f"no policy at {path}: expected two_routes.safetensors, which is shipped, a file of your own, a folder "
                "of LeRobot's or the id owner/name of a hub"
            )
        return
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json: expected a folder that a policy's save_pretrained wrote")
    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("type")
    if kind != "diffusion":
        raise ValueError(f"{path} is a policy of type {kind!r}, expected 'diffusion': others have no chain to search")


@final
@dataclass(frozen=True)
class Frames:
    """What an environment of gymnasium shows -> the numbers (S,) of one observation, in the order of `features`.

    Names are LeRobot's, or `agent_pos`, `environment_state` and `pixels` (one picture, or several by name); pictures
    are bytes (height, width, 3).

    Args:
        shapes: of the features, by name.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def __call__(self, observation: Any) -> Tensor:
        """Its numbers.

        Raises:
            ValueError: a feature is missing, or has another shape.
        """
        shown = self._named(observation)
        for name in self.shapes:
            if name not in shown:
                raise ValueError(f"the environment shows {sorted(shown)}, but no {name!r}, which the policy is told")
        return torch.cat([self._numbers(name, shown[name]) for name in self.shapes])

    def _named(self, observation: Any) -> dict[str, Any]:
        if not isinstance(observation, Mapping):
            return {STATE if np.ndim(observation) == 1 else SHOWN["pixels"]: observation}
        found: dict[str, Any] = {}
        for name, value in observation.items():
            if name == "pixels" and isinstance(value, Mapping):
                found |= {f"{IMAGES}.{camera}": picture for camera, picture in value.items()}
            else:
                found[SHOWN.get(name, name)] = value
        return found

    def _numbers(self, name: str, value: Any) -> Tensor:
        array, shape = np.asarray(value), self.shapes[name]
        part = torch.as_tensor(np.ascontiguousarray(array), dtype=torch.float32)
        if array.dtype == np.uint8 and array.ndim == 3:
            part = part.permute(2, 0, 1) / 255
        if tuple(part.shape) != shape:
            raise ValueError(f"the environment shows {name!r} of shape {tuple(part.shape)}, the policy is told {shape}")
        return part.flatten()


def policy_kernel(
    policy: Any, num_steps: int | None = None, eta: float = 0.0, stats: Stats | None = None, device: str = "cpu"
) -> PolicyKernel:
    """A LeRobot `DiffusionPolicy` as a kernel.

    Args:
        policy: loaded; it is called in evaluation mode and otherwise left as it is.
        num_steps: T; None for the policy's own.
        eta: 0 is a function of the noise.
        stats: that its inputs and actions are normalised by; None leaves both as they are, normalised.
        device: of the kernel; the policy is moved there.

    Raises:
        ValueError: a scheduler without a law, features that this knows nothing of, or stats that lack one of them.
    """
    model, config = policy.diffusion.to(device), policy.config
    scheduler = model.noise_scheduler
    steps = int(model.num_inference_steps) if num_steps is None else num_steps
    action = config.action_feature.shape[0]
    kernel = DiffusionKernel(
        Called(model.unet),
        state_shape=(config.horizon, action),
        schedule=Schedule.of(scheduler, steps),
        eta=eta,
        clip_sample=clip_of(scheduler),
        condition=untold,
        device=device,
        name="lerobot",
    )
    modes = {str(k): _mode(v) for k, v in config.normalization_mapping.items()}
    told = Observed(model, config.n_obs_steps, tuple(features(policy).items()), _scales(policy, modes, stats))
    first = config.n_obs_steps - 1
    return PolicyKernel(kernel, told, _actions(action, modes, stats), told.size, (first, first + config.n_action_steps))


def features(policy: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what it observes, in the order of a row.

    Raises:
        ValueError: none that this knows of.
    """
    config = policy.config
    found = {} if config.robot_state_feature is None else {STATE: tuple(config.robot_state_feature.shape)}
    found |= {name: tuple(feature.shape) for name, feature in config.image_features.items()}
    if config.env_state_feature is not None:
        found[ENVIRONMENT] = tuple(config.env_state_feature.shape)
    if STATE not in found:
        raise ValueError(f"the policy observes {sorted(found)}, expected {STATE!r} among them")
    return found


def observed_by(policy: Any, observations: Mapping[str, Any]) -> Tensor:
    """Histories of named observations, each (n, h, *shape), as rows (n, observed).

    Raises:
        ValueError: a feature is missing, or has another shape.
    """
    rows = []
    for name, shape in features(policy).items():
        if name not in observations:
            raise ValueError(f"observations have {sorted(observations)}, but no {name!r}, which the policy is told")
        given = torch.as_tensor(observations[name], dtype=torch.float32)
        want = (policy.config.n_obs_steps, *shape)
        if tuple(given.shape[1:]) != want:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, expected (n, {', '.join(map(str, want))})")
        rows.append(given.flatten(2))
    return torch.cat(rows, 2).flatten(1)


@final
class Called(nn.Module):
    """A network that is told by keyword."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, told: Tensor) -> Tensor:
        return self.unet(x, timestep, global_cond=told)


@final
@dataclass(frozen=True, eq=False)
class Observed:
    """Rows of observations -> what the network is told of them, by the policy's own encoders.

    Args:
        model: with `_prepare_global_conditioning`.
        history: h.
        shapes: of the features, by name.
        scales: offset and width of the features that are normalised: (x - offset) / width.
    """

    model: Any
    history: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    scales: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def size(self) -> int:
        """Numbers of a row."""
        return self.history * sum(math.prod(shape) for _, shape in self.shapes)

    def __call__(self, rows: Tensor) -> Tensor:
        frames = rows.unflatten(1, (self.history, -1))
        parts = frames.split([math.prod(shape) for _, shape in self.shapes], 2)
        named = {
            name: self._scaled(name, part.unflatten(2, shape))
            for (name, shape), part in zip(self.shapes, parts, strict=True)
        }
        pictures = [part for name, part in named.items() if name not in (STATE, ENVIRONMENT)]
        if pictures:
            named[IMAGES] = torch.stack(pictures, dim=-4)
        with torch.no_grad(), Quiet(self.model):
            return self.model._prepare_global_conditioning(named)

    def _scaled(self, name: str, part: Tensor) -> Tensor:
        if name not in self.scales:
            return part
        offset, width = (v.to(part) for v in self.scales[name])
        return (part - offset) / width


def _mode(given: Any) -> str:
    return str(getattr(given, "value", given))


def _scales(policy: Any, modes: Mapping[str, str], stats: Stats | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Offset and width of every feature that is normalised."""
    kinds = {STATE: "STATE", ENVIRONMENT: "ENV"}
    found = {}
    for name in features(policy) if stats is not None else ():
        pair = _pair(name, modes.get(kinds.get(name, "VISUAL"), "IDENTITY"), stats)
        if pair is not None:
            found[name] = pair
    return found


def _actions(size: int, modes: Mapping[str, str], stats: Stats | None) -> Normalisation:
    """Of actions: a = mean + std · z."""
    pair = None if stats is None else _pair("action", modes.get("ACTION", "IDENTITY"), stats)
    if pair is None:
        return Normalisation((0.0,) * size, (1.0,) * size)
    offset, width = (v.expand(size).tolist() for v in pair)
    return Normalisation(tuple(offset), tuple(width))


def _pair(name: str, mode: str, stats: Stats | None) -> tuple[Tensor, Tensor] | None:
    """Offset and width of a feature, None where it is left as it is.

    Raises:
        ValueError: a mode that is not known, or stats without this feature.
    """
    if mode == "IDENTITY":
        return None
    kinds = {"MIN_MAX": ("min", "max"), "MEAN_STD": ("mean", "std")}
    if mode not in kinds:
        raise ValueError(f"{name} is normalised by {mode!r}, expected one of IDENTITY, {', '.join(kinds)}")
    of = (stats or {}).get(name, {})
    if not all(key in of for key in kinds[mode]):
        raise ValueError(f"stats have no {' and '.join(kinds[mode])} of {name!r}, which the policy is normalised by")
    a, b = (torch.as_tensor(of[key], dtype=torch.float32) for key in kinds[mode])
    if mode == "MEAN_STD":
        return a, b + TINY
    width = torch.where(b > a, b - a, TINY) / 2
    return a + width, width


def stats_of(processors: Sequence[Any]) -> Stats:
    """Statistics that LeRobot's pre- and post-processors of a policy were saved with.

    Raises:
        ValueError: they hold none.
    """
    found = [getattr(step, "stats", None) for processor in processors for step in getattr(processor, "steps", ())]
    merged = {name: value for stats in found if stats for name, value in stats.items()}
    if not merged:
        raise ValueError("these processors hold no statistics: give stats= of the dataset")
    return merged
