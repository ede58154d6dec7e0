"""Tiny checkpoints of pipelines that are given a picture; see `tiny`."""

import diffusers
import transformers

from tests.support.tiny import (
    SD_BETAS,
    SD_BLOCKS,
    family,
    flux_pipeline,
    ltx_parts,
    qwen_image_parts,
    qwen_tokenizer,
    sd3_pipeline,
    sd_parts,
    sdxl_parts,
    stirred,
    wan_parts,
    wan_transformer,
)


class Qwen2VLProcessor(transformers.Qwen2VLProcessor):
    """The real one cannot be made or read without torchvision: a component to bring."""

    __module__ = transformers.Qwen2VLProcessor.__module__  # what an index says

    def check_argument_for_proper_class(self, name, argument):
        return type(argument)


def qwen_processor():
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    pictures = transformers.Qwen2VLImageProcessorPil(size=size)
    return Qwen2VLProcessor(pictures, qwen_tokenizer(), pictures)


@family
def qwen_edit():
    scheduler, vae, text, tokens, transformer = qwen_image_parts()
    return diffusers.QwenImageEditPipeline(scheduler, vae, text, tokens, qwen_processor(), transformer)


@family
def qwen_edit_plus():
    scheduler, vae, text, tokens, transformer = qwen_image_parts()
    return diffusers.QwenImageEditPlusPipeline(scheduler, vae, text, tokens, qwen_processor(), transformer)


def with_channels(kind, config, **channels):
    """A network of a configuration, with other channels."""
    return stirred(kind(**{name: value for name, value in config.items() if name[0] != "_"} | channels))


@family
def sd_inpaint():
    """A U-Net that is told a mask and what it leaves."""
    parts = sd_parts()
    unet = with_channels(diffusers.UNet2DConditionModel, parts["unet"].config, in_channels=9)
    return diffusers.StableDiffusionInpaintPipeline(**parts | {"unet": unet})


@family
def sdxl_inpaint():
    parts = sdxl_parts()
    unet = with_channels(diffusers.UNet2DConditionModel, parts["unet"].config, in_channels=9)
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **SD_BETAS)
    return diffusers.StableDiffusionXLInpaintPipeline(**parts | {"unet": unet}, scheduler=scheduler)


@family
def sdxl_refiner():
    """One text encoder, and a score of how pleasing in place of a size."""
    parts = sdxl_parts() | {"text_encoder": None, "tokenizer": None}
    unet = with_channels(
        diffusers.UNet2DConditionModel, parts["unet"].config, cross_attention_dim=16,
        projection_class_embeddings_input_dim=16 + 5 * 8,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **SD_BETAS)
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts | {"unet": unet}, scheduler=scheduler, requires_aesthetics_score=True
    )


@family
def sd3_wide():
    """16 channels, which the inpainting pipeline asks for; it forgets the VAE's shift, so that there is none."""
    found = sd3_pipeline()
    network = diffusers.SD3Transformer2DModel
    found.transformer = with_channels(network, found.transformer.config, in_channels=16, out_channels=16)
    found.vae = with_channels(diffusers.AutoencoderKL, found.vae.config, latent_channels=16, shift_factor=0.0)
    return diffusers.StableDiffusion3InpaintPipeline(
        **{name: part for name, part in found.components.items() if name not in ("image_encoder", "feature_extractor")}
    )


def flux_told(kind, channels):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    found = flux_pipeline(scheduler, guidance_embeds=True)
    network = diffusers.FluxTransformer2DModel
    found.transformer = with_channels(network, found.transformer.config, in_channels=channels, out_channels=16)
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    return kind(**{name: getattr(found, name) for name in names})


@family
def flux_fill():
    return flux_told(diffusers.FluxFillPipeline, 16 + 16 + 4 * 4)


@family
def flux_control():
    return flux_told(diffusers.FluxControlPipeline, 16 + 16)


@family
def kontext():
    return flux_told(diffusers.FluxKontextPipeline, 16)


@family
def sdxl_controlnet():
    config = SD_BLOCKS | {"cross_attention_dim": 48, "transformer_layers_per_block": (1, 2)}
    config |= {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    controlnet = diffusers.ControlNetModel(
        conditioning_embedding_out_channels=(8, 16), projection_class_embeddings_input_dim=16 + 6 * 8, **config
    )
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **SD_BETAS)
    return diffusers.StableDiffusionXLControlNetPipeline(
        **sdxl_parts(), scheduler=scheduler, controlnet=stirred(controlnet)
    )


def wan_flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@family
def wan_image():
    """Wan 2.1: CLIP sees the picture."""
    tokens, text, vae, _ = wan_parts()
    network = wan_transformer(in_channels=4 + 2 + 4, image_dim=16, added_kv_proj_dim=32)
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    eyes = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config, image_size=16, patch_size=8))
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return diffusers.WanImageToVideoPipeline(
        tokens, text, vae, wan_flow(), image_processor=pictures, image_encoder=stirred(eyes), transformer=network
    )


@family
def wan_two():
    """Wan 2.2 A14B: two experts, and nobody sees."""
    tokens, text, vae, _ = wan_parts()
    experts = [wan_transformer(in_channels=4 + 2 + 4) for _ in range(2)]
    return diffusers.WanImageToVideoPipeline(
        tokens, text, vae, wan_flow(), transformer=experts[0], transformer_2=experts[1], boundary_ratio=0.9
    )


@family
def wan_by_token():
    """Wan 2.2 TI2V: a time for each token."""
    tokens, text, vae, network = wan_parts()
    return diffusers.WanImageToVideoPipeline(tokens, text, vae, wan_flow(), transformer=network, expand_timesteps=True)


@family
def ltx_image():
    return diffusers.LTXImageToVideoPipeline(*ltx_parts())
