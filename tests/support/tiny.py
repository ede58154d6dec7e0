"""Tiny pipelines with random weights, saved as real checkpoints: what `from_pretrained` loads in the tests.

A builder `NAME(folder)` writes one family in diffusers' layout (model_index.json, safetensors, tokenizers) and returns
the folder; `BUILDERS` has them all, and `checkpoint` builds each at most once per root, whichever process asks first.
The networks have two blocks of some 32 channels on 8×8 latents; autoencoders shrink a side by 2 (images) or 4 (video),
so that a hard-coded 8 fails. Weights are fan-in scaled normals, those that start at zero too: outputs are of order 1
and depend on x, t and the condition. Nothing is trained: with a noise-predicting network latents reach some tens.
"""

from contextlib import contextmanager
from functools import wraps

import diffusers
import tokenizers
import torch
import transformers
from diffusers.pipelines import stable_diffusion
from filelock import FileLock

BUILDERS, UNSAVED = {}, {}


def checkpoint(name, root):
    """The folder of family `name` under `root`, built there unless it has been."""
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (folder / "done").exists():
            BUILDERS[name](folder)
            (folder / "done").touch()
    return folder


def family(build):
    """Turn a function that makes a pipeline into a builder: seeded, writing to a folder, listed in `BUILDERS`."""
    BUILDERS[build.__name__], UNSAVED[build.__name__] = saved(build), build
    return BUILDERS[build.__name__]


def saved(build):
    @wraps(build)
    def write(folder):
        with seeded():
            build().save_pretrained(folder)
        return folder

    return write


@contextmanager
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@torch.no_grad()
def stirred(model, gain=1.0):
    """`model` with every matrix and kernel drawn from a normal of variance gain² / fan-in."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0.0, gain * weight[0].numel() ** -0.5)
    return model


# Text


def clip_tokenizer(pad_token="<|endoftext|>"):
    """One token a byte: 256 inside words, 256 at their ends, and the two marks."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab, [], pad_token=pad_token, model_max_length=77)


def clip_text(width=32, projected=False, **config):
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        **config,
    )
    encoder = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return stirred(encoder(config))


def t5_tokenizer(length):
    """One token a printable ASCII character."""
    letters = [(chr(code), -5.0) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return transformers.T5Tokenizer(vocab, extra_ids=0, model_max_length=length)


def t5_text(kind="T5", width=32):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=98, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return stirred(getattr(transformers, f"{kind}EncoderModel")(config))


QWEN_WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_vocab(words):
    """One token a byte, and the marks of a chat."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return {token: index for index, token in enumerate([*letters, *words])}


def qwen_tokenizer():
    words = list(QWEN_WORDS)
    found = transformers.Qwen2Tokenizer(vocab=byte_vocab(words), merges=[], additional_special_tokens=words)
    found.chat_template = CHAT
    return found


PIXTRAL_WORDS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
TURNS = (
    "{% for message in messages %}[INST]{% for part in message.content %}{{ part.text }}{% endfor %}[/INST]{% endfor %}"
)


def mistral_tokenizer():
    """What a Pixtral processor, which needs torchvision, asks of its tokenizer when there is no picture."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_vocab(PIXTRAL_WORDS), merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(list(PIXTRAL_WORDS))
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=TURNS, **marks)


def mistral3(layers):
    text = qwen_text(layers, width=16) | {
        "vocab_size": 256 + len(PIXTRAL_WORDS),
        "head_dim": 8,
        "model_type": "mistral",
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "pixtral", "image_size": 32, "head_dim": 8}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=262)
    return stirred(transformers.Mistral3ForConditionalGeneration(config))


