"""Diffusers pipelines with random weights: tiny for tests, medium for a CPU (one step takes tens of milliseconds), full
as published."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.support import tiny
from treesearch.backends.pipelines import DiffusersKernel

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNETS = {
    ("sd", "tiny"): {"sample_size": 8, "block_out_channels": (8, 16)},
    ("sd", "medium"): {"sample_size": 16, "block_out_channels": (24, 48)},
    ("sd", "full"): {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "heads": (8, 8, 8, 8)},
    ("sdxl", "tiny"): {"sample_size": 8, "block_out_channels": (8, 16), "depth": (1, 1)},
    ("sdxl", "medium"): {"sample_size": 16, "block_out_channels": (24, 48), "depth": (1, 2)},
    ("sdxl", "full"): {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "depth": (1, 2, 10),
        "heads": (5, 10, 20),
    },
}
TRANSFORMERS = {
    ("sd3", "tiny"): {"sample_size": 8, "layers": 1, "heads": 2, "head_dim": 16},
    ("sd3", "medium"): {"sample_size": 16, "layers": 2, "heads": 2, "head_dim": 16},
    ("sd3", "full"): {"sample_size": 128, "layers": 24, "heads": 24, "head_dim": 64},
    ("flux", "tiny"): {"layers": (1, 1), "heads": 2},
    ("flux", "medium"): {"layers": (2, 4), "heads": 6},
    ("flux", "full"): {"layers": (19, 38), "heads": 24},
}
WIDTHS = {"tiny": (32, 16), "medium": (64, 32), "full": (768, 1280)}  # of the two CLIPs
T5 = {"tiny": 64, "medium": 128, "full": 4096}
PIXELS = {"tiny": 32, "medium": 32, "full": 1024}  # FLUX and Qwen-Image take any size
FRAMES = {"tiny": (32, 32, 5), "medium": (32, 32, 5), "full": (480, 832, 81)}  # of Wan: height, width, how many


def unet(name: str, size: str) -> nn.Module:
    """The U-Net of SD 1.5 or SDXL."""
    config: dict[str, Any] = dict(UNETS[name, size])
    blocks, xl, (first, second) = len(config["block_out_channels"]), name == "sdxl", WIDTHS[size]
    plain, cross = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    kinds = [plain, *[cross] * (blocks - 1)] if xl else [*[cross] * (blocks - 1), plain]
    more: dict[str, Any] = {"cross_attention_dim": first}
    if xl:
        time_dim = 256 if size == "full" else 8
        more = {
            "cross_attention_dim": first + second,
            "transformer_layers_per_block": config.pop("depth"),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": time_dim,
            "projection_class_embeddings_input_dim": second + 6 * time_dim,
        }
    return diffusers.UNet2DConditionModel(
        attention_head_dim=config.pop("heads", (2,) * blocks),
        down_block_types=tuple(down for down, _ in kinds),
        up_block_types=tuple(up for _, up in reversed(kinds)),
        norm_num_groups=32 if size == "full" else 8,
        **config,
        **more,
    )


def sd3_transformer(size: str) -> nn.Module:
    """The transformer of SD3-medium."""
    config = TRANSFORMERS["sd3", size]
    return diffusers.SD3Transformer2DModel(
        sample_size=config["sample_size"],
        in_channels=16 if size == "full" else 4,
        out_channels=16 if size == "full" else 4,
        num_layers=config["layers"],
        attention_head_dim=config["head_dim"],
        num_attention_heads=config["heads"],
        joint_attention_dim=T5[size],
        caption_projection_dim=config["heads"] * config["head_dim"],
        pooled_projection_dim=sum(WIDTHS[size]),
        pos_embed_max_size=192 if size == "full" else 16,
    )


def flux_transformer(size: str) -> nn.Module:
    """The transformer of FLUX.1-dev."""
    config, full = TRANSFORMERS["flux", size], size == "full"
    return diffusers.FluxTransformer2DModel(
        in_channels=64 if full else 16,
        num_layers=config["layers"][0],
        num_single_layers=config["layers"][1],
        attention_head_dim=128 if full else 16,
        num_attention_heads=config["heads"],
        joint_attention_dim=T5[size],
        pooled_projection_dim=WIDTHS[size][0],
        axes_dims_rope=(16, 56, 56) if full else (4, 6, 6),
        guidance_embeds=True,
    )


def qwen_transformer(size: str) -> nn.Module:
    """The transformer of Qwen-Image, whose size is diffusers' default."""
    if size == "full":
        return diffusers.QwenImageTransformer2DModel()
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1 if size == "tiny" else 4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


def wan_transformer(size: str) -> nn.Module:
    """The transformer of Wan 2.1, the text-to-video model of 1.3B."""
    if size == "full":
        return diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    return tiny.wan_transformer()


