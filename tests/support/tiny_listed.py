"""Tiny checkpoints of the pipelines of 2025 and 2026, and of sound, by their own call; see `tests.support.tiny`."""

import inspect

import diffusers
import transformers
from diffusers.pipelines.stable_audio_3.pipeline_stable_audio_3 import (
    AutoencoderSAME,
    StableAudio3DiTModel,
    StableAudio3DurationEmbedder,
)

from tests.support import tiny
from tests.support.tiny import (
    autoencoder,
    clip_text,
    clip_tokenizer,
    family,
    qwen_text,
    qwen_tokenizer,
    stirred,
    t5_text,
    t5_tokenizer,
    wan_parts,
)
from tests.support.tiny_called import FLOW_VAE, begun_tokenizer, controlled, flow, gemma
from tests.support.tiny_kinds import qwen3_vl

Z_IMAGE = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


@family
def z_image_controlnet():
    return z_controlled(diffusers.ZImageControlNetPipeline)


@family
def z_image_controlnet_inpaint():
    return z_controlled(diffusers.ZImageControlNetInpaintPipeline)


def z_controlled(kind):
    base = tiny.UNSAVED["z_image"]()
    width = 2 * 4 + 1 if "Inpaint" in kind.__name__ else 4
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=width, **Z_IMAGE
    )
    return kind(**base.components | {"controlnet": stirred(net, 0.5)})


@family
def qwen_controlnet_inpaint():
    layers = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "extra_condition_channels": 4}
    return controlled(
        "qwen_image", diffusers.QwenImageControlNetInpaintPipeline, diffusers.QwenImageControlNetModel, **layers
    )


@family
def sana_controlnet():
    base = tiny.UNSAVED["sana"]()
    net = stirred(diffusers.SanaControlNetModel(**own_settings(diffusers.SanaControlNetModel, base.transformer)), 0.5)
    return diffusers.SanaControlNetPipeline(**base.components, controlnet=net)


def own_settings(kind, network):
    """What a class takes of the configuration of another."""
    taken = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in network.config.items() if name in taken}


@family
def z_image_omni():
    base = tiny.UNSAVED["z_image"]()
    config = {"in_channels": 4, "n_layers": 1, "cap_feat_dim": 16, "siglip_feat_dim": 16, **Z_IMAGE}
    transformer = diffusers.ZImageTransformer2DModel(axes_dims=[4, 6, 6], axes_lens=[512, 32, 32], **config)
    vision = transformers.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=256
    )
    siglip = stirred(transformers.Siglip2VisionModel(vision))
    parts = base.components | {"transformer": stirred(transformer)}
    return diffusers.ZImageOmniPipeline(
        **parts, siglip=siglip, siglip_processor=transformers.Siglip2ImageProcessorPil()
    )


@family
def hidream():
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(32, 32),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    config = transformers.LlamaConfig(**qwen_text(2, width=16), head_dim=8)
    text = stirred(transformers.LlamaForCausalLM(config))
    return diffusers.HiDreamImagePipeline(
        flow(),
        autoencoder(**FLOW_VAE),
        clip_text(projected=True),
        clip_tokenizer(),
        clip_text(projected=True),
        clip_tokenizer(),
        t5_text(),
        t5_tokenizer(128),
        text,
        begun_tokenizer(),
        stirred(transformer),
    )


@family
def wan_vace():
    tokenizer, text_encoder, vae = wan_parts()[:3]
    transformer = diffusers.WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        vace_layers=[0],
        vace_in_channels=2 * 4 + 4 * 4,
        rope_max_seq_len=32,
    )
    return diffusers.WanVACEPipeline(tokenizer, text_encoder, vae, flow(shift=3.0), stirred(transformer))


@family
def kandinsky3():
    unet = diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=8,
        encoder_hid_dim=32,
    )
    movq = diffusers.VQModel(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    return diffusers.Kandinsky3Pipeline(t5_tokenizer(128), t5_text(), stirred(unet), scheduler, stirred(movq))


@family
def longcat_audio():
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=32, latent_dim=4
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=8, c_mults=[1, 1], strides=[2], latent_dim=4, encoder_latent_dim=8, downsampling_ratio=2,
        sample_rate=64,
    )  # fmt: skip
    return diffusers.LongCatAudioDiTPipeline(
        stirred(vae), t5_text("UMT5"), t5_tokenizer(64), stirred(transformer), flow()
    )