def qwen_text(layers=2, width=32):
    """What the text encoders of Qwen2.5-VL and Qwen3 have in common."""
    return {
        "vocab_size": 256 + len(QWEN_WORDS),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(2, width // 16),
        "num_key_value_heads": max(1, width // 32),
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
    }


def qwen_vl(width=32):
    text = qwen_text(width=width) | {
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width}
    marks = {"image_token_id": 261, "vision_start_token_id": 259, "vision_end_token_id": 260}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    return stirred(transformers.Qwen2_5_VLForConditionalGeneration(config))


# Autoencoders


def autoencoder(**config):
    """Images of 16×16 pixels, latents of 4×8×8."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )
    return stirred(vae)


@saved
def tiny_decoder():
    """An AutoencoderTiny of the latents of `autoencoder`."""
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    stirred(vae, 0.7)
    vae.decoder.layers[-1].bias.data.fill_(0.5)  # mid-grey: it decodes to 0..1 and rescales that to -1..1
    return vae


# Pixel space


def pixel_unet(channels):
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return stirred(unet, 1.5)


@family
def unconditional():
    return diffusers.DDPMPipeline(pixel_unet(1), diffusers.DDPMScheduler())


@family
def ddim():
    return diffusers.DDIMPipeline(pixel_unet(3), diffusers.DDIMScheduler(clip_sample=True))


# Stable Diffusion

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_STEPS = {**SD_BETAS, "steps_offset": 1, "set_alpha_to_one": False}
SD_BLOCKS = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def text_unet(**config):
    up_blocks = ("CrossAttnUpBlock2D", "UpBlock2D")
    return stirred(diffusers.UNet2DConditionModel(sample_size=8, up_block_types=up_blocks, **SD_BLOCKS | config), 1.5)


def sd_parts():
    return {
        "vae": autoencoder(),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "unet": text_unet(),
        "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, **SD_STEPS),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@family
def sd():
    return diffusers.StableDiffusionPipeline(**sd_parts())


@family
def sd_v():
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        **SD_STEPS,
    )
    return diffusers.StableDiffusionPipeline(**sd_parts() | {"scheduler": scheduler})


@family
def sd_safe():
    """With a safety checker that passes every image; `concept_embeds_weights.data.fill_(-2)`: one that flags all."""
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=config,
        vision_config={**config, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    checker = stable_diffusion.StableDiffusionSafetyChecker(config)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    parts = sd_parts() | {"safety_checker": checker, "feature_extractor": images, "requires_safety_checker": True}
    return diffusers.StableDiffusionPipeline(**parts)


@family
def sd_controlnet():
    controlnet = diffusers.ControlNetModel(conditioning_embedding_out_channels=(8, 16), **SD_BLOCKS)
    return diffusers.StableDiffusionControlNetPipeline(**sd_parts(), controlnet=stirred(controlnet, 2.0))


@family
def lcm():
    scheduler = diffusers.LCMScheduler(**SD_STEPS | {"set_alpha_to_one": True})
    parts = sd_parts() | {"scheduler": scheduler, "unet": text_unet(time_cond_proj_dim=32)}
    return diffusers.LatentConsistencyModelPipeline(**parts)


def lora(folder):
    """Low-rank weights for the attention layers of `sd`, in the file that its `load_lora_weights` reads."""
    import peft

    with seeded():
        unet = text_unet()
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False))
    weights = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights)
    return folder


# Stable Diffusion XL


def sdxl_parts():
    return {
        "vae": autoencoder(scaling_factor=0.13025),
        "text_encoder": clip_text(32),
        "text_encoder_2": clip_text(16, projected=True, hidden_act="gelu"),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad_token="!"),
        "unet": text_unet(
            cross_attention_dim=48,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
    }


@family
def sdxl():
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **SD_BETAS)
    return diffusers.StableDiffusionXLPipeline(**sdxl_parts(), scheduler=scheduler)


@family
def turbo():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(steps_offset=1, timestep_spacing="trailing", **SD_BETAS)
    return diffusers.StableDiffusionXLPipeline(**sdxl_parts(), scheduler=scheduler)


@family
def lightning():
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="trailing", **SD_BETAS)
    return diffusers.StableDiffusionXLPipeline(**sdxl_parts(), scheduler=scheduler)


# Image transformers

NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


@family
def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=8,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    names = {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus", "207": "golden retriever"}
    pipeline = diffusers.DiTPipeline(stirred(transformer), autoencoder(), scheduler, names)
    pipeline.register_to_config(id2label=names)
    return pipeline


@family
def sd3():
    """Without T5: `from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)`, no saved folder can say so."""
    return sd3_pipeline()


def sd3_pipeline():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=32 + 16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=stirred(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, **NO_QUANT),
        text_encoder=clip_text(32, projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(16, projected=True, hidden_act="gelu"),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        text_encoder_3=t5_text(width=64),
        tokenizer_3=t5_tokenizer(512),
    )


def flux_pipeline(scheduler, guidance_embeds):
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    return diffusers.FluxPipeline(
        scheduler=scheduler,
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(512),
        transformer=stirred(transformer),
    )


@family
def flux():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return flux_pipeline(scheduler, guidance_embeds=True)


@family
def schnell():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    return flux_pipeline(scheduler, guidance_embeds=False)


def qwen_vae():
    """Images of 16×16 pixels, latents of 4×1×8×8."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.8, -0.7, 0.1, 0.4],
        latents_std=[2.8, 1.5, 2.3, 1.2],
    )
    return stirred(vae)


def qwen_image_parts():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    return scheduler, qwen_vae(), qwen_vl(), qwen_tokenizer(), stirred(transformer)


@family
def qwen_image():
    return diffusers.QwenImagePipeline(*qwen_image_parts())


def qwen3(causal, layers):
    kind = transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model
    return stirred(kind(transformers.Qwen3Config(**qwen_text(layers, width=16), head_dim=8)))


@family
def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 16, 16],
    )
    vae = autoencoder(scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    text = qwen3(causal=False, layers=3)
    return diffusers.ZImagePipeline(scheduler, vae, text, qwen_tokenizer(), stirred(transformer))


def flux2_parts(text_width, guidance_embeds):
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": stirred(vae),
        "transformer": stirred(transformer),
    }


