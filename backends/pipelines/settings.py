"""What a user chooses for a pipeline, and what each choice may be: one table, read before anything is loaded."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch

from treesearch.backends.pipelines.guiders import check_guider

Rule = Callable[[str, Any], None]
"""(name, value) -> None.

Raises:
    TypeError: a value of another kind.
    ValueError: one out of range.
"""


def whole(low: int | None = None, high: int | None = None) -> Rule:
    """A whole number, no bool, in low..high."""

    def rule(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} is {_short(value)}, expected a whole number")
        if not (low is None or int(value) >= low) or not (high is None or int(value) <= high):
            span = f"at least {low}" if high is None else f"{low}..{high}"
            raise ValueError(f"{name} is {value}, expected {span}")

    return rule


def number(low: float = -math.inf, high: float = math.inf, hint: str = "") -> Rule:
    """A finite number, no bool, in low..high."""
    bounds = f"{low:g}..{high:g}" if math.isfinite(high) else "a finite number"
    span = f"a number >= {low:g}" if math.isfinite(low) and not math.isfinite(high) else bounds

    def rule(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {_short(value)}, expected a number{hint}")
        if not (math.isfinite(value) and low <= float(value) <= high):
            raise ValueError(f"{name} is {value}, expected {span}{hint}")

    return rule


def of_type(kind: type | tuple[type, ...], words: str) -> Rule:
    """A value of one of some types; bools are none of them unless `bool` is named."""

    def rule(name: str, value: Any) -> None:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} is {_short(value)}, expected {words}")

    return rule


def one_of(*choices: str) -> Rule:
    """One of some names."""

    def rule(name: str, value: Any) -> None:
        if not isinstance(value, str):
            raise TypeError(f"{name} is {_short(value)}, expected a name: choose {_listed(choices)}")
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}: choose {_listed(choices)}")

    return rule


def optional(rule: Rule) -> Rule:
    """The same, or None."""

    def maybe(name: str, value: Any) -> None:
        if value is not None:
            rule(name, value)

    return maybe


def place(name: str, value: Any) -> None:
    """A folder, a file or a hub id."""
    of_type((str, os.PathLike), "text: a folder or a hub id")(name, value)
    if not os.fspath(value):
        raise ValueError(f"{name} is empty, expected a folder or a hub id")


def places(name: str, value: Any) -> None:
    """A folder, a file or a hub id, or several with a weight each."""
    if not isinstance(value, Mapping):
        place(name, value)
        return
    if not value:
        raise ValueError(f"{name} is empty, expected places of weights with a number each")
    for each, weight in value.items():
        place(name, each)
        number(hint=", its weight")(f"{name} {os.fspath(each)!r}", weight)


def pictures(name: str, value: Any) -> None:
    """A PIL image or its file, or several."""
    from PIL.Image import Image

    given = value if isinstance(value, list) else [value]
    if not given or not all(isinstance(each, (Image, str, os.PathLike)) for each in given):
        raise TypeError(f"{name} is {_short(value)}, expected a PIL image or its file, or a list of them")


def guider(name: str, value: Any) -> None:
    """A guider of diffusers without a memory."""
    check_guider(value)


def inputs(name: str, value: Any) -> None:
    """Named values."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} is {_short(value)}, expected a mapping of names to values")


def _short(value: Any) -> str:
    """A value of the wrong kind, with its type."""
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({type(value).__name__})"