@family
def stable_audio():
    """By a solver of order one whose levels are spaced as those of the published one, which needs torchsde."""
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 1],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=64,
    )
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=32, conditioning_dim=8, min_value=0, max_value=32
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        solver_order=1, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential", sigma_min=0.3,
        sigma_max=500,
    )  # fmt: skip
    return diffusers.StableAudioPipeline(
        stirred(vae), t5_text(), stirred(projection), t5_tokenizer(32), stirred(transformer), scheduler
    )


@family
def stable_audio_3():
    sizes = {"vocab_size": 262, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 256}
    text = transformers.T5GemmaModuleConfig(**sizes)
    config = transformers.T5GemmaConfig(encoder=text, decoder=text, is_encoder_decoder=False, vocab_size=262)
    transformer = StableAudio3DiTModel(
        io_channels=4, embed_dim=32, depth=1, num_heads=2, cond_token_dim=16, global_cond_dim=16, local_add_cond_dim=5,
        timestep_features_dim=8, num_memory_tokens=2,
    )  # fmt: skip
    vae = AutoencoderSAME(
        audio_channels=2, patch_size=4, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(2,),
        encoder_transformer_depths=(1,), latent_dim=4, dim_heads=8, sampling_rate=64,
    )  # fmt: skip
    embedder = StableAudio3DurationEmbedder(output_dim=16, fourier_dim=8)
    return diffusers.StableAudio3Pipeline(
        stirred(vae), stirred(transformers.T5GemmaEncoderModel(config)), begun_tokenizer(), stirred(embedder),
        stirred(transformer), flow(),
    )  # fmt: skip


@family
def ideogram4():
    """Two networks of one configuration, one of them for no prompt."""
    config = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config |= {"in_channels": 16, "adaln_dim": 16, "llm_features_dim": 13 * 16, "mrope_section": (2, 1, 1)}
    networks = [stirred(diffusers.Ideogram4Transformer2DModel(**config)) for _ in range(2)]
    vae = tiny.flux2_parts(16, guidance_embeds=False)["vae"]
    return diffusers.Ideogram4Pipeline(flow(shift=1.0), vae, qwen3_vl(), qwen_tokenizer(), *networks)


TURNS = "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content[0].text }}<|im_end|>\n{% endfor %}"


class Qwen3VLProcessor(transformers.Qwen3VLProcessor):
    """The real one asks torchvision for videos: here it is text and pictures alone, and a component to bring."""

    __module__ = transformers.Qwen3VLProcessor.__module__  # what an index says

    def check_argument_for_proper_class(self, name, argument):
        return type(argument)


def qwen3_processor():
    pictures = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})
    found = Qwen3VLProcessor(pictures, qwen_tokenizer(), pictures)
    found.chat_template, found.video_token_id = TURNS, -1
    return found


@family
def qwen_image_21():
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True)
    text = qwen3_vl("ForConditionalGeneration", 2)
    return diffusers.QwenImage21Pipeline(scheduler, stirred(vae), text, qwen3_processor(), stirred(transformer))


@family
def nucleus():
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6), num_experts=2, moe_intermediate_dim=32, mlp_ratio=8.0,
        dense_moe_strategy="leave_first_block_dense", capacity_factors=2.0,
    )  # fmt: skip
    text = qwen3_vl("ForConditionalGeneration", 8)
    return diffusers.NucleusMoEImagePipeline(
        stirred(transformer), flow(use_dynamic_shifting=True), tiny.qwen_vae(), text, qwen3_processor()
    )


@family
def animate_diff():
    parts = {
        name: part for name, part in tiny.sd_parts().items() if name in ("vae", "text_encoder", "tokenizer", "unet")
    }
    config = parts["unet"].config
    adapter = diffusers.MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.layers_per_block,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **tiny.SD_BETAS)
    return diffusers.AnimateDiffPipeline(**parts, motion_adapter=stirred(adapter), scheduler=scheduler)


@family
def sana_video():
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        rope_max_seq_len=32,
    )
    return diffusers.SanaVideoPipeline(begun_tokenizer(), gemma(), wan_parts()[2], stirred(transformer), flow())
