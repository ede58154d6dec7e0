"""The pipelines that can be searched, by the names of their classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from treesearch.backends.chains.schedules import refuse_scheduler
from treesearch.backends.pipelines.checkpoint import components as parts_of
from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.kinds import KINDS, REFUSED
from treesearch.backends.pipelines.listed import CALLED, WITHOUT
from treesearch.backends.pipelines.settings import Settings

FAMILIES = {
    "DDPMPipeline": "unconditional:Unconditional",
    "DDIMPipeline": "unconditional:Unconditional",
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionControlNetPipeline": "stable_diffusion:StableDiffusion",
    "LatentConsistencyModelPipeline": "stable_diffusion:LatentConsistency",
    "StableDiffusionXLPipeline": "sdxl:StableDiffusionXL",
    "StableDiffusionXLControlNetPipeline": "sdxl:StableDiffusionXL",
    **dict.fromkeys(
        (
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
        ),
        "stable_diffusion:StableDiffusion",
    ),
    "LatentConsistencyModelImg2ImgPipeline": "stable_diffusion:LatentConsistency",
    **dict.fromkeys(
        (
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
        ),
        "sdxl:StableDiffusionXL",
    ),
    **dict.fromkeys(("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"), "sd3:StableDiffusion3"),
    **dict.fromkeys(("FluxImg2ImgPipeline", "FluxInpaintPipeline"), "flux:Flux"),
    "FluxFillPipeline": "flux_told:FluxFill",
    **dict.fromkeys(
        ("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"), "flux_told:FluxControl"
    ),
    "DiTPipeline": "dit:DiT",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3",
    "FluxPipeline": "flux:Flux",
    "WanPipeline": "wan:Wan",
    "WanImageToVideoPipeline": "first_frames:WanImage",
    "LTXPipeline": "ltx:LTX",
    "LTXImageToVideoPipeline": "first_frames:LTXImage",
    **dict.fromkeys(KINDS, "modular:Modular"),
    **dict.fromkeys(CALLED, "called:Called"),
}


def refuse_index(index: Mapping[str, Any], given: Mapping[str, Any], settings: Settings) -> None:
    """Refuse what `model_index.json` says already, before any weight is read.

    Args:
        index: of a checkpoint.
        given: components that the user brings, None for those to leave out.
        settings: the user's choices.

    Raises:
        ValueError: a pipeline or scheduler that cannot be searched, or a setting that it does not take.
        CheckpointError: a component that it does not have.
    """
    name = index["_class_name"]
    if given.get("controlnet") is not None and name.replace("Pipeline", "ControlNetPipeline") in FAMILIES:
        name = name.replace("Pipeline", "ControlNetPipeline")
    parts = {*parts_of(dict(index)), *given} - {part for part, value in given.items() if value is None}
    family_of(name).check(name, settings, parts)
    if "scheduler" not in given and isinstance(index.get("scheduler"), list):
        refuse_scheduler(index["scheduler"][1])


_OTHERWISE = {"Wan22": "Wan", "WanImage2Video": "WanImageToVideo", "Wan22Image2Video": "WanImageToVideo"}


def searched_as(index: Mapping[str, Any]) -> Mapping[str, Any]:
    """An index whose class is that of the whole pipeline, where it is of a modular one that a family has only so."""
    name = index["_class_name"]
    plain = name.removesuffix("ModularPipeline")
    whole = f"{_OTHERWISE.get(plain, plain)}Pipeline"
    known = name in FAMILIES or plain == name or whole not in FAMILIES
    return index if known else {**index, "_class_name": whole}


def family_of(name: str) -> type[Family]:
    """The family of a pipeline's class.

    Raises:
        ValueError: it is none that can be searched.
    """
    if name not in FAMILIES:
        raise ValueError(f"{name} cannot be searched: {why_not(name)}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(f"treesearch.backends.pipelines.{module}"), attribute)


def why_not(name: str) -> str:
    """What stands against a pipeline's class that no family has, and what to do instead."""
    if "Modular" in name and (whole := name.replace("Modular", "")) in FAMILIES:
        return f"its blocks run in {whole}: wrap that, DiffusersKernel({whole}(...), ...) with the same components"
    for begins, why in WITHOUT.items():
        if name.startswith(begins):
            return f"{why}: wrap its network as a kernel, see docs/networks.md"
    plain = re.sub("ControlNet(Union)?", "", name)
    if "ControlNet" in name and plain in FAMILIES:
        return f"no family knows what ControlNet adds to a step: {_as(plain)}"
    models = {found: model for listed in tasks().values() for model, found in listed.items()}
    plain = {model: found for found, model in models.items() if found in FAMILIES}.get(models.get(name, ""))
    if "Inpaint" in name and plain:
        return f"{_as(plain)}, with image=... and mask=... if it takes a mask"
    if "Img2Img" in name and plain:
        return f"{_as(plain)}, with image=... if it begins at pictures"
    for begins, why in REFUSED.items():
        if name.startswith(begins):
            return f"{why}: wrap one chunk as a kernel, see docs/networks.md"
    if models.get(name) in _modular_models():
        return "its modular blocks in diffusers have not been tried here: they take a row in pipelines/kinds.py"
    return "no family and no modular blocks of diffusers have it: wrap its network as a kernel, see docs/networks.md"


def _as(plain: str) -> str:
    """How a checkpoint is loaded as another class than its own."""
    return f"wrap diffusers.{plain}.from_pretrained(checkpoint) as DiffusersKernel(pipe, num_steps=...)"


def tasks() -> dict[str, dict[str, str]]:
    """Classes that diffusers' auto pipelines list: {task: {model: class}}."""
    from diffusers.pipelines import auto_pipeline

    listed = {name: getattr(auto_pipeline, name) for name in vars(auto_pipeline) if name.endswith(_LISTED)}
    return {
        name.removeprefix("AUTO_").removesuffix(_LISTED).lower().replace("2", " to "): {
            model: kind.__name__ for model, kind in classes.items()
        }
        for name, classes in listed.items()
    }


_LISTED = "_PIPELINES_MAPPING"


def _modular_models() -> set[str]:
    from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING

    return set(MODULAR_PIPELINE_MAPPING)
