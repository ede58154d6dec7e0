"""Language models by checkpoint: what is read, how it is asked, and what is refused before its weights.

    masked language models of transformers   AutoModelForMaskedLM, with the marks that its tokenizer puts around texts
    LLaDA, Dream, MDLM                       code of their own, which is run only where that is asked for

LLaDA 2 and DiffusionGemma are refused: they denoise block by block, on what the step before predicted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from treesearch.backends.text.asked import Asked
from treesearch.backends.text.words import Words
from treesearch.rewards.loading import CheckpointError, as_dtype, explained, needed

CLASSES = ("AutoModelForMaskedLM", "AutoModel", "AutoModelForCausalLM")  # of code of their own, in order of preference
MASKS = {"llada": 126336}  # where neither tokenizer nor configuration says it
REFUSED = {
    "llada2_moe": "it commits blocks by confidence and edits them, which has no law of x_s given x_t",
    "diffusion_gemma": "it conditions on the logits of the step before, which are no part of a state",
}


class Loaded(NamedTuple):
    """A checkpoint.

    Args:
        network, words, asked: as of `MaskedTextKernel`.
        mask: number of the mask token, None where nothing says it.
        vocabulary: tokens that the network knows.
        name: of its kind.
    """

    network: nn.Module
    words: Words
    asked: Asked
    mask: int | None
    vocabulary: int
    name: str


def load(
    checkpoint: str,
    length: int,
    *,
    trust_remote_code: bool,
    tokenizer: str | None,
    chat: bool,
    dtype: str | torch.dtype | None,
) -> Loaded:
    """Read a checkpoint, its configuration first.

    Raises:
        CheckpointError: absent, gated, incomplete, or no masked language model.
        ValueError: an unknown dtype, code of its own without consent, a tokenizer of another model, or texts longer
            than it reads.
        ImportError: transformers is not installed.
    """
    transformers, precision = needed("transformers"), "auto" if dtype is None else as_dtype(dtype)
    says = _configuration(transformers, checkpoint)
    kind, codes = says.get("model_type", ""), says.get("auto_map") or {}
    if kind in REFUSED:
        raise CheckpointError(f"{checkpoint} is a {kind}: {REFUSED[kind]}")
    if codes and not trust_remote_code:
        files = ", ".join(sorted({_file(code) for code in codes.values()}))
        raise ValueError(f"{checkpoint} comes with code of its own ({files}), which would run here: read it, then pass "
                         "trust_remote_code=True")  # fmt: skip
    options = {"trust_remote_code": trust_remote_code}
    config = _read(transformers.AutoConfig, checkpoint, **options)
    name = next((name for name in CLASSES if name in codes), CLASSES[0])
    if not codes and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        raise CheckpointError(f"{checkpoint} is a {kind} network, expected a masked language model")
    words = Words(_read(transformers.AutoTokenizer, tokenizer or checkpoint, **options), chat=chat)
    words.refuse_other(config.vocab_size)
    before, after = words.frame()
    _refuse_long(checkpoint, config, length + len(before) + len(after))
    network, info = _read(
        getattr(transformers, name),
        checkpoint,
        **options,
        dtype=precision,
        output_loading_info=True,
        use_safetensors=True,
    )
    if missing := sorted(map(str, info["missing_keys"])):
        raise CheckpointError(f"{checkpoint} lacks {len(missing)} weights, {missing[0]} among them: wrong model?")
    asked = Asked(before, after, "sigma" if kind == "mdlm" else "nothing", shifted=kind.lower() == "dream")
    return Loaded(network.eval(), words, asked, _mask(config, words, kind), config.vocab_size, kind)


def _mask(config: Any, words: Words, kind: str) -> int | None:
    """The mask token by what says it first: the tokenizer, the configuration, or what is known of its kind."""
    if words.mask is not None:
        return words.mask
    said = getattr(config, "mask_token_id", None)
    return config.vocab_size - 1 if said is None and kind == "mdlm" else MASKS.get(kind) if said is None else int(said)


def _refuse_long(checkpoint: str, config: Any, tokens: int) -> None:
    """Raises:
    ValueError: more tokens than the network has positions for.
    """
    positions = next((p for key in ("max_position_embeddings", "max_sequence_length", "model_length")
                      if isinstance(p := getattr(config, key, None), int)), tokens)  # fmt: skip
    if tokens > positions:
        raise ValueError(f"{checkpoint} reads {positions} tokens, got a length of {tokens} with its marks: take less")


def _configuration(transformers: Any, checkpoint: str) -> dict[str, Any]:
    """What config.json says; runs nothing."""
    try:
        return transformers.PretrainedConfig.get_config_dict(checkpoint)[0]
    except Exception as error:
        raise explained(checkpoint, error) from error


def _read(kind: Any, checkpoint: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(checkpoint, **options)
    except ImportError:
        raise
    except Exception as error:
        raise explained(checkpoint, error) from error


def _file(code: Any) -> str:
    """The file of an entry of auto_map, "file.Class" or "repository--file.Class" or a pair of such."""
    text = str(next((c for c in code if c), "") if isinstance(code, (list, tuple)) else code)
    return text.rpartition("--")[2].partition(".")[0] + ".py"