def autoencoder(name: str, size: str) -> nn.Module:
    """The VAE, with 4 or 16 channels of latents."""
    full, wide = size == "full", name in ("sd3", "flux")
    channels = (128, 256, 512, 512) if full else (8, 16)
    units = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2 if full else 1,
        latent_channels=16 if full and wide else 4,
        norm_num_groups=32 if full else 4,
        sample_size=1024 if full and name != "sd" else 512 if full else 32,
        **units if wide else {"scaling_factor": 0.18215 if name == "sd" else 0.13025},
    )


def clip(width: int, projected: bool) -> nn.Module:
    """A small text encoder whose output has the width of the real one."""
    return tiny.clip_text(width, projected=projected)


def pipeline(name: str, size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline with random weights; text encoders are small, and SD3 is without its T5, as it may be."""
    torch.manual_seed(0)
    if name in ("qwen_image", "wan"):
        pipe = (qwen_image if name == "qwen_image" else wan)(size, device)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device) if dtype == torch.float32 else pipe.to(device, dtype)
    first, second = WIDTHS[size]
    with device:
        parts: dict[str, Any] = {"vae": autoencoder(name, size)}
        parts |= {"unet": unet(name, size)} if name in ("sd", "sdxl") else {}
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts |= {"text_encoder": clip(first, name == "sd3"), "tokenizer": tiny.clip_tokenizer()}
    if name in ("sdxl", "sd3"):
        parts |= {"text_encoder_2": clip(second, True), "tokenizer_2": tiny.clip_tokenizer(pad_token="!")}
    if name == "sd":
        parts |= {"scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **SCHEDULE)}
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts)
    elif name == "sdxl":
        scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **SCHEDULE)
        pipe = diffusers.StableDiffusionXLPipeline(scheduler=scheduler, **parts)
    elif name == "sd3":
        with device:
            parts |= {"transformer": sd3_transformer(size), "text_encoder_3": None, "tokenizer_3": None}
        pipe = diffusers.StableDiffusion3Pipeline(scheduler=flow, **parts)
    else:
        with device:
            parts |= {"transformer": flux_transformer(size)}
        parts |= {"text_encoder_2": tiny.t5_text(width=T5[size]), "tokenizer_2": tiny.t5_tokenizer(512)}
        pipe = diffusers.FluxPipeline(scheduler=flow, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device) if dtype == torch.float32 else pipe.to(device, dtype)


def qwen_image(size: str, device: torch.device) -> Any:
    """Qwen-Image, with a small text encoder whose output has the width of the real one."""
    scheduler, small, _, tokenizer, _ = tiny.qwen_image_parts()
    with device:
        vae = diffusers.AutoencoderKLQwenImage() if size == "full" else small
        transformer = qwen_transformer(size)
    text = tiny.qwen_vl(width=3584 if size == "full" else 32)
    return diffusers.QwenImagePipeline(scheduler, vae, text, tokenizer, transformer)


def wan(size: str, device: torch.device) -> Any:
    """Wan 2.1, on Euler's steps of flow."""
    tokenizer, text, small, _ = tiny.wan_parts()
    with device:
        vae = diffusers.AutoencoderKLWan() if size == "full" else small
        transformer = wan_transformer(size)
    text = tiny.t5_text("UMT5", width=4096) if size == "full" else text
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.WanPipeline(tokenizer, text, vae, flow, transformer)


def kernel_of(name: str, size: str, num_steps: int, device: torch.device, dtype: torch.dtype) -> DiffusersKernel:
    """Its kernel: SD with DDIM at η = 1, as its pipeline is called; the others with their defaults."""
    sides = {"height": PIXELS[size], "width": PIXELS[size]} if name in ("flux", "qwen_image") else {}
    if name == "wan":
        sides = dict(zip(("height", "width", "num_frames"), FRAMES[size], strict=True))
    limit = {"max_sequence_length": 32} if name == "flux" and size != "full" else {}
    return DiffusersKernel(pipeline(name, size, device, dtype), num_steps=num_steps, device=device, **sides, **limit)


def random_weights(name: str, size: str = "full", num_steps: int = 50) -> DiffusersKernel:
    """A kernel for expressions: `experiments.bench.architectures:random_weights("wan")`; on a GPU if there is one.

    Args:
        name: sd, sdxl, sd3, flux, qwen_image or wan.
        size: tiny, medium or full.
        num_steps: T.

    Raises:
        ValueError: full size without a GPU.
    """
    gpu = torch.cuda.is_available()
    if size == "full" and not gpu:
        raise ValueError(f"{name} at full size is not run without a GPU: size='tiny' tries the command")
    dtype = torch.bfloat16 if size == "full" else torch.float32
    return kernel_of(name, size, num_steps, torch.device("cuda" if gpu else "cpu"), dtype)
