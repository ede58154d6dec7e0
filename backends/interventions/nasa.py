"""Negative prompts inside cross-attention, for models of few steps too, where classifier-free guidance fails.

    Z^± = softmax(Q K_±^T / √d) V_±          one Q; K_-, V_- of the negative prompt, by the weights of the module
    NASA   Z = Z⁺ - α Z⁻
    NAG    Z̃ = Z⁺ + φ (Z⁺ - Z⁻),    Ẑ = Z̃ min(1, τ ‖Z⁺‖₁ / ‖Z̃‖₁),    Z = β Ẑ + (1 - β) Z⁺

before the projection of the output; ‖·‖₁ of a token over all heads. Under classifier-free guidance rows of ∅ stay. The
negative prompt goes through the text encoders once, as the kernel is made, and once through the network at either end
of the chain, to see what its cross-attention is given; keys and values are computed anew from that at each step, a few
tokens' worth. Exact where the text meets the image by cross-attention alone. Where both attend jointly (SD3, FLUX), the
negative text has other keys at every layer, which depend on the image that they change: there is no such Z⁻, and such
networks are refused.

Sources: SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance (Nguyen et al., 2024), section 3.3.
Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models (Chen et al., 2025), eqs. 6-9, of which
α is β here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from treesearch.backends.base import Shared, expand, optional
from treesearch.backends.base.capture import parts
from treesearch.backends.base.taps import Attend, tapped
from treesearch.backends.interventions.base import Intervened, Intervention, Rows, network_of
from treesearch.backends.interventions.cfg import bottom
from treesearch.backends.interventions.heads import Network, attentions
from treesearch.rewards.numeric import is_number, is_positive


class Text(NamedTuple):
    """What cross-attention is given of the negative prompts: tokens (n, length, width), and which count (n, length)."""

    tokens: Tensor
    counts: Tensor | None


@final
@dataclass(frozen=True)
class NASA(Intervention):
    """Negative prompts in cross-attention; `nasa` makes it, and knows the texts.

    Args:
        negative: prompts.
        alpha: α, of NAG φ; each with each prompt is a setting.
        texts: of the prompts, by the name of the module.
        normalised: NAG.
        tau, blend: τ and β of it.

    Raises:
        TypeError: prompts that are no text.
        ValueError: a number out of range.
    """

    negative: tuple[str, ...]
    alpha: tuple[float, ...]
    texts: Mapping[str, Text]
    normalised: bool = False
    tau: float = 2.5
    blend: float = 0.25

    def __post_init__(self) -> None:
        if not self.negative or not all(isinstance(text, str) for text in self.negative):
            raise TypeError(f"negative is {self.negative!r}, expected text, or a tuple of it")
        if not self.alpha or not all(is_number(a, 0) and a < math.inf for a in self.alpha):
            raise ValueError(f"alpha is {self.alpha!r}, expected finite numbers >= 0")
        if not is_positive(self.tau) or not is_number(self.blend, 0, 1):
            raise ValueError(f"tau is {self.tau!r} and blend {self.blend!r}, expected tau > 0 and blend in [0, 1]")

    @property
    def settings(self) -> tuple[str, ...]:
        sign = "φ" if self.normalised else "α"
        return tuple(f"not {text}, {sign} = {alpha:g}" for text in self.negative for alpha in self.alpha)

    @property
    def identity(self) -> list[Any]:
        return [list(self.negative), list(self.alpha), self.normalised, self.tau, self.blend]

    @contextmanager
    def on(self, network: Network, rows: Rows) -> Iterator[None]:
        against = negatives(network, self.texts)
        with tapped(network, {name: partial(self._tap, rows, kv) for name, kv in against.items()}):
            yield

    def _tap(self, rows: Rows, negative: tuple[Tensor, ...], attend: Attend, *qkv: Tensor) -> Tensor:
        z, mine, q = attend(*qkv), rows.of_network(qkv[0]), qkv[0]
        alpha = self._alphas.to(z)[mine.setting]
        acts = mine.given & (alpha > 0)
        if not acts.any():
            return z
        which = (mine.setting - 1).clamp_min(0) // len(self.alpha)
        k, v, mask = (None if each is None else each[which] for each in negative)
        with torch._C.DisableTorchFunction():  # other taps are of Z⁺
            away = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # type: ignore[arg-type]
        return torch.where(expand(acts, z), self._combined(z, away, expand(alpha, z)), z)

    def _combined(self, z: Tensor, away: Tensor, alpha: Tensor) -> Tensor:
        if not self.normalised:
            return z - alpha * away
        guided = z + alpha * (z - away)
        most, is_ = (each.abs().sum((1, 3), keepdim=True) for each in (z, guided))
        clipped = guided * (self.tau * most / is_.clamp_min(torch.finfo(z.dtype).tiny)).clamp(max=1)
        return self.blend * clipped + (1 - self.blend) * z

    @cached_property
    def _alphas(self) -> Tensor:
        """α of the settings, 0 where it is off."""
        return torch.tensor([0.0, *self.alpha * len(self.negative)], device="cpu")


def nasa(
    kernel: Any,
    negative: str | tuple[str, ...],
    alpha: float | tuple[float, ...] = 0.1,
    normalised: bool = False,
    tau: float = 2.5,
    blend: float = 0.25,
    levels: tuple[int, int] | None = None,
) -> Intervened:
    """A kernel whose cross-attention leads away from a negative prompt.

    Args:
        kernel: of a text-conditioned network with cross-attention.
        negative: the prompt, or several concepts, each a setting.
        alpha: α, one or several settings; published 0.1 to 0.5. Where normalised it is φ, published 2 to 10.
        normalised: NAG instead of NASA.
        tau, blend: τ and β of it.
        levels: (low, high), t at which it acts, both included; None are all.

    Raises:
        TypeError: a kernel that names no network or takes no prompts.
        ValueError: a network without cross-attention, or a number out of range.
    """
    prompts = negative if isinstance(negative, tuple) else (negative,)
    alphas = alpha if isinstance(alpha, tuple) else (alpha,)
    checked = NASA(prompts, alphas, {}, normalised, tau, blend)
    texts = texts_of(kernel, checked.negative)
    return Intervened(kernel, NASA(prompts, alphas, texts, normalised, tau, blend), levels=levels)


def texts_of(kernel: Any, prompts: Sequence[str]) -> dict[str, Text]:
    """What each cross-attention module of a kernel is given of prompts.

    Raises:
        TypeError: a kernel that names no network or takes no prompts.
        ValueError: a network without cross-attention.
    """
    network, model, n = network_of(kernel), bottom(kernel), len(prompts)
    _check(kernel, network)
    found = model.encode(prompts) if optional(model, "encode") else None
    if not found:
        raise TypeError(f"{type(model).__name__} takes no prompts, and so no negative ones")
    cond = {name: each.value if isinstance(each, Shared) else each for name, each in found.items()}
    with seen(network, n) as texts, torch.no_grad():
        x = model.prior(torch.zeros(n, *optional(model, "noise_shape", model.state_shape)), cond)
        for t in sorted({1, int(model.num_steps)}):  # experts have each an end of the chain
            model.transition(x, torch.full((n,), t, device=x.device), cond)
    return texts


def _check(kernel: Any, network: Network) -> None:
    if not attentions(network, ("cross",)):
        why = "has no cross-attention"
        if attentions(network, ("joint",)):
            why = "lets text and image attend jointly: keys of a negative text depend on the image at every layer there"
        raise ValueError(f"the network of {type(bottom(kernel)).__name__} {why}; NASA needs cross-attention")


@contextmanager
def seen(network: Network, n: int) -> Iterator[dict[str, Text]]:
    """Within it, what cross-attention modules are given, the last n rows; modules of one text share it."""
    texts: dict[str, Text] = {}
    kept: dict[int, tuple[Any, Text]] = {}
    with ExitStack() as hooks:
        for name, part in parts(network, tuple(attentions(network, ("cross",)))).items():
            see = partial(_see, name, n, texts, kept)
            hooks.callback(part.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield texts


def _see(
    name: str, n: int, texts: dict[str, Text], kept: dict[int, tuple[Any, Text]], part: nn.Module, *call: Any
) -> None:
    given = inspect.signature(part.forward).bind_partial(*call[0], **call[1]).arguments
    tokens, bias = given["encoder_hidden_states"], given.get("attention_mask")
    if id(tokens) not in kept:
        counts = None if bias is None else (bias[-n:].reshape(n, -1) > -1)  # 0 where it counts, -10,000 elsewhere
        kept[id(tokens)] = (tokens, Text(tokens[-n:].clone(), counts))
    texts[name] = kept[id(tokens)][1]


def negatives(network: Network, texts: Mapping[str, Text]) -> dict[str, tuple[Any, ...]]:
    """Keys and values (n, heads, length, width) of negative texts by module, and their mask or None.

    Raises:
        RuntimeError: a module that attends to more than the text.
    """
    return {name: _negative(name, part, texts[name]) for name, part in parts(network, tuple(texts)).items()}


def _negative(name: str, part: nn.Module, text: Text) -> tuple[Any, ...]:
    like, heard = next(part.parameters()), _Heard()
    tokens = text.tokens.to(like)
    query = tokens.new_zeros(len(tokens), 1, part.to_q.in_features)  # type: ignore[union-attr,arg-type]
    with heard:  # `forward` alone: hooks are of other interventions
        part.forward(query, encoder_hidden_states=tokens)
    found = heard.found
    if len(found) != 1:
        raise RuntimeError(f"{name} attends to more than the text: unload its image adapter")
    mask = None if text.counts is None else text.counts.to(like.device)[:, None, None]
    return (*found[0], mask)


class _Heard(TorchFunctionMode):
    """Hears keys and values of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            call = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.found.append((call["key"], call["value"]))
        return func(*args, **kwargs)
