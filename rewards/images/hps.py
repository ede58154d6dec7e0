"""HPS v2.1: which image people prefer for a prompt, by a CLIP-H trained on their rankings.

    r(x, y) = 100 cos(x, y)

Published tables are on this scale; `score` of the hpsv2 package returns the cosine itself. Images are scaled by their
longer side and padded with black, not cut.

Source: Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis (Wu et
al., 2023). The weights are an open_clip state dict; we hold the network in transformers' CLIPModel.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.images import vision
from treesearch.rewards.images.clip import CUT, TOKENS, Clip, prompt_reward

CHECKPOINT = "xswu/HPSv2/HPS_v2.1_compressed.pt"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HEADS = 16  # of ViT-H-14, in the image tower and in the text tower; the state dict does not say
NAMES = (
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


@facts(
    range="20 to 35, mostly 25 to 32",
    differentiable=True,
    prompts=True,
    checkpoint=CHECKPOINT,
    licence="Apache-2.0",
    memory="3.9 GB",
    limits=f"{CUT}; images (n, 1 or 3, h, w) in [0, 1], read whole at 224 × 224 with black around",
    source="Wu et al. 2023, Human Preference Score v2",
)
def HPSv2(
    checkpoint: str = CHECKPOINT,
    *,
    scale: float = 100.0,
    processor: str = PROCESSOR,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 16,
    allow_pickle: bool | None = None,
) -> Reward:
    """r = scale × cos of images (n, 1 or 3, h, w) in [0, 1] with their prompts.

    Args:
        checkpoint: an open_clip state dict of ViT-H-14: a file, a hub id or folder with model.safetensors, or a file
            on the hub.
        scale: 100 as in published tables, 1 as in the hpsv2 package.
        processor: hub id or folder of the tokenizer.
        device: to score on; None is where the samples are, or the CPU.
        dtype: of the network; None is float32.
        batch_size: images in one forward pass.
        allow_pickle: read a .pt file, as tensors only; None reads the one that the authors publish and no other.

    Raises:
        CheckpointError: the checkpoint is a pickle that was not allowed, or a file that is not there.
        ImportError: transformers is not installed.
    """
    allowed = checkpoint == CHECKPOINT if allow_pickle is None else allow_pickle
    loading.check_file(checkpoint, allow_pickle=allowed)
    loading.load_part("AutoTokenizer", processor)
    clip = Clip(
        checkpoint=checkpoint,
        processor=processor,
        dtype=loading.as_dtype(dtype),
        allow_pickle=allowed,
        prepare=vision.Preprocessor(size=(224, 224), mean=vision.CLIP_MEAN, std=vision.CLIP_STD, fit="pad"),
        tokens=TOKENS,
        load=load_open_clip,
    )
    name = "HPSv2" if checkpoint == CHECKPOINT else f"HPSv2({checkpoint})"
    return prompt_reward(clip, name, lambda cos, _: scale * cos, device, batch_size)


@loading.once
def load_open_clip(checkpoint: str, device: str, dtype: torch.dtype, allow_pickle: bool) -> Any:
    """The CLIPModel whose weights are in an open_clip state dict, bare or under "state_dict".

    Raises:
        CheckpointError: the weights are not those of a vision transformer of open_clip.
    """
    stored = loading.weights(checkpoint, allow_pickle=allow_pickle)
    try:
        state = clip_state(stored.get("state_dict", stored))
        config = clip_config(state)
    except KeyError as error:
        raise loading.CheckpointError(f"{checkpoint} is no open_clip state dict: it lacks {error}") from error
    return loading.ready(loading.built("CLIPModel", config, state, checkpoint), device, dtype)


def clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip CLIP under the names that transformers' CLIPModel gives them.

    The names differ (`NAMES`); queries, keys and values are one matrix there and three here; the two projections are
    stored as x @ W there and as x @ Wᵀ here. Wrappers put `module.` or `model.` before every name.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        key = re.sub(r"^(module|model)\.", "", key)
        if key in ("visual.proj", "text_projection"):
            name = "visual_projection.weight" if key == "visual.proj" else "text_projection.weight"
            converted[name] = value.T.contiguous()
            continue
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        if m := re.search(r"in_proj_(weight|bias)$", key):
            parts = zip("qkv", value.chunk(3), strict=True)
            converted |= {f"{key[: m.start()]}{c}_proj.{m[1]}": part.clone() for c, part in parts}
        elif key != "attn_mask":
            converted[key] = value
    return converted


def clip_config(state: dict[str, Tensor]) -> Any:
    """The CLIPConfig that fits converted weights; activations are exact GELU.

    Raises:
        KeyError: a weight that every CLIP has is not there.
    """
    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    patches = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
    vocabulary = len(state["text_model.embeddings.token_embedding.weight"])
    text = {
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "max_position_embeddings": len(state["text_model.embeddings.position_embedding.weight"]),
        "hidden_size": state["text_model.embeddings.token_embedding.weight"].shape[1],
    }
    size = len(state["visual_projection.weight"])
    towers = [
        config
        | {
            "num_hidden_layers": 1
            + max(int(k.split(".")[3]) for k in state if k.startswith(f"{tower}.encoder.layers")),
            "intermediate_size": len(state[f"{tower}.encoder.layers.0.mlp.fc1.weight"]),
            "num_attention_heads": HEADS,
            "hidden_act": "gelu",
            "projection_dim": size,
        }
        for tower, config in (
            ("text_model", text),
            ("vision_model", {"hidden_size": width, "patch_size": patch, "image_size": patch * round(patches**0.5)}),
        )
    ]
    from transformers import CLIPConfig

    return CLIPConfig(text_config=towers[0], vision_config=towers[1], projection_dim=size)
