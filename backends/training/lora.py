"""Students as low-rank changes: the teacher's network with W + B A in some of its layers, where only A and B learn.

B = 0 at first, so that a student begins as its teacher bit for bit. Files of A and B are those of peft and diffusers.

Source: LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), section 4.1. LCM-LoRA (Luo et al., 2023),
for consistency distillation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from treesearch.rewards.numeric import is_whole

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTER = "student"


def with_lora(network: nn.Module, rank: int = 8, parts: Sequence[str] = ATTENTION) -> nn.Module:
    """The network with factors in the layers whose names end so, in place; its own weights are frozen.

    Raises:
        ImportError: peft is missing.
        ValueError: a rank below 1, or no layer of these names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("low-rank students need peft: pip install peft") from error
    if not is_whole(rank):
        raise ValueError(f"rank is {rank!r}, expected 1 or more")
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(parts)), network, adapter_name=ADAPTER
    )
    for name, weight in network.named_parameters():
        weight.requires_grad_(f".{ADAPTER}." in name)
    return network


def lora_weights(network: nn.Module) -> dict[str, Tensor]:
    """The factors alone, as peft names them: what a file of the student holds."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(network, adapter_name=ADAPTER)
