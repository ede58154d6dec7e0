"""Pipelines that run by their own `__call__`, one step at a time: one row of facts a class.

Everything else (what is encoded, the grid, guidance, signs, sizes, decoding) is what the call does when it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from treesearch.backends.pipelines.family import BEGINS

OF_THE_CALL = (
    *("guidance_rescale", "negative_prompt", "max_sequence_length", "clip_skip", "num_frames"),
    *("image", "control_image", "mask", "sigmas", "control_guidance_start", "control_guidance_end"),
)
"""Settings that are arguments of a call, of the same name unless a row says another."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the call of a pipeline does not say itself.

    Args:
        scale: argument that is its guidance scale.
        given: arguments that a step needs at other values than their defaults.
        runs: class of the same model whose call is used instead, where this one's begins at a picture: its steps are
            those of the other from there on.
        names: arguments for settings of another name.
    """

    scale: str = "guidance_scale"
    given: Mapping[str, Any] = field(default_factory=dict)
    runs: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def class_of(self, name: str) -> Any:
        """The class whose call is used for a class of this name."""
        import diffusers

        return getattr(diffusers, self.runs or name)

    def beside(self, name: str) -> dict[str, Any]:
        """Defaults of a class of this name that are others than those of the call."""
        if not self.runs:
            return {}
        own, other = (inspect.signature(row.class_of(name).__call__).parameters for row in (Row(), self))
        return {k: own[k].default for k in own if k in other and own[k].default != other[k].default}

    def takes(self, name: str) -> dict[str, str]:
        """Settings that are read for a class of this name, and what its call has for them; "" for a beginning."""
        arguments = inspect.signature(self.class_of(name).__call__).parameters
        told = {option: self.names.get(option, option) for option in OF_THE_CALL}
        taken = {*self.names.values()}
        told = {k: v for k, v in told.items() if v in arguments and (k in self.names or v not in taken)}
        return told | (dict.fromkeys(BEGINS, "") if self.runs else {})


_CONTROLLED = {"control_image": "image"}
CALLED = {
    "PixArtAlphaPipeline": Row(),
    "PixArtSigmaPipeline": Row(),
    "SanaPipeline": Row(),
    "Lumina2Pipeline": Row(),
    "LuminaPipeline": Row(),
    "ChromaPipeline": Row(),
    "AuraFlowPipeline": Row(),
    "CogVideoXPipeline": Row(),
    "HunyuanVideoPipeline": Row(),
    "CogView3PlusPipeline": Row(),
    "CogView4Pipeline": Row(),
    "HunyuanDiTPipeline": Row(),
    "LattePipeline": Row(),
    "StableDiffusion3ControlNetPipeline": Row(),
    "FluxControlNetPipeline": Row(),
    "QwenImageControlNetPipeline": Row(scale="true_cfg_scale"),
    "CogVideoXImageToVideoPipeline": Row(),
    "CogView4ControlPipeline": Row(),
    "BriaPipeline": Row(),
    "OvisImagePipeline": Row(),
    "PRXPipeline": Row(),
    "SkyReelsV2Pipeline": Row(),
    "MochiPipeline": Row(),
    "LTX2Pipeline": Row(),
    "StableDiffusionPAGPipeline": Row(),
    "StableDiffusionXLPAGPipeline": Row(),
    "StableDiffusion3PAGPipeline": Row(),
    "HunyuanDiTPAGPipeline": Row(),
    "PixArtSigmaPAGPipeline": Row(),
    "SanaPAGPipeline": Row(),
    "StableDiffusionControlNetPAGPipeline": Row(names=_CONTROLLED),
    "StableDiffusionXLControlNetPAGPipeline": Row(names=_CONTROLLED),
    **dict.fromkeys(
        ("StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPAGInpaintPipeline"),
        Row(runs="StableDiffusionPAGPipeline"),
    ),
    **dict.fromkeys(
        ("StableDiffusionXLPAGImg2ImgPipeline", "StableDiffusionXLPAGInpaintPipeline"),
        Row(runs="StableDiffusionXLPAGPipeline"),
    ),
    "StableDiffusion3PAGImg2ImgPipeline": Row(runs="StableDiffusion3PAGPipeline"),
    "StableDiffusionControlNetPAGInpaintPipeline": Row(runs="StableDiffusionControlNetPAGPipeline", names=_CONTROLLED),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Row(
        runs="StableDiffusionXLControlNetPAGPipeline", names=_CONTROLLED
    ),
    "StableDiffusionXLControlNetUnionPipeline": Row(),
    **dict.fromkeys(
        ("StableDiffusionXLControlNetUnionImg2ImgPipeline", "StableDiffusionXLControlNetUnionInpaintPipeline"),
        Row(runs="StableDiffusionXLControlNetUnionPipeline"),
    ),
    **dict.fromkeys(
        ("FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"), Row(runs="FluxControlNetPipeline")
    ),
    "ChromaImg2ImgPipeline": Row(runs="ChromaPipeline"),
    "StableDiffusion3ControlNetInpaintingPipeline": Row(names={"mask": "control_mask"}),
}

_TWO_CHAINS = "its prior and its decoder are two chains, one after the other"
_SOUND = "it draws sound alone, which has not been tried here"
WITHOUT = {
    **dict.fromkeys(
        ("KandinskyCombined", "KandinskyImg2Img", "KandinskyInpaint", "KandinskyPipeline", "KandinskyV22"), _TWO_CHAINS
    ),
    **dict.fromkeys(("StableCascade", "Wuerstchen"), _TWO_CHAINS),
    **dict.fromkeys(("AudioLDM2", "LongCatAudio", "StableAudio"), _SOUND),
    "AnyFlow": "its network is told where a step ends too, which the chain does not tell it",
    "GlmImage": "another model writes tokens before its chain begins",
    "IF": "its steps cut pixels by a quantile of the whole picture (dynamic thresholding)",
}
"""By how a class's name begins, why its call is not run here."""
