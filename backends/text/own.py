"""A small masked language model of our own: a transformer, its tokenizer, and both in one file.

    logits(x) = W norm(blocks(E x + P))        pre-norm blocks, learned places, W the embedding again

Before each block a channel takes up its neighbours, h <- h + conv(norm(h)): words beside each other are known from the
start. Without, over a thousand optimiser steps learn little more than how often each word is used.

The file is safetensors: weights in float16, sizes and tokenizer as JSON in its header. It needs `tokenizers` and
nothing else of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from treesearch.backends.models.shipped import shipped_file
from treesearch.backends.text.corruption import Noise
from treesearch.backends.text.kernel import MaskedTextKernel
from treesearch.backends.text.reveals import Order
from treesearch.backends.text.words import Words

PAD, END, MASK = "[PAD]", "[END]", "[MASK]"
SPECIAL = (PAD, END, MASK)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a network.

    Args:
        vocabulary: tokens, marks included.
        length: the longest text.
        width, depth, heads: of the blocks.
    """

    vocabulary: int
    length: int
    width: int = 128
    depth: int = 6
    heads: int = 4


class Neighbours(nn.Module):
    """h + conv(norm(h)) of h (n, L, width): five places, each channel by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 5, padding=2, groups=width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.conv(self.norm(h).mT).mT


class MaskedTransformer(nn.Module):
    """Logits (n, L, V) of tokens (n, L), or (k, V) of k wanted places alone; L up to `size.length`."""

    def __init__(self, size: Size, dropout: float = 0.1) -> None:
        super().__init__()
        self.size = size
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Parameter(0.02 * torch.randn(size.length, size.width))
        block = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, size.depth, nn.LayerNorm(size.width), enable_nested_tensor=False)
        self.near = nn.ModuleList([Neighbours(size.width) for _ in range(size.depth)])
        self.bias = nn.Parameter(torch.zeros(size.vocabulary))
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        hidden = self.tokens(x) + self.places[: x.shape[1]]
        for near, block in zip(self.near, self.blocks.layers, strict=True):
            hidden = block(near(hidden))
        hidden = self.blocks.norm(hidden)
        return nn.functional.linear(hidden if wanted is None else hidden[wanted], self.tokens.weight, self.bias)


class OwnTokenizer:
    """A tokenizer of the library `tokenizers` with the methods that `Words` asks for.

    Args:
        text: the tokenizer as JSON.
    """

    chat_template = None
    unk_token_id = None  # it knows every byte

    def __init__(self, text: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError("this model needs tokenizers: pip install 'treesearch[text]'") from error
        self.text, self.inner = text, Tokenizer.from_str(text)
        self.pad_token_id, self.eos_token_id, self.mask_token_id = map(self.inner.token_to_id, SPECIAL)
        self.mask_token = MASK

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": self.inner.encode(text, add_special_tokens=add_special_tokens).ids}

    def batch_decode(self, rows: Sequence[Sequence[int]], **how: Any) -> list[str]:
        return [text.strip() for text in self.inner.decode_batch(rows, skip_special_tokens=how["skip_special_tokens"])]

    def get_vocab(self) -> dict[str, int]:
        return self.inner.get_vocab()


def save_own(network: MaskedTransformer, tokenizer: str, path: Path, card: dict[str, Any] | None = None) -> None:
    """Write a model as one file, replaced atomically; `tokenizer` is JSON, `card` how it came about."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().half().contiguous() for name, w in network.state_dict().items()}
    part = path.with_suffix(".tmp")
    save_file(
        weights, part, {"size": json.dumps(asdict(network.size)), "tokenizer": tokenizer, "card": json.dumps(card)}
    )
    part.chmod(0o644)
    part.replace(path)


def load_own(name: str | Path) -> tuple[MaskedTransformer, OwnTokenizer]:
    """A model from its file: evaluation mode, float32, no gradients to weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind.
        ImportError: safetensors or tokenizers is not installed.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with shipped_file(name) as path:
            with safe_open(path, framework="pt") as file:
                says = file.metadata() or {}
            with torch.device("cpu"):  # whatever torch's default device and dtype
                network = MaskedTransformer(Size(**json.loads(says["size"]))).float()
            network.load_state_dict({key: w.float() for key, w in load_file(path).items()})
        return network.eval().requires_grad_(False), OwnTokenizer(says["tokenizer"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{str(name)!r} holds no masked transformer: train one with experiments.text.train_text"
        ) from error


def small_text(
    weights: str | Path = "text.safetensors",
    num_steps: int = 32,
    length: int | None = None,
    device: str | torch.device = "cpu",
    *,
    noise: Noise = "masked",
    schedule: Any = "log-linear",
    reveal: Order = "random",
    temperature: float = 1.0,
    top_p: float = 1.0,
    guidance_scale: float = 1.0,
    forbid: Sequence[int] = (),
    endpoint: Literal["argmax", "draw"] = "argmax",
) -> MaskedTextKernel:
    """A small model as a kernel.

    Args:
        weights: the shipped file by its name, or the path of one that `save_own` wrote.
        num_steps: T.
        length: tokens of a text; None is the longest that it knows.
        device: where the network runs.
        noise, schedule, reveal, temperature, top_p, guidance_scale, forbid, endpoint: as in `MaskedTextKernel`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, a length beyond the model's, or a setting out of range.
        ImportError: tokenizers is not installed.
    """
    network, tokenizer = load_own(weights)
    length = network.size.length if length is None else length
    if length > network.size.length:
        raise ValueError(f"length is {length}, this model knows texts of {network.size.length} tokens at most")
    return MaskedTextKernel(
        network,
        length=length,
        num_steps=num_steps,
        mask=None if noise == "uniform" else tokenizer.mask_token_id,
        vocabulary=network.size.vocabulary,
        words=Words(tokenizer),
        noise=noise,
        schedule=schedule,
        reveal=reveal,
        temperature=temperature,
        top_p=top_p,
        guidance_scale=guidance_scale,
        forbid=forbid,
        endpoint=endpoint,
        device=device,
        name="small_text",
    )
