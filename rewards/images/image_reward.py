"""ImageReward: how much people would like an image for a prompt, learnt from their rankings.

    h    = BERT(c; cross-attention on ViT(x))           ViT-L/16 at 224 px, 12 layers of text, 35 tokens
    r(x) = (MLP(h_[CLS]) - 0.1672) / 1.0333             five linear layers, no activations between them

The network is BLIP (Li et al., 2022) as its authors trained it, held in the classes of transformers: `renamed` maps the
names of the published weights to theirs. As published, the text keeps its [CLS] token ([ENC] takes its place in BLIP's
own matching head, not here), every image token is attended to, and the layer norms have eps 1e-6 (image) and 1e-12
(text); heads have 64 channels.

The published weights are a pickle, which torch's weights-only reader reads without running code; any other pickle needs
`allow_pickle=True`. To have none, turn it once into a file that holds nothing but tensors:

    python -m treesearch.rewards.images.image_reward convert ImageReward.pt ImageReward.safetensors

Source: ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (Xu et al., 2023), sec. 3.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.images import vision
from treesearch.rewards.images.clip import SQUARE
from treesearch.rewards.numeric import is_whole

PUBLISHED = "zai-org/ImageReward/ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD = 64

_RENAMES = (
    (r"^visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm(1|2)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
_UNUSED = re.compile(r"^(blip\.)?(vision_proj|text_proj)\.|position_ids$")


@facts(
    range="about -2..2, mean 0 and std 1 on its training images",
    differentiable=True,
    prompts=True,
    checkpoint=PUBLISHED,
    licence="Apache-2.0",
    memory="1.8 GB",
    limits=f"prompts are cut after {MAX_TOKENS} tokens ({MAX_TOKENS - 2} and two marks), about 25 words; {SQUARE}",
    source="ImageReward (Xu et al., 2023)",
)
def ImageReward(
    checkpoint: str = PUBLISHED,
    *,
    tokenizer: str = TOKENIZER,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 32,
    allow_pickle: bool | None = None,
) -> Reward:
    """r(images, prompts) of Xu et al. (2023); differentiable to the images. Prompts are cut after 35 tokens.

    Args:
        checkpoint: a file of weights, .safetensors or .pt, here or on the hub ("owner/name/file"); or a folder or hub
            id that holds them in model.safetensors.
        tokenizer: hub id or folder of the BERT tokenizer.
        device: to score on; None where the images are.
        dtype: of the two encoders, float32 by default; the last layers are float32.
        batch_size: images in one forward pass.
        allow_pickle: read a .pt file, as tensors only; None reads the published one and no other.

    Raises:
        CheckpointError: a pickle that was not allowed, or a file that does not exist.
        ValueError: batch_size below 1, or not a floating dtype.
    """
    if not is_whole(batch_size):
        raise ValueError(f"batch_size is {batch_size!r}, expected at least 1")
    allowed = checkpoint == PUBLISHED if allow_pickle is None else allow_pickle
    loading.check_file(checkpoint, allow_pickle=allowed)
    scorer = _Scorer(checkpoint, tokenizer, device, loading.as_dtype(dtype), batch_size, allowed)
    return Reward(scorer, "ImageReward", remarks=scorer.unread)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under the names of `_Network`: fused q, k, v and BERT layers are alike, only names differ.

    Contrastive projections and position indices are left out, a score needs neither.

    Raises:
        CheckpointError: a name that is not part of the published layout.
    """
    found = {}
    for name, value in state.items():
        if _UNUSED.search(name):
            continue
        old = name.removeprefix("blip.")
        new = next((re.sub(pattern, to, old) for pattern, to in _RENAMES if re.match(pattern, old)), None)
        if new is None:
            raise loading.CheckpointError(f"{name!r} is no weight of ImageReward: give the published file")
        found[new] = value
    return found


def convert(source: str, target: str) -> None:
    """Write the weights of a published .pt file, read as tensors only, to a .safetensors file.

    Raises:
        CheckpointError: not weights of ImageReward.
    """
    from safetensors.torch import save_file

    state = loading.weights(source, allow_pickle=True)
    build(renamed(state))
    save_file({name: value.contiguous() for name, value in state.items() if not _UNUSED.search(name)}, target)


