"""The pipelines that can be searched, by the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from treesearch.backends.chains.schedules import refuse_scheduler
from treesearch.backends.pipelines.checkpoint import components as parts_of
from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.kinds import KINDS
from treesearch.backends.pipelines.settings import Settings

FAMILIES = {
    "DDPMPipeline": "unconditional:Unconditional",
    "DDIMPipeline": "unconditional:Unconditional",
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionControlNetPipeline": "stable_diffusion:StableDiffusion",
    "LatentConsistencyModelPipeline": "stable_diffusion:LatentConsistency",
    "StableDiffusionXLPipeline": "sdxl:StableDiffusionXL",
    "StableDiffusionXLControlNetPipeline": "sdxl:StableDiffusionXL",
    "DiTPipeline": "dit:DiT",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3",
    "FluxPipeline": "flux:Flux",
    "WanPipeline": "wan:Wan",
    "LTXPipeline": "ltx:LTX",
    **dict.fromkeys(KINDS, "modular:Modular"),
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
    parts = {*parts_of(dict(index)), *given} - {part for part, value in given.items() if value is None}
    family_of(name).check(name, settings, parts)
    if "scheduler" not in given and isinstance(index.get("scheduler"), list):
        refuse_scheduler(index["scheduler"][1])


def family_of(name: str) -> type[Family]:
    """The family of a pipeline's class.

    Raises:
        ValueError: it is none that can be searched.
    """
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{name} is no pipeline that can be searched, expected one of {known}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(f"treesearch.backends.pipelines.{module}"), attribute)
