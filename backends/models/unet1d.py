"""The network of a trajectory model: a temporal U-Net that is told which entries of a plan are known.

Beside x and the mask M every position reads the known entries of the first and last row and how far along it is, which
a few convolutions would have to carry across the horizon otherwise.

Source: the temporal U-Net of Planning with Diffusion for Flexible Behavior Synthesis (Janner et al., 2022), sec. 3, as
diffusers has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 192)


@final
class TrajectoryNetwork(nn.Module):
    """diffusers' `UNet1DModel` over time, told what is known.

    Args:
        channels: C.
        widths: channels at H, H/2, ...; H must divide by 2 ** (len(widths) - 1).
    """

    def __init__(self, channels: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_1d import UNet1DModel
        except ImportError as error:
            raise ImportError("trajectory models need diffusers: pip install diffusers") from error
        self.multiple = 2 ** (len(widths) - 1)
        self.unet = UNet1DModel(
            in_channels=4 * channels + 1,
            out_channels=channels,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            flip_sin_to_cos=False,
            freq_shift=1,
            down_block_types=("DownResnetBlock1D",) * len(widths),
            mid_block_type="MidResTemporalBlock1D",
            up_block_types=("UpResnetBlock1D",) * len(widths),
            out_block_type="OutConv1DBlock",
            block_out_channels=tuple(widths),
            act_fn="mish",
            layers_per_block=0,
        )

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        """Prediction (n, H, C) for states x (n, H, C), timesteps (n,) in 0..999 and known entries mask (n, H, C)."""
        known = mask.to(x.dtype)
        ends = torch.cat([x[:, :1] * known[:, :1], x[:, -1:] * known[:, -1:]], 2).expand(-1, x.shape[1], -1)
        along = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype, device=x.device)
        features = torch.cat([x, known, ends, along[None, :, None].expand(len(x), -1, -1)], 2)
        return self.unet(features.transpose(1, 2), timestep).sample.transpose(1, 2)