def _listed(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def encodings(name: str, value: Any) -> None:
    """By prompt, named tensors."""
    inputs(name, value)
    for prompt, given in value.items():
        if not isinstance(given, Mapping) or not all(isinstance(each, torch.Tensor) for each in given.values()):
            raise TypeError(f"{name} of {prompt[:40]!r} is {_short(given)}, expected tensors by the names that "
                            "encode_prompt has for them")  # fmt: skip


def scales(name: str, value: Any) -> None:
    """A number, or one for each of several."""
    for each in value if isinstance(value, list) and value else [value]:
        number(hint=", or a list of one a ControlNet")(name, each)


def parts_of_the_grid(name: str, value: Any) -> None:
    """A share of the steps, or one for each of several."""
    for each in value if isinstance(value, list) and value else [value]:
        number(0, 1, hint=", or a list of one a ControlNet")(name, each)


def indices(name: str, value: Any) -> None:
    """Layers, by number."""
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{name} is {_short(value)}, expected a list of layers by number, such as [7, 8, 9]")
    for each in value:
        whole(0)(name, each)


SIZES = ("original_size", "crops_coords_top_left", "target_size")


def sizes(name: str, value: Any) -> None:
    """Pairs of whole numbers, by the names that SDXL has for them."""
    inputs(name, value)
    known = [*SIZES, *(f"negative_{each}" for each in SIZES)]
    for key, pair in value.items():
        if key not in known:
            raise ValueError(f"{name} has {key!r}, choose {', '.join(known)}")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{key} is {_short(pair)}, expected two numbers of pixels, down and across")
        for each in pair:
            whole(0)(key, each)


TEXT, FLAG = of_type(str, "text"), of_type(bool, "True or False")


def absent(name: str, value: Any) -> None:
    """Text, or a text for each prompt by the prompt itself."""
    texts = [*value, *value.values()] if isinstance(value, Mapping) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"{name} is {_short(value)}, expected text, one for all prompts, or a mapping of each prompt to its own"
        )


