"""The smallest video transformer of Wan, two blocks, on the clips of `experiments.interventions.clips`; no prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.interventions.clips import SHAPE
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.models.memory_encoder import MemoryEncoder, Plan

WIDTH, HEADS, TEXT = 64, 4, 8
PLAN = Plan(
    clip=SHAPE, width=WIDTH, filters=(16, 32), kernels=(3, 3), strides=(1, 1), tokens=2, heads=HEADS, dropout=0.1
)


class VideoNetwork(nn.Module):
    """`WanTransformer3DModel` under one text of zeros: x (n, *SHAPE) and 1000 σ (n,) to z - x_0."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        make: Any = WanTransformer3DModel
        self.wan = make(
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            in_channels=SHAPE[0],
            out_channels=SHAPE[0],
            text_dim=TEXT,
            freq_dim=64,
            ffn_dim=2 * WIDTH,
            num_layers=2,
            rope_max_seq_len=16,
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.wan(x, timestep, x.new_zeros(len(x), 1, TEXT), return_dict=False)[0]


def build_encoder() -> MemoryEncoder:
    """The encoder with fresh weights."""
    return MemoryEncoder(PLAN)


def kernel_of(network: nn.Module, num_steps: int, eta: float = 0.0) -> DiffusionKernel:
    """The chain of a trained network, in even steps of σ."""
    sigmas = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    return DiffusionKernel(network, state_shape=SHAPE, schedule=Schedule.flow(sigmas), eta=eta, name="clips")
