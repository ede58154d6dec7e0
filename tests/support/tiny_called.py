"""Tiny checkpoints of pipelines that run by their own call, see `tests.support.tiny`."""

import diffusers
import tokenizers
import transformers

from tests.support import tiny
from tests.support.tiny import (
    NO_QUANT,
    SD_BETAS,
    autoencoder,
    byte_vocab,
    clip_text,
    clip_tokenizer,
    family,
    qwen3,
    qwen_text,
    qwen_tokenizer,
    stirred,
    t5_text,
    t5_tokenizer,
    wan_parts,
)

FLOW_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, **NO_QUANT}


def flow(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | config)


def dpm(**config):
    return diffusers.DPMSolverMultistepScheduler(**config)


def begun_tokenizer(side="right"):
    """One token a byte after one that begins every text, as of Gemma, Llama and GLM."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_vocab(words), merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(words)
    begin = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    model.post_processor = begin
    marks = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, padding_side=side, **marks)


def gemma(kind=2, width=16):
    """Gemma's layers under a tokenizer of bytes."""
    sizes = {"vocab_size": 262, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 256}
    if kind == 1:
        return stirred(transformers.GemmaModel(transformers.GemmaConfig(**sizes)))
    return stirred(transformers.Gemma2Model(transformers.Gemma2Config(**sizes)))


def autoencoder8(**config):
    """Latents of an eighth of a side, for pipelines that reckon with that."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        **config,
    )
    return stirred(vae)


def pixart(pipeline, sample_size, scheduler):
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=sample_size,
        use_additional_conditions=False,
    )
    return pipeline(t5_tokenizer(120), t5_text(), autoencoder(), stirred(transformer), scheduler)


@family
def pixart_alpha():
    return pixart(diffusers.PixArtAlphaPipeline, 64, dpm(solver_order=1, final_sigmas_type="zero", **SD_BETAS))


@family
def pixart_sigma():
    return pixart(diffusers.PixArtSigmaPipeline, 64, diffusers.DDIMScheduler(clip_sample=False))


@family
def sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )
    scheduler = dpm(solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.SanaPipeline(begun_tokenizer(), gemma(), stirred(vae), stirred(transformer), scheduler)


@family
def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    return diffusers.Lumina2Pipeline(stirred(transformer), flow(), autoencoder8(**FLOW_VAE), gemma(), begun_tokenizer())


@family
def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        flow(use_dynamic_shifting=True), autoencoder(**FLOW_VAE), t5_text(), t5_tokenizer(512), stirred(transformer)
    )


@family
def aura_flow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        t5_tokenizer(256), t5_text("UMT5"), autoencoder(scaling_factor=0.13025), stirred(transformer), flow(shift=1.73)
    )


@family
def lumina():
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        hidden_size=48,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    return diffusers.LuminaPipeline(
        stirred(transformer), flow(shift=1.0), autoencoder8(scaling_factor=0.13025), gemma(1), begun_tokenizer()
    )


def cogvideox_vae():
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=32,
        sample_width=32,
    )
    return stirred(vae)


@family
def cogvideox():
    return diffusers.CogVideoXPipeline(*cogvideox_parts())


def cogvideox_parts(in_channels=4):
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=64,
        use_rotary_positional_embeddings=True,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
        beta_schedule="scaled_linear",
    )
    return t5_tokenizer(64), t5_text(), cogvideox_vae(), stirred(transformer), scheduler


@family
def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return diffusers.HunyuanVideoPipeline(
        llama(3), begun_tokenizer(), stirred(transformer), stirred(vae), flow(shift=7.0), clip_text(), clip_tokenizer()
    )


def llama(layers):
    config = transformers.LlamaConfig(**qwen_text(layers, width=16), head_dim=8)
    return stirred(transformers.LlamaModel(config))


@family
def cogview3():
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return diffusers.CogView3PlusPipeline(t5_tokenizer(224), t5_text(), autoencoder(), stirred(transformer), scheduler)


@family
def cogview4():
    return diffusers.CogView4Pipeline(*cogview4_parts())


@family
def cogview4_control():
    return diffusers.CogView4ControlPipeline(*cogview4_parts(in_channels=8))


def cogview4_parts(in_channels=4):
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=in_channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    config = transformers.GlmConfig(**qwen_text(2, width=16), head_dim=8)
    text = stirred(transformers.GlmModel(config))
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    return begun_tokenizer(), text, autoencoder(), stirred(transformer), scheduler


@family
def hunyuan_dit():
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        hidden_size=32,
        num_layers=2,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=False,
    )
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    tokens = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes))
    return diffusers.HunyuanDiTPipeline(
        vae=autoencoder8(),
        text_encoder=stirred(bert),
        tokenizer=tokens,
        transformer=stirred(transformer),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **SD_BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(256),
    )


@family
def latte():
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=32,
        video_length=2,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.LattePipeline(t5_tokenizer(120), t5_text(), autoencoder(), stirred(transformer), scheduler)


ROPE = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}


@family
def bria():
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, **ROPE
    )
    return diffusers.BriaPipeline(
        stirred(transformer), flow(use_dynamic_shifting=True), autoencoder(**FLOW_VAE), t5_text(), t5_tokenizer(128)
    )


@family
def ovis():
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16, **ROPE
    )
    text = qwen3(causal=False, layers=2)
    vae = autoencoder(**FLOW_VAE)
    return diffusers.OvisImagePipeline(flow(), vae, text, qwen_tokenizer(), stirred(transformer))


@family
def prx():
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=32, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]
    )
    return diffusers.PRXPipeline(stirred(transformer), flow(), t5_text(), t5_tokenizer(256), autoencoder(**FLOW_VAE))


@family
def skyreels():
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return diffusers.SkyReelsV2Pipeline(
        t5_tokenizer(512), t5_text("UMT5"), stirred(transformer), wan_parts()[2], flow()
    )


def controlled(name, pipeline, kind, **config):
    """A checkpoint of `tiny` with a ControlNet of its transformer's blocks, that changes what it says."""
    base = tiny.UNSAVED[name]()
    net = stirred(kind.from_transformer(base.transformer, **config), 0.5)
    return pipeline(**base.components | {"controlnet": net})