def levels(name: str, value: Any) -> None:
    """Noise levels that fall."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {_short(value)}, expected a list of numbers from 1 down")
    for each in value:
        number(0, 1)(name, each)
    if not value or any(after >= before for before, after in itertools.pairwise(value)):
        raise ValueError(f"{name} is {_short(value)}, expected numbers that fall")


RULES: dict[str, Rule] = {
    # of `Settings`; sides and frames have their range in the family
    "height": optional(whole()),
    "width": optional(whole()),
    "num_frames": optional(whole()),
    "guidance_scale": optional(number(0, hint="; 1 or less is unguided")),
    "guidance_scale_2": optional(number(0)),
    "guider": optional(guider),
    "guidance_rescale": number(0, 1),
    "negative_prompt": optional(absent),
    "sigmas": optional(levels),
    "prompt_embeds": optional(encodings),
    "max_sequence_length": optional(whole(1)),
    "clip_skip": optional(whole(0)),
    "control_scale": optional(scales),
    "control_guidance_start": parts_of_the_grid,
    "control_guidance_end": parts_of_the_grid,
    "skip_guidance_layers": optional(indices),
    "skip_layer_guidance_scale": number(),
    "skip_layer_guidance_start": number(0, 1),
    "skip_layer_guidance_stop": number(0, 1),
    "sizes": optional(sizes),
    "image": optional(pictures),
    "ip_adapter_image": optional(pictures),
    "mask": optional(pictures),
    "network_inputs": inputs,
    # of the chain and of what surrounds it
    "num_steps": whole(1),
    "eta": number(0, 1),
    "step": optional(TEXT),
    "device": optional(of_type((str, torch.device), "a name such as cpu, cuda or cuda:1")),
    "text_encoders": one_of("keep", "offload", "free"),
    "decode_batch": whole(1),
    "tiling": FLAG,
    "slicing": FLAG,
    "compile": FLAG,
    "channels_last": FLAG,
    "strength": optional(number(0, 1)),
    # of a checkpoint
    "checkpoint": place,
    "dtype": of_type((str, torch.dtype), "a name such as float32 or bfloat16"),
    "variant": optional(TEXT),
    "revision": optional(TEXT),
    "lora": optional(places),
    "components": optional(inputs),
}


def check(options: Mapping[str, Any]) -> None:
    """Hold options against `RULES`; those without a rule pass.

    Raises:
        TypeError: a value of another kind, a bool for a number, a list for one value.
        ValueError: a value out of range, or not finite.
    """
    for name, value in options.items():
        if name in RULES:
            RULES[name](name, value)


_PICTURES = ("image", "mask", "ip_adapter_image")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user chooses for a pipeline; None takes the pipeline's own default.

    Args:
        height, width: of the images, in pixels.
        num_frames: of videos.
        guidance_scale: w; 1 or less is unguided. Distilled models read it as an input.
        guidance_scale_2: w of the second expert, where there are two; None takes that of the first.
        guider: of diffusers, in place of the pipeline's own, where its blocks have one; it is copied.
        guidance_rescale: φ in [0, 1].
        negative_prompt: what ∅ says, for all prompts, or a mapping of each prompt to what it says for that one.
        sigmas: noise levels that the scheduler is asked for in place of its pipeline's, one a step, before any shift.
        prompt_embeds: {prompt: {name: tensor}}, what stands for the text of a prompt, of one row each, by the names of
            the arguments of the pipeline's `encode_prompt`; rewards are told the prompt.
        max_sequence_length: tokens of a T5 encoder.
        clip_skip: layers to leave out at the end of CLIP's text encoder.
        control_image: input of a ControlNet: an image, or one a ControlNet.
        control_scale: weight of what the ControlNet adds; of several, a list of one each, or one for all; None takes
            the pipeline's own default.
        control_guidance_start, control_guidance_end: shares of the steps between which a ControlNet takes part, as its
            pipeline counts them; of several, a list of one each, or one for all.
        skip_guidance_layers: of SD 3.5, layers without which a third pass is made, away from which the steps between
            two shares of the grid are guided.
        skip_layer_guidance_scale, skip_layer_guidance_start, skip_layer_guidance_stop: how far, and which those are.
        sizes: what SDXL is told of a picture, pairs of pixels by name: original_size, crops_coords_top_left,
            target_size, and the same after "negative_" for ∅; otherwise the size asked for, uncropped.
        image: picture that the model edits, or that the chain begins at, a PIL image or its file; models that edit take
            several in a list.
        ip_adapter_image: picture that the pipeline's IP-Adapter is told, or a list of one an adapter.
        mask: white where a picture is drawn anew, black where it stays, of the picture's size.
        strength: share of the T steps that a chain from a picture takes; None takes the pipeline's own default.
        network_inputs: handed to every network call as they are, such as {"cross_attention_kwargs": {"scale": 0.5}};
            the scale of a LoRA reaches the text encoders too, as in the pipelines.

    Raises:
        TypeError, ValueError: see `check`.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guider: Any = None
    guidance_rescale: float = 0.0
    negative_prompt: str | Mapping[str, str] | None = None
    sigmas: Sequence[float] | None = None
    prompt_embeds: Mapping[str, Mapping[str, torch.Tensor]] | None = None
    max_sequence_length: int | None = None
    clip_skip: int | None = None
    control_image: Any = None
    control_scale: float | list[float] | None = None
    control_guidance_start: float | list[float] = 0.0
    control_guidance_end: float | list[float] = 1.0
    skip_guidance_layers: Sequence[int] | None = None
    skip_layer_guidance_scale: float = 2.8
    skip_layer_guidance_start: float = 0.01
    skip_layer_guidance_stop: float = 0.2
    sizes: Mapping[str, tuple[int, int]] | None = None
    image: Any = None
    ip_adapter_image: Any = None
    mask: Any = None
    strength: float | None = None
    network_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(vars(self))

    @staticmethod
    def of(options: Mapping[str, Any]) -> Settings:
        """From the options of a kernel, the others left aside."""
        names = {each.name for each in fields(Settings)}
        chosen = {name: value for name, value in options.items() if name in names}
        check(chosen)
        return Settings(**chosen | {name: opened(chosen.get(name)) for name in _PICTURES})


def opened(given: Any) -> Any:
    """A picture, or several, from their files if need be; upright.

    Raises:
        ValueError: a file that is no picture, or is not there.
    """
    from PIL import Image, ImageOps

    if isinstance(given, list):
        return [opened(each) for each in given]
    if not isinstance(given, (str, os.PathLike)):
        return given
    try:
        with Image.open(given) as found:
            found.load()
            return ImageOps.exif_transpose(found)
    except OSError as error:
        raise ValueError(f"cannot read {os.fspath(given)!r} as a picture: {error}") from error
