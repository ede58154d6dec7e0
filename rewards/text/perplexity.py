"""How probable a causal language model finds a text.

    r(x) = 1/n Σ_i log p(x_i | x_<i) = -log perplexity, in nats

Where the tokenizer has a mark of a beginning, all n tokens count; else the first has nothing before it and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.text.texts import TEXTS, checked

LONGEST = 2**16  # tokens of a text, where nothing says how many are read


@facts(
    range="-inf to 0, about -3 to -5 nats a token of plain English",
    differentiable=False,
    checkpoint="openai-community/gpt2",
    licence="MIT",
    memory="0.5 GB",
    limits=f"{TEXTS}; as many tokens as the model reads, the rest does not count",
    source="Singhal et al. 2025, A General Framework for Inference-time Scaling and Steering of Diffusion Models",
)
def perplexity(
    checkpoint: str = "openai-community/gpt2",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 32,
    allow_pickle: bool = False,
) -> Reward:
    """r = -log perplexity of a text, mean log-probability of its tokens; -inf of a text without tokens that count.

    Args:
        checkpoint: anything that AutoModelForCausalLM reads, a hub id or a local folder.
        device: to score on; None is the CPU.
        dtype: of the network; None is float32.
        batch_size: texts in one forward pass.
        allow_pickle: also read weights that are not safetensors, as tensors only.

    Raises:
        ValueError: an unknown dtype.
        CheckpointError: the checkpoint is absent or gated, or sees both sides of a token.
        ImportError: transformers is not installed.
    """
    where, precision = str(device or "cpu"), loading.as_dtype(dtype)
    _refuse_bidirectional(checkpoint)
    words = loading.load_part("AutoTokenizer", checkpoint)

    def part(texts: list[str], _: Any) -> Tensor:
        network = loading.load("AutoModelForCausalLM", checkpoint, where, precision, allow_pickle)
        longest = getattr(network.config, "max_position_embeddings", None) or LONGEST
        start = [] if words.bos_token_id is None else [words.bos_token_id]
        rows = [(start + _ids(words, text))[:longest] for text in texts]
        width = max(2, *map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=where)
        read = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=where)
        with torch.no_grad():
            logits = network(input_ids=tokens, attention_mask=read).logits[:, :-1]
        told = logits.double().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        counted = read[:, 1:].double()
        mean = (told * counted).sum(1) / counted.sum(1)
        return torch.where(counted.sum(1) > 0, mean, -math.inf).cpu()

    def fn(samples: Any, _: Sequence[Any] | None) -> Tensor:
        return loading.micro_batches(part, checked(samples), None, batch_size)

    return Reward(fn, f"perplexity({checkpoint})")


def _refuse_bidirectional(checkpoint: str) -> None:
    """Raises:
    CheckpointError: a masked language model, whose logits at a token have seen it.
    """
    config = loading.load_part("AutoConfig", checkpoint)
    masked = type(config) in loading.needed("transformers").MODEL_FOR_MASKED_LM_MAPPING
    if masked and not any(getattr(config, told, False) for told in ("is_decoder", "is_encoder_decoder", "causal")):
        raise loading.CheckpointError(f"{checkpoint} is a {config.model_type} network, which sees both sides of a token"
                                      ": perplexity needs a causal language model, such as gpt2")  # fmt: skip


def _ids(words: Any, text: str) -> list[int]:
    return list(words(text, add_special_tokens=False)["input_ids"])