@family
def sd3_controlnet():
    base = tiny.UNSAVED["sd3"]()
    names = ("sample_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    names += ("caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size")
    config = {name: base.transformer.config[name] for name in names}
    net = stirred(diffusers.SD3ControlNetModel(num_layers=1, **config), 0.5)
    return diffusers.StableDiffusion3ControlNetPipeline(**base.components | {"controlnet": net})


@family
def flux_controlnet():
    layers = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return controlled("flux", diffusers.FluxControlNetPipeline, diffusers.FluxControlNetModel, **layers)


@family
def qwen_controlnet():
    kind = diffusers.QwenImageControlNetModel
    return controlled(
        "qwen_image",
        diffusers.QwenImageControlNetPipeline,
        kind,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
    )


@family
def cogvideox_i2v():
    parts = cogvideox_parts(in_channels=8)
    return diffusers.CogVideoXImageToVideoPipeline(*parts)


@family
def sd3_inpainting():
    """Its ControlNet is told a picture and a mask."""
    base = tiny.UNSAVED["sd3"]()
    names = ("sample_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    names += ("caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size")
    config = {name: base.transformer.config[name] for name in names}
    net = diffusers.SD3ControlNetModel(num_layers=1, extra_conditioning_channels=1, **config)
    return diffusers.StableDiffusion3ControlNetInpaintingPipeline(**base.components | {"controlnet": stirred(net, 0.5)})


@family
def sdxl_union():
    base = tiny.UNSAVED["sdxl"]()
    config = {"cross_attention_dim": 48, "transformer_layers_per_block": (1, 2), "use_linear_projection": True}
    config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    config |= {"projection_class_embeddings_input_dim": 16 + 6 * 8, "conditioning_embedding_out_channels": (8, 16)}
    config |= {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    net = stirred(diffusers.ControlNetUnionModel(**tiny.SD_BLOCKS | config))
    return diffusers.StableDiffusionXLControlNetUnionPipeline(**base.components | {"controlnet": net})
