"""What a user asks of a pipeline (pictures, sizes, prompts), held against what its class and its parts take."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

from treesearch.backends.pipelines.settings import Settings


def check_pictures(name: str, settings: Settings, *, needs: bool = False) -> None:
    """Hold the pictures that a pipeline is given against what its class is for.

    Args:
        name: of the class.
        settings: the user's choices.
        needs: whether the class is for a picture, whatever it is called.

    Raises:
        ValueError: one is missing.
    """
    masked = "Inpaint" in name or "Fill" in name
    if settings.image is None and (needs or masked or "Img2Img" in name or "ImageToVideo" in name):
        raise ValueError(f"{name} works on a picture: give it one, image=...")
    if settings.mask is None and masked:
        raise ValueError(f"{name} draws where a mask is white: give it one, mask=...")
    for option in ("mask", "strength"):
        if settings.image is None and getattr(settings, option) is not None:
            raise ValueError(f"{option} is of a picture, and there is none: give it too, image=...")


def call_default(pipe: Any, name: str, otherwise: Any) -> Any:
    """The default of an argument of the pipeline's own `__call__`."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    return otherwise if parameter is None or parameter.default in (None, inspect.Parameter.empty) else parameter.default


def sides(pipe: Any, settings: Settings, default: tuple[int, int], *multiples: int) -> tuple[int, int]:
    """Height and width in pixels.

    Args:
        pipe: for the message.
        settings: the user's choices.
        default: height and width where the settings have none.
        multiples: of each of which a side must be one: what the pipeline checks, and what its parts work in.

    Raises:
        ValueError: not a multiple; the message names the nearest.
    """
    multiple, found = math.lcm(*multiples), []
    for name, otherwise in zip(("height", "width"), default, strict=True):
        size = otherwise if getattr(settings, name) is None else getattr(settings, name)
        if size < multiple or size % multiple:
            near = sorted({max(multiple, size // multiple * multiple), max(1, size // multiple + 1) * multiple})
            raise ValueError(
                f"{name} is {size}, expected a multiple of {multiple} for {type(pipe).__name__}: "
                f"{' or '.join(map(str, near))}"
            )
        found.append(size)
    return found[0], found[1]


def both_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a configured size, one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_clip_skip(pipe: Any, skip: int) -> None:
    """Refuse to leave out more layers than a text encoder has.

    Raises:
        ValueError: it has fewer.
    """
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    layers = min(each.config.num_hidden_layers for each in encoders if each is not None)
    if skip >= layers:
        raise ValueError(f"clip_skip is {skip}, expected 0..{layers - 1}: the text encoder has {layers} layers")


def check_prompts(prompts: Sequence[Any]) -> list[str]:
    """Prompts as text.

    Raises:
        TypeError: a prompt that is none.
    """
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt {prompt!r} is {type(prompt).__name__}, expected text")
    return list(prompts)


def warn_of_long_prompts(prompts: Sequence[str], tokenizer: Any, limit: int = 0) -> None:
    """Say which end of a prompt the text encoder does not read."""
    limit = limit or int(tokenizer.model_max_length)
    for prompt in prompts:
        tokens = tokenizer(prompt, truncation=False, add_special_tokens=True, verbose=False).input_ids
        if len(tokens) > limit:
            lost = tokenizer.decode(tokens[limit - 1 :], skip_special_tokens=True)
            warnings.warn(
                f"prompt {prompt[:40]!r}... has {len(tokens)} tokens, the text encoder reads {limit}: "
                f"{lost[:80]!r} is lost",
                stacklevel=2,
            )
