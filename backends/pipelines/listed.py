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
    "BriaPipeline": Row(),
    "OvisImagePipeline": Row(),
    "PRXPipeline": Row(),
    "SkyReelsV2Pipeline": Row(),
    "MochiPipeline": Row(),
}
