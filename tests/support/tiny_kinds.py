"""Tiny checkpoints of pipelines that run by their modular blocks, beside those of `tiny`."""

import diffusers
import transformers

from tests.support.tiny import (
    family,
    flux2_parts,
    mistral3,
    mistral_tokenizer,
    qwen_text,
    qwen_tokenizer,
    qwen_vae,
    stirred,
)


def qwen3_vl(kind="Model", layers=36):
    """Its text half is what Krea 2 reads: 12 of 36 layers."""
    text = qwen_text(layers, width=16) | {"head_dim": 8}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    marks = {"image_token_id": 261, "vision_start_token_id": 259, "vision_end_token_id": 260}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **marks)
    return stirred(getattr(transformers, f"Qwen3VL{kind}")(config))


def krea(is_distilled):
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=12,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.Krea2Pipeline(
        scheduler,
        qwen_vae(),
        qwen3_vl(),
        qwen_tokenizer(),
        stirred(transformer),
        is_distilled=is_distilled,
    )


@family
def krea2():
    return krea(is_distilled=False)


@family
def krea2_turbo():
    return krea(is_distilled=True)


@family
def ernie_image():
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    parts = flux2_parts(16, guidance_embeds=False)
    return diffusers.ErnieImagePipeline(
        stirred(transformer),
        parts["vae"],
        mistral3(3).model,
        mistral_tokenizer(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@family
def hunyuan_video_15():
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4 + 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
        task_type="t2v",
    )
    text = transformers.Qwen2_5_VLTextConfig(
        **qwen_text(3, width=16),
        rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    )
    glyphs = transformers.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return diffusers.HunyuanVideo15Pipeline(
        stirred(transformers.Qwen2_5_VLTextModel(text)),
        qwen_tokenizer(),
        stirred(transformer),
        stirred(vae),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        stirred(transformers.T5EncoderModel(glyphs)),
        transformers.ByT5Tokenizer(),
        diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
