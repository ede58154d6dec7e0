"""What the rewards on CLIP share: normalised embeddings of images and prompts, and their cosine.

    cos(x, y) = e(x)·e(y) / (|e(x)| |e(y)|)        x an image, y a prompt, e(·) after CLIP's projections

Each prompt is embedded once and kept; those over the network's tokens (77) are cut, as the published scorers do, and
`unread` says so.

Source: Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021), section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.images import vision

DEFAULT = "openai/clip-vit-large-patch14"
TOKENS = 77
CUT = f"prompts are cut after {TOKENS} tokens ({TOKENS - 2} and two marks), about 50 words"
SQUARE = "images (n, 1 or 3, h, w) in [0, 1], of which the middle square is read at 224 × 224"


def load_clip(checkpoint: str, device: str, dtype: torch.dtype, allow_pickle: bool) -> Any:
    """The CLIPModel in a checkpoint that transformers reads."""
    return loading.load("CLIPModel", checkpoint, device, dtype, allow_pickle)


def check_clip(checkpoint: str) -> None:
    """See, before a network is built, that a checkpoint can be reached and is a CLIP.

    Raises:
        CheckpointError: absent, gated or of another architecture.
        ImportError: transformers is not installed.
    """
    kind = loading.load_part("AutoConfig", checkpoint).model_type
    if kind != "clip":
        raise loading.CheckpointError(f"{checkpoint} is a {kind} network, expected a CLIP such as {DEFAULT}")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A CLIP by name: what a reward holds instead of the weights.

    Args:
        checkpoint: of the network.
        processor: hub id or folder of the tokenizer, and of the image processor unless `prepare` is given.
        dtype: to run in; cosines are float32 at least.
        allow_pickle: passed to `load`.
        prepare: how images are prepared.
        prefix: put before each prompt.
        tokens: of a prompt that the network reads; None as the checkpoint's configuration says.
        load: (checkpoint, device, dtype, allow_pickle) -> a CLIPModel, cached.
    """

    checkpoint: str
    processor: str
    dtype: torch.dtype = torch.float32
    allow_pickle: bool = False
    prepare: vision.Preprocessor | None = None
    prefix: str = ""
    tokens: int | None = None
    load: Callable[[str, str, torch.dtype, bool], Any] = load_clip

    def network(self, device: str) -> Any:
        return self.load(self.checkpoint, device, self.dtype, self.allow_pickle)

    def images(self, samples: Any, device: str) -> Tensor:
        """Unit embeddings (n, d) of what a kernel decodes, with their graph."""
        network = self.network(device)
        samples = samples.to(device) if isinstance(samples, Tensor) else samples
        inputs = (self.prepare or vision.preprocessor(self.processor))(samples).to(device, self.dtype)
        return _unit(network.visual_projection(network.vision_model(pixel_values=inputs).pooler_output))

    def prompts(self, prompts: Sequence[str], device: str) -> Tensor:
        """Unit embeddings (n, d) of prompts, without a graph."""
        return torch.stack([_prompt(self, self.prefix + p, device) for p in prompts])

    @property
    def length(self) -> int:
        """Tokens of a prompt that the network reads, its two marks included."""
        return self.tokens or loading.load_part("AutoConfig", self.checkpoint).text_config.max_position_embeddings

    def unread(self, prompts: Sequence[Any], name: str) -> list[list[str]]:
        """What to say of prompts that are cut."""
        texts = [self.prefix + p if isinstance(p, str) else p for p in prompts]
        return vision.unread(loading.load_part("AutoTokenizer", self.processor), texts, self.length, name)

    def cosine(self, samples: Any, prompts: Sequence[str], device: str) -> Tensor:
        """cos(x, y) of each image with its prompt, (n,)."""
        return (self.images(samples, device) * self.prompts(prompts, device)).sum(1)


def prompt_reward(
    clip: Clip,
    name: str,
    score: Callable[[Tensor, Any], Tensor],
    device: str | torch.device | None,
    batch_size: int,
) -> Reward:
    """The reward score(cosines, network)."""

    def part(samples: Any, prompts: Any) -> Tensor:
        where = vision.place(samples, device)
        return score(clip.cosine(samples, prompts, where), clip.network(where))

    def fn(samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        return loading.micro_batches(part, samples, vision.need_prompts(prompts, name), batch_size)

    return Reward(fn, name, remarks=lambda prompts: clip.unread(prompts, name))


def _unit(features: Tensor) -> Tensor:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features / features.norm(dim=-1, keepdim=True)


def _embedded(clip: Clip, prompt: str, device: str) -> Tensor:
    """One prompt at a time: the causal text tower then needs no padding, and no batch can change the result."""
    network = clip.network(device)
    tokenizer = loading.load_part("AutoTokenizer", clip.processor)
    tokens = tokenizer(prompt, truncation=True, max_length=clip.length, return_tensors="pt").input_ids.to(device)
    return _unit(network.text_projection(network.text_model(input_ids=tokens).pooler_output))[0]


_prompt = loading.once(_embedded, maxsize=1024)
