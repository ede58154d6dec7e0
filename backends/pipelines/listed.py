"""Pipelines that run by their own `__call__`, one step at a time: one row of facts a class.

Everything else (what is encoded, the grid, guidance, signs, sizes, decoding) is what the call does when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the call of a pipeline does not say itself.

    Args:
        scale: argument that is its guidance scale.
        given: arguments that a step needs at other values than their defaults.
    """

    scale: str = "guidance_scale"
    given: Mapping[str, Any] = field(default_factory=dict)


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
}

_TWO_CHAINS = "its prior and its decoder are two chains, one after the other"
_SOUND = "it draws sound, and decoded sound is not delivered yet"
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