def build(state: dict[str, Tensor]) -> nn.Module:
    """The network of the sizes that the renamed weights have, with them in it.

    Raises:
        CheckpointError: weights are missing or of the wrong shape.
    """
    try:
        with torch.device("meta"):
            network = _Network(*_configs(state))
        network.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError) as error:
        what = str(error).strip().splitlines()
        raise loading.CheckpointError(f"not the weights of ImageReward: {' '.join(what[:3])}") from error
    embeddings: Any = network.text.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1], device="cpu")[
        None
    ]  # computed, not in the file
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Scorer:
    """Names of what to load, so that it can be sent to workers."""

    checkpoint: str
    tokenizer: str
    device: str | torch.device | None
    dtype: torch.dtype
    batch_size: int
    allow_pickle: bool

    def __call__(self, samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        texts = vision.need_prompts(prompts, "ImageReward")
        return loading.micro_batches(self._score, samples, texts, self.batch_size)

    def unread(self, prompts: Sequence[Any]) -> list[list[str]]:
        """What to say of prompts that are cut."""
        return vision.unread(loading.load_part("BertTokenizer", self.tokenizer), prompts, MAX_TOKENS, "ImageReward")

    def _score(self, samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        device = vision.place(samples, self.device)
        network, tokenizer = _load(self.checkpoint, self.tokenizer, device, self.dtype, self.allow_pickle)
        samples = samples.to(device) if isinstance(samples, Tensor) else samples
        images = vision.preprocess(samples, network.image_size).to(device, self.dtype)
        padding: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
        text = tokenizer(list(prompts or ()), **padding, return_tensors="pt")
        return network(images, text.input_ids.to(device), text.attention_mask.to(device))


class _Network(nn.Module):
    """Image encoder, text encoder with cross-attention, head."""

    def __init__(self, image: Any, text: Any) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.image_size = int(image.image_size)
        self.vision = BlipVisionModel(image)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.Sequential(
            *(nn.Linear(text.hidden_size, 1024), nn.Dropout(0.2)),
            *(nn.Linear(1024, 128), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.Dropout(0.1)),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Rewards (n,) of images (n, 3, s, s) and texts (n, L), mask 1 where a token counts."""
        image = self.vision(pixel_values=images).last_hidden_state
        text = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        return (self.head(text[:, 0].float())[:, 0] - MEAN) / STD


def _configs(state: dict[str, Tensor]) -> tuple[Any, Any]:
    """Configurations of the two encoders, read off the shapes of their weights."""
    try:
        from transformers import BlipTextConfig, BlipVisionConfig
    except ImportError as error:
        raise ImportError(f"ImageReward needs transformers: {loading.INSTALL}") from error
    width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
    side = math.isqrt(state["vision.embeddings.position_embedding"].shape[1] - 1)
    words, text = state["text.embeddings.word_embeddings.weight"].shape
    image = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(state, "vision.encoder.layers"),
        num_attention_heads=width // HEAD,
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return image, BlipTextConfig(
        vocab_size=words,
        hidden_size=text,
        encoder_hidden_size=width,
        intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(state, "text.encoder.layer"),
        num_attention_heads=text // HEAD,
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        is_decoder=True,  # transformers builds cross-attention for decoders only; the mask stays bidirectional
    )


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) + 1 :].split(".")[0]) for name in state if name.startswith(f"{prefix}."))


@loading.once
def _load(checkpoint: str, tokenizer: str, device: str, dtype: torch.dtype, allow_pickle: bool) -> tuple[Any, Any]:
    """The network on its device, and the tokenizer with BLIP's two further tokens.

    Raises:
        CheckpointError: absent, not allowed, not the published layout, or a tokenizer of another vocabulary.
    """
    network: Any = build(renamed(loading.weights(checkpoint, allow_pickle=allow_pickle)))
    network = network.to(device=device, dtype=dtype)
    network.head.float()
    words = loading.load_part("BertTokenizer", tokenizer)
    words.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    expected = network.text.config.vocab_size
    if len(words) != expected:
        raise loading.CheckpointError(
            f"the tokenizer {tokenizer} has {len(words)} tokens, the checkpoint {expected}: use {TOKENIZER}"
        )
    return network, words


def main(arguments: Sequence[str]) -> None:
    """python -m treesearch.rewards.images.image_reward convert SOURCE TARGET"""
    if len(arguments) != 3 or arguments[0] != "convert":
        sys.exit(
            "usage: python -m treesearch.rewards.images.image_reward convert ImageReward.pt ImageReward.safetensors"
        )
    convert(arguments[1], arguments[2])


if __name__ == "__main__":
    main(sys.argv[1:])