@family
def flux2():
    """31 layers of text, of which the network reads three."""
    parts = flux2_parts(3 * 16, guidance_embeds=True)
    return diffusers.Flux2Pipeline(**parts, text_encoder=mistral3(31), tokenizer=mistral_tokenizer())


def klein(is_distilled):
    """28 layers of text: three of them, the last one too, are what the network reads."""
    parts = flux2_parts(3 * 16, guidance_embeds=False)
    text = qwen3(causal=True, layers=28)
    tokens = qwen_tokenizer()
    return diffusers.Flux2KleinPipeline(**parts, text_encoder=text, tokenizer=tokens, is_distilled=is_distilled)


@family
def flux2_klein():
    return klein(is_distilled=True)


@family
def flux2_klein_base():
    return klein(is_distilled=False)


# Video: 5 frames of 32×32 pixels are latents of 3×8×8


def wan_parts(**config):
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.8, -0.7, 0.1, 0.4],
        latents_std=[2.8, 1.5, 2.3, 1.2],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    return t5_tokenizer(512), t5_text("UMT5"), stirred(vae), wan_transformer(**config)


def wan_transformer(**config):
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        **{"in_channels": 4, "out_channels": 4} | config,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return stirred(transformer)


def wan_pipeline(scheduler):
    *parts, transformer = wan_parts()
    return diffusers.WanPipeline(*parts, scheduler, transformer)


@family
def wan():
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return wan_pipeline(scheduler)


@family
def wan_euler():
    return wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


@family
def ltx():
    return diffusers.LTXPipeline(*ltx_parts())


def ltx_parts():
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    )
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        shift_terminal=0.1,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
    )
    return scheduler, stirred(vae), t5_text(), t5_tokenizer(128), stirred(transformer)


@family
def mochi():
    """Its pipeline hard-codes factors of 8 and 6: 7 frames of 32×32 pixels are latents of 12×2×4×4."""
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=32,
        text_embed_dim=32,
        time_embed_dim=32,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(scheduler, stirred(vae, 0.8), t5_text(), t5_tokenizer(256), stirred(transformer))
