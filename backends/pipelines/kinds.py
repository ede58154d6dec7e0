"""Pipelines that run by the blocks of their own modular form: one row of facts a kind.

Everything else (sizes, the grid, positions, masks, packing, decoding) is what the blocks say when they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the blocks of a pipeline do not say themselves.

    Args:
        model: its name in diffusers' table of modular pipelines.
        scale: argument of the pipeline's own `__call__` that is its guidance scale; none where it has a guider, or
            reads its scale as an input of its blocks.
        distilled: whether the scale is an input of the network, and not a guider's.
        edits: whether a picture stands beside the noise, and does not begin the chain.
        needs_image: whether it does nothing without a picture.
        sees: whether the text encoder sees the picture too, and so is handed one prompt at a time.
        repeats: names of what a picture makes that the blocks want once a row.
        patch: latents of a side that one token stands for.
        draws: states that the decoder takes at a time, where that is not as many as one likes.
        assumes: settings of a checkpoint that the blocks take for given.
        guider: settings of the guider beside its scale.
        says: attributes of blocks and the attributes of the pipeline that stand for them, where the two differ.
    """

    model: str
    scale: str = "guidance_scale"
    distilled: bool = False
    edits: bool = False
    needs_image: bool = False
    sees: bool = False
    repeats: tuple[str, ...] = ()
    patch: int = 2
    draws: int | None = None
    assumes: tuple[tuple[str, Any], ...] = ()
    guider: tuple[tuple[str, Any], ...] = ()
    says: tuple[tuple[str, str], ...] = ()


_KREA_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
_QWEN = Kind(model="qwenimage", scale="true_cfg_scale")
_QWEN_EDIT = Kind(model="qwenimage-edit", scale="true_cfg_scale", edits=True, needs_image=True, sees=True)
_Z_IMAGE = Kind(model="z-image", guider=(("use_original_formulation", True),))

KINDS = {
    "ErnieImagePipeline": Kind(model="ernie-image", patch=1),
    "Flux2KleinPipeline": Kind(model="flux2-klein", edits=True),
    "Flux2Pipeline": Kind(
        model="flux2", distilled=True, edits=True, says=(("DEFAULT_SYSTEM_MESSAGE", "system_message"),)
    ),
    "FluxKontextPipeline": Kind(model="flux-kontext", distilled=True, edits=True, repeats=("image_latents",)),
    "HunyuanVideo15Pipeline": Kind(model="hunyuan-video-1.5", scale="", patch=1, draws=1),
    "Krea2Pipeline": Kind(
        model="krea2",
        guider=(("use_original_formulation", True),),
        assumes=(("text_encoder_select_layers", _KREA_LAYERS), ("patch_size", 2)),
    ),
    "QwenImagePipeline": _QWEN,
    "QwenImageImg2ImgPipeline": _QWEN,
    "QwenImageInpaintPipeline": _QWEN,
    "QwenImageEditPipeline": _QWEN_EDIT,
    "QwenImageEditInpaintPipeline": _QWEN_EDIT,
    "QwenImageEditPlusPipeline": Kind(
        model="qwenimage-edit-plus", scale="true_cfg_scale", edits=True, needs_image=True, sees=True
    ),
    "ZImagePipeline": _Z_IMAGE,
    "ZImageImg2ImgPipeline": _Z_IMAGE,
    "ZImageInpaintPipeline": _Z_IMAGE,
}

_OBJECTS = {
    "ErnieImage": "ErnieImage",
    "Flux2Klein": "Flux2Klein",
    "Flux2KleinBase": "Flux2Klein",
    "Flux2": "Flux2",
    "FluxKontext": "FluxKontext",
    "HunyuanVideo15": "HunyuanVideo15",
    "Krea2": "Krea2",
    "Krea2Turbo": "Krea2",
    "QwenImage": "QwenImage",
    "QwenImageEdit": "QwenImageEdit",
    "QwenImageEditPlus": "QwenImageEditPlus",
    "ZImage": "ZImage",
}
KINDS |= {
    f"{name}ModularPipeline": replace(KINDS[f"{whole}Pipeline"], scale="", guider=())
    for name, whole in _OBJECTS.items()
}
"""Modular pipelines themselves, with the components that they have loaded, their own blocks and their own guider."""

REFUSED = {
    "Helios": "it draws a video chunk after chunk, each a chain of its own on what the chunks before it left",
}


def form_of(pipe: Any, kind: Kind) -> tuple[Any, Any]:
    """The class of a pipeline's modular form, and its blocks: its own, where it is one."""
    return (type(pipe), pipe.blocks) if hasattr(pipe, "blocks") else modular_form(kind, pipe.config)


def modular_form(kind: Kind, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of diffusers' modular pipeline for a checkpoint so configured, such as a distilled one, and its blocks.

    Raises:
        ImportError: the installed diffusers has none.
    """
    import diffusers
    from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING

    if kind.model not in MODULAR_PIPELINE_MAPPING:
        raise ImportError(f"diffusers {diffusers.__version__} has no modular blocks of {kind.model}: update it")
    found = getattr(diffusers, MODULAR_PIPELINE_MAPPING[kind.model](dict(config)))
    return found, getattr(diffusers, found.default_blocks_name)()
