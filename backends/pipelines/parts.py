"""What is inside a network: adapters that need inputs of their own, memory of earlier calls, the scales of a LoRA.

A family hands its network a state, a level and a text. A network that wants more, or that reuses what it computed for
the call before (in a search: for other rows at other levels), is refused by name before anything runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_IMAGE_PROMPTS = ("image_proj", "text_image_proj", "ip_image_proj")
_NEED_MORE = {"image": "image_embeds", "image_hint": "image_embeds and hint", "text_image": "image_embeds"}


def unwrapped(module: Any) -> Any:
    """The module under `torch.compile`, whose wrapper has neither a length nor buffers of its own."""
    return getattr(module, "_orig_mod", module)


def refuse_adapters(name: str, network: Any, inputs: Mapping[str, Any], *, pictures: bool = False) -> None:
    """Refuse a network that needs more than a state, a level and a text.

    Args:
        name: of the pipeline, for the message.
        network: of the pipeline.
        inputs: what the user hands to every call of it.
        pictures: whether the user gives pictures for IP-Adapters.

    Raises:
        ValueError: it does; the message says what to do.
    """
    config = network.config
    if _takes_image_prompts(network) and not pictures:
        raise ValueError(
            f"{name} has an IP-Adapter, which needs a picture with every call: give it one, ip_adapter_image=..., "
            "where the pipeline runs on a U-Net, or take it off with pipe.unload_ip_adapter()"
        )
    if str(config.get("attention_type")).startswith("gated") or getattr(network, "position_net", None) is not None:
        raise ValueError(f"{name} is a GLIGEN, which needs boxes with every call: use a checkpoint without them")
    if getattr(network, "class_embedding", None) is not None and "class_labels" not in inputs:
        raise ValueError(
            f"{name} is conditioned on a class: say which, network_inputs={{'class_labels': torch.tensor([...])}}"
        )
    added = config.get("addition_embed_type")
    if added in _NEED_MORE and "added_cond_kwargs" not in inputs:
        raise ValueError(f"{name} needs {_NEED_MORE[added]} with every call: use a checkpoint without them")
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise ValueError(f"{name} has a network that begins from an image: use the text-to-video checkpoint")


def _takes_image_prompts(network: Any) -> bool:
    projected = getattr(network.config, "encoder_hid_dim_type", None) in _IMAGE_PROMPTS  # an attribute: adapters set it
    processors = getattr(network, "attn_processors", {}).values()
    adapted = any("IPAdapter" in type(each).__name__ for each in processors)
    return projected or adapted or getattr(network, "image_proj", None) is not None


def refuse_channels(name: str, network: Any, channels: int) -> None:
    """Refuse a network of inpainting, depth, instructions or control, which takes more than latents.

    Raises:
        ValueError: it takes another number of channels than the state has.
    """
    taken = network.config.in_channels
    if taken != channels:
        raise ValueError(
            f"{name} has a network of {taken} channels for latents of {channels}: it is made for inpainting, depth, "
            "control or another autoencoder; use the text-to-image checkpoint"
        )


def refuse_inputs(network: Any, inputs: Mapping[str, Any], filled: Iterable[str]) -> None:
    """Refuse inputs that the network does not take, or that the kernel fills in itself.

    Raises:
        ValueError: one of them.
    """
    taken = inspect.signature(unwrapped(network).forward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values()):
        return
    for name in inputs:
        if name in filled:
            raise ValueError(f"network_inputs has {name!r}, which the kernel fills in itself: leave it out")
        if name not in taken:
            raise ValueError(f"{type(unwrapped(network)).__name__} takes no {name!r}: choose {', '.join(taken)}")


def refuse_memory(modules: Mapping[str, Any]) -> None:
    """Refuse networks that reuse what they computed for an earlier call.

    A law of x_s given x_t alone is what a search branches by; with a cache, rewards depend on the batch.

    Args:
        modules: by their names in the pipeline.

    Raises:
        ValueError: one that caches activations, or carries a hook with a memory.
    """
    for name, module in modules.items():
        if (config := getattr(module, "_cache_config", None)) is not None:
            raise ValueError(
                f"the {name} caches activations between calls ({type(config).__name__}), so that a step would depend "
                f"on the calls before it: pipe.{name}.disable_cache()"
            )
        for part, hook in _hooks_with_memory(module):
            raise ValueError(
                f"{name}.{part} has a hook with a memory ({hook}), so that a step would depend on the calls before "
                f"it: pipe.{name}.disable_cache() if enable_cache() set it, else take the hook off"
            )


def refuse_offloaded(modules: Mapping[str, Any]) -> None:
    """Refuse networks that accelerate moves between devices; those under diffusers' group offload are left to it.

    Args:
        modules: by their names in the pipeline.

    Raises:
        ValueError: one of them.
    """
    for name, module in modules.items():
        if len({*(getattr(module, "hf_device_map", None) or {}).values()}) > 1 or _is_offloaded(module):
            raise ValueError(
                f"the {name} is moved between devices by accelerate (cpu offload or a device_map), and a kernel moves "
                "networks itself: pipe.remove_all_hooks() or pipe.reset_device_map(), then "
                f"text_encoders='offload' or pipe.{name}.enable_group_offload(...)"
            )


def place(name: str, module: nn.Module, device: torch.device) -> None:
    """Move a module; what bitsandbytes holds in 8 bits cannot be, and may stay where the kernel is.

    Raises:
        ValueError: it is elsewhere.
    """
    if not getattr(module, "is_loaded_in_8bit", False):
        module.to(device)
    elif (own := next(module.parameters()).device).type != device.type:
        raise ValueError(f"the {name} is of 8 bits by bitsandbytes and stays on {own}: device={str(own)!r}")


def _is_offloaded(module: nn.Module) -> bool:
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    return any(type(hook).__name__ == "CpuOffload" or getattr(hook, "offload", False) for hook in hooks)


def _hooks_with_memory(module: nn.Module) -> Iterator[tuple[str, str]]:
    for part, each in module.named_modules():
        hooks = getattr(getattr(each, "_diffusers_hook", None), "hooks", {})
        yield from ((part, type(hook).__name__) for hook in hooks.values() if getattr(hook, "_is_stateful", False))


@contextmanager
def kept_scales(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave the scales of LoRA layers as they were: a pipeline that was told a scale of 0 puts them to 1."""
    parts = [getattr(part, "scaling", None) for module in modules for part in module.modules()]
    scales = [(each, dict(each)) for each in parts if isinstance(each, dict)]
    try:
        yield
    finally:
        for each, before in scales:
            each.update(before)
