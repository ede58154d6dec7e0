"""The painter: a small Stable Diffusion pipeline that paints scenes before backdrops, in pixels.

    kernel = painter(num_steps=50, guidance_scale=7.5)          a `DiffusersKernel` like that of any checkpoint

A U-Net of diffusers with self- and cross-attention on 8 x 8 places, a text encoder of one layer on a vocabulary of
words, ∅ = "" (a tenth of the prompts in training), v-prediction on Stable Diffusion's noise levels. Its autoencoder is
the identity, so that states are pictures in [-1, 1] and reconstructions are exact. A learnt map says where pixels are,
beside the first convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.interventions.scenes import COLOURS, LIGHTS, SHAPES, SIZE
from experiments.pie_mini.pictures import NOTHING
from treesearch.backends.pipelines.kernel import DiffusersKernel

WEIGHTS = Path(__file__).parent / "weights" / "painter.safetensors"
WORDS = (*COLOURS, *SHAPES, "column", "height", "light", *LIGHTS, *"0123", ",", NOTHING)
TOKENS, WIDTH = 16, 32
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Pixels(ModelMixin, ConfigMixin):
    """An autoencoder that leaves pictures as they are."""

    @register_to_config
    def __init__(self, latent_channels: int = 3, block_out_channels: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.register_buffer("unit", torch.ones((), device="cpu"))  # what says where it is, and in which precision

    def encode(self, pictures: Tensor) -> Any:
        """The pictures, as latents."""
        return SimpleNamespace(latents=pictures)

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """The latents, as pictures."""
        return (latents,)


class Placed(nn.Module):
    """A convolution with a learnt map beside it: what is where."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.places = conv, nn.Parameter(torch.zeros(conv.out_channels, SIZE, SIZE, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.places


def tokenizer() -> Any:
    """One token a word, by merges that lead to the words and to nothing else."""
    ends = ("<|startoftext|>", "<|endoftext|>")
    merges: list[Any] = []
    for word in WORDS:
        letters = _merged([*word[:-1], word[-1] + "</w>"], merges)
        while len(letters) > 1:
            merges.append((letters[0], letters[1]))
            letters = _merged(letters, merges[-1:])
    symbols = sorted({letter for word in WORDS for letter in (*word[:-1], word[-1] + "</w>", word[-1])})
    vocab = dict.fromkeys([*symbols, *(a + b for a, b in merges), *ends])
    return transformers.CLIPTokenizer(
        {token: i for i, token in enumerate(vocab)}, merges, pad_token=ends[1], model_max_length=TOKENS
    )


def _merged(letters: list[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    for pair in merges:
        i = 0
        while i < len(letters) - 1:
            if (letters[i], letters[i + 1]) == pair:
                letters = [*letters[:i], pair[0] + pair[1], *letters[i + 2 :]]
            i += 1
    return letters


def text_encoder(words: Any) -> Any:
    """CLIP's text encoder with one layer."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return transformers.CLIPTextModel(config)


def unet() -> Any:
    """Attention among 8 x 8 places, and from them to the words, thrice."""
    network: Any = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(24, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    network.conv_in = Placed(network.conv_in)
    return network


def pipeline() -> Any:
    """The pipeline, untrained."""
    words = tokenizer()
    scheduler: Any = DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS
    )
    made: dict[str, Any] = {"vae": Pixels(), "text_encoder": text_encoder(words), "tokenizer": words, "unet": unet()}
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(scheduler=scheduler, **made, **absent)


def parts(pipe: Any) -> nn.ModuleDict:
    """What is trained."""
    return nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})


def painter(num_steps: int = 50, weights: Path = WEIGHTS, **settings: Any) -> DiffusersKernel:
    """The trained painter.

    Args:
        num_steps: T.
        weights: of `experiments/pie_mini/train.py`.
        settings: of `DiffusersKernel`, such as guidance_scale and eta.
    """
    pipe = pipeline()
    parts(pipe).load_state_dict({name: w.float() for name, w in load_file(weights).items()})
    chosen: dict[str, Any] = {"device": "cpu"} | settings
    return DiffusersKernel(pipe, num_steps=num_steps, **chosen)
