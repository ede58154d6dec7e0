"""What the blocks of a modular pipeline read of a user's settings, and which settings and checkpoints they do not."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from treesearch.backends.pipelines.asked import check_pictures
from treesearch.backends.pipelines.blocks import is_text
from treesearch.backends.pipelines.checkpoint import CheckpointError
from treesearch.backends.pipelines.family import BEGINS, OPTIONAL
from treesearch.backends.pipelines.guiders import check_guider
from treesearch.backends.pipelines.inputs import OF_THE_BLOCKS
from treesearch.backends.pipelines.kinds import KINDS, Kind, modular_form
from treesearch.backends.pipelines.settings import Settings

_PARTS = ("scheduler", "vae", "transformer", "unet")
_RESERVED = {"prompt", "latents", "timesteps", "sigmas", "generator", "num_inference_steps", "output_type"}


def check(name: str, settings: Settings, parts: Collection[str]) -> None:
    """See `Family.check`."""
    kind = KINDS[name]
    _, blocks = modular_form(kind, {})
    for part in blocks.component_names:
        if (part in _PARTS or is_text(part)) and part not in parts:
            how = "call its load_components()" if "Modular" in name else "load it whole"
            raise CheckpointError(f"{name} has no {part}: {how}")
    check_pictures(name, settings, needs=kind.needs_image)
    known, default = _known(kind, blocks, settings), Settings()
    for option in OPTIONAL:
        if getattr(settings, option) != getattr(default, option) and option not in known:
            raise ValueError(f"{name} takes no {option}")
    if settings.guider is not None and (settings.guidance_scale is not None or settings.guidance_rescale):
        raise ValueError("the guider has its own scale: leave guidance_scale and guidance_rescale out")
    if settings.control_scale is not None:
        raise ValueError(f"{name} has no ControlNet for a control_scale")


def _known(kind: Kind, blocks: Any, settings: Settings) -> set[str]:
    """Names of the settings that blocks read."""
    known = {*OF_THE_BLOCKS} & {*blocks.input_names}
    if "guider" in blocks.component_names:
        known |= {"guidance_rescale", "guider"}
    if not kind.edits:
        known.discard("image")
    if "strength" in blocks.input_names and (settings.mask is not None or not kind.edits):
        known |= {*BEGINS}
    return known


def refuse(pipe: Any, kind: Kind, settings: Settings, inputs: Collection[str]) -> None:
    """Refuse a checkpoint that its blocks are not for, and inputs that they do not read.

    Args:
        pipe: of the checkpoint.
        kind: of the pipeline.
        settings: the user's choices.
        inputs: names of what the blocks read from a user.

    Raises:
        ValueError: one of them.
    """
    name = type(pipe).__name__
    for attribute, value in kind.assumes:
        found = pipe.config.get(attribute, value)
        if found != value and list(found) != list(value):
            raise ValueError(f"{name} has {attribute}={found}, and its blocks in diffusers take {value} for given")
    free = sorted({*inputs} - _RESERVED - {*vars(settings)})
    for given in settings.network_inputs:
        if given not in free:
            raise ValueError(f"the blocks of {name} take no {given!r}: choose {', '.join(free)}")


def scale(pipe: Any, name: str, chosen: float | None) -> float:
    """The guidance scale: the user's, else what the pipeline's own `__call__` or guider takes.

    Args:
        pipe: of a checkpoint.
        name: argument of the call; none where there is a guider, or blocks with an input of that name.
        chosen: the user's.
    """
    if chosen is not None:
        return float(chosen)
    if not name and getattr(pipe, "guider", None) is not None:
        return float(pipe.guider.guidance_scale)
    if not name:
        (default,) = [each.default for each in pipe.blocks.inputs if each.name == "guidance_scale"] or [None]
        return 1.0 if default is None else float(default)
    default = inspect.signature(type(pipe).__call__).parameters[name].default
    return 1.0 if default is None else float(default)


def guider_of(pipe: Any, settings: Settings) -> Any:
    """The guider that takes the place of the blocks' default: the user's, or that of a modular pipeline itself.

    Raises:
        ValueError: one with a memory.
    """
    own = getattr(pipe, "guider", None) if hasattr(pipe, "blocks") else None
    if settings.guider is not None or own is None or settings.guidance_scale is not None or settings.guidance_rescale:
        return settings.guider
    check_guider(own)
    return own
