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
    *("image", "control_image", "mask", "ip_adapter_image", "sigmas", "control_guidance_start", "control_guidance_end"),
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
        names: arguments for settings of another name; "" for one that means something else there.
        needs: arguments that have no default here, each with why.
        alone: whether it takes one prompt, as text.
        sound: whether its samples are sound alone.
        raw: whether it hands out what its decoder says, in -1..1.
        sees: whether pictures, none or some, stand beside the noise of all rows, and are no row's own.
    """

    scale: str = "guidance_scale"
    given: Mapping[str, Any] = field(default_factory=dict)
    runs: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False
    sound: bool = False
    raw: bool = False
    sees: bool = False

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
    "LTX2ImageToVideoPipeline": Row(sees=True),
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
    "QwenImageControlNetInpaintPipeline": Row(scale="true_cfg_scale", names={"mask": "control_mask"}),
    "ZImageControlNetPipeline": Row(),
    "ZImageControlNetInpaintPipeline": Row(names={"mask": "mask_image"}),
    "SanaControlNetPipeline": Row(),
    "ZImageOmniPipeline": Row(sees=True),
    "HiDreamImagePipeline": Row(),
    "AnimateDiffPipeline": Row(),
    "SanaVideoPipeline": Row(names={"num_frames": "frames"}),
    "WanVACEPipeline": Row(names={"mask": ""}, alone=True),
    "Kandinsky3Pipeline": Row(raw=True),
    "QwenImage21Pipeline": Row(scale="true_cfg_scale", sees=True),
    "NucleusMoEImagePipeline": Row(),
    "LongCatAudioDiTPipeline": Row(needs={"audio_duration_s": "else the prompt says how long a sound is"}, sound=True),
    "StableAudioPipeline": Row(sound=True),
    "StableAudio3Pipeline": Row(sound=True),
    "Ideogram4Pipeline": Row(
        given={"guidance_schedule": None}, needs={"guidance_scale": "its own is a schedule that counts steps"}
    ),
}

_TWO_CHAINS = "its prior and its decoder are two chains, one after the other"
_TEXT_INSIDE = "it encodes prompts in its network, beside the noise"
_JOINED = "it joins its prompt and no text in one encoding, by its own scale"
WITHOUT = {
    **dict.fromkeys(
        ("KandinskyCombined", "KandinskyImg2Img", "KandinskyInpaint", "KandinskyPipeline", "KandinskyV22"), _TWO_CHAINS
    ),
    **dict.fromkeys(("StableCascade", "Wuerstchen"), _TWO_CHAINS),
    "AudioLDM2": _JOINED,
    **dict.fromkeys(("Cosmos3", "OmniGen"), _TEXT_INSIDE),
    **dict.fromkeys(
        ("Cosmos2", "CosmosText", "CosmosVideo"),
        "its class loads guardrail models of a library of its own before it draws",
    ),
    "AnyFlow": "its network is told where a step ends too, which the chain does not tell it",
    "GlmImage": "another model writes tokens before its chain begins",
    "IF": "its steps cut pixels by a quantile of the whole picture (dynamic thresholding)",
    "Kandinsky3Img2Img": "its own call asks its autoencoder for a law, of which that has none",
    "Kolors": "diffusers has it only where sentencepiece is, which is not among what is tested here",
    "QwenImageLayered": "a sample of it is several pictures, one above the other",
    "WanVideoToVideo": "it begins at a video, where a chain here begins at noise or at a picture",
}
"""By how a class's name begins, why its call is not run here."""
