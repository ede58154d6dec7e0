"""Masked and uniform diffusion of text, the chain that a network of logits defines.

    q(x_t | x_0)   each token is kept with probability α_t, else it is the mask (or any token)
    x_s | x_t      each masked position is revealed with probability (α_s - α_t) / (1 - α_t), s = t - 1,
                   and drawn from softmax(ℓ(x_t) / τ), independently of the others

A network is anything that maps tokens (n, L), or tokens and a time, to logits (n, L, V): masked language models of
transformers, LLaDA, Dream, MDLM, protein models. No position goes to the mask, and revealed tokens stay (SUBS),
whatever the network says. What is known, a prompt or a scaffold, stands in the state from the start and stays: the
chain is the network's given it, and no density counts it.

Sources: Simple and Effective Masked Diffusion Language Models (Sahoo et al., 2024), eqs. 7 to 9.
Large Language Diffusion Models (Nie et al., 2025), appendix B, guidance with the prompt masked.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Tokens, fingerprint, uniform
from treesearch.backends.base.cfg import extrapolated
from treesearch.backends.base.devices import as_device
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.base.tokens import NOWHERE, level_normals, log_norm
from treesearch.backends.text import reveals
from treesearch.backends.text.asked import PLAINLY, Asked
from treesearch.backends.text.corruption import Noise, corruption
from treesearch.backends.text.words import Words
from treesearch.rewards.numeric import is_number, is_whole

COLDEST = 1e-6  # temperature, below which logits over it leave float64's range sooner or later
FREE = -1  # among known tokens: a position that is not known
KNOWN = "known"  # of conditioning: tokens (n, L) that stand from the start, FREE elsewhere
PROMPTED = "prompted"  # of conditioning: which of them guidance hides (n, L), where that is not all of them
DEPARTS_TOP_P = "each token is drawn from the most probable ones alone (top_p): not the law of the network"


@final
class MaskedTextKernel:
    """The chain of a network over texts of `length` tokens.

    Args:
        network: called as network(tokens) or network(tokens, time), returns logits or has them as `.logits`. A module
            is moved to the device, called in evaluation mode and otherwise left as it is.
        length: L, tokens of a text, prompt included.
        num_steps: T.
        mask: number of the mask token; None for uniform noise, which has none.
        vocabulary: V, tokens that the network knows. Uniform noise draws from them; masked diffusion may leave it out,
            and settings that name other tokens are then found at the first step.
        words: what makes texts of tokens; without, prompts and samples are tokens.
        noise, schedule: see `text.corruption`.
        reveal: order of reveals, "random", "confidence" or "left", see `text.reveals`.
        temperature: τ that logits are divided by.
        top_p: probability of the tokens that are drawn from; 1 is all of them.
        guidance_scale: w of classifier-free guidance on prompts, ℓ(∅) + w (ℓ(c) - ℓ(∅)), 2 rows an evaluation; ∅ is the
            text with its known part masked. 1 is unguided.
        forbid: numbers of tokens that are never drawn.
        endpoint: x̂_0 of a state that is scored above t = 0, the most probable tokens ("argmax") or one draw of each
            ("draw"), on numbers that are the same for all states of a level.
        asked: see `text.asked`.
        device: where the network runs.
        name: enters the fingerprint.

    Raises:
        ValueError: a setting out of range, or two that do not go together.
    """

    dtype = torch.int64

    def __init__(
        self,
        network: nn.Module | Callable[..., Any],
        *,
        length: int,
        num_steps: int,
        mask: int | None = None,
        vocabulary: int | None = None,
        words: Words | None = None,
        noise: Noise = "masked",
        schedule: Any = "log-linear",
        reveal: reveals.Order = "random",
        temperature: float = 1.0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        forbid: Sequence[int] = (),
        endpoint: Literal["argmax", "draw"] = "argmax",
        asked: Asked = PLAINLY,
        device: str | torch.device = "cpu",
        name: str = "text",
    ) -> None:
        self.model, self.words, self.name, self.asked = network, words, name, asked
        self.corruption, self.schedule = corruption(noise, schedule, num_steps), schedule
        self.length, self.num_steps = length, self.corruption.num_steps
        self.mask, self.vocabulary, self.reveal = mask, vocabulary, reveal
        self.temperature, self.top_p, self.guidance_scale = temperature, top_p, guidance_scale
        self.forbid, self.endpoint = _numbers(forbid), endpoint
        self._refuse()
        self.temperature, self.guidance_scale = float(temperature), float(guidance_scale)
        self.device = as_device(device)
        self._quiet = Quiet(*([network.to(self.device)] if isinstance(network, nn.Module) else []))

    def _refuse(self) -> None:
        """Raises:
        ValueError: a setting out of range, or two that do not go together.
        """
        if not is_whole(self.length):
            raise ValueError(f"length is {self.length!r}, expected at least one token")
        if self.masked and not is_whole(self.mask, 0):
            raise ValueError(f"mask is {self.mask!r}: masked diffusion needs the number of its mask token, mask=...")
        if not self.masked and not (self.mask is None and is_whole(self.vocabulary, 2)):
            raise ValueError(f"uniform noise has no mask (got {self.mask!r}) and needs its vocabulary, 2 tokens or "
                             f"more (got {self.vocabulary!r})")  # fmt: skip
        if self.reveal not in reveals.ORDERS:
            raise ValueError(f"reveal is {self.reveal!r}, expected one of {', '.join(reveals.ORDERS)}")
        if not self.masked and self.reveal != "random":
            raise ValueError(f"reveal={self.reveal!r} is of masks, and uniform noise has none: leave it out")
        if not is_number(self.temperature, COLDEST, 1e6):
            raise ValueError(f"temperature is {self.temperature!r}, expected a number of {COLDEST:g}..1e6: .01 is all "
                             "but argmax")  # fmt: skip
        if not is_number(self.top_p, 0, 1) or self.top_p == 0:
            raise ValueError(f"top_p is {self.top_p!r}, expected a probability above 0")
        if not is_number(self.guidance_scale, 0, 1e6):
            raise ValueError(f"guidance_scale is {self.guidance_scale!r}, expected a number >= 0; 1 is unguided")
        if not self.masked and self.guidance_scale != 1:
            raise ValueError("guidance masks the prompt, and uniform noise has no mask: leave guidance_scale out")
        if self.endpoint not in ("argmax", "draw"):
            raise ValueError(f"endpoint is {self.endpoint!r}, expected 'argmax' or 'draw'")
        if self.vocabulary is not None:
            if not is_whole(self.vocabulary):
                raise ValueError(f"vocabulary is {self.vocabulary!r}, expected how many tokens the network knows")
            if self.masked and self.mask >= self.vocabulary:
                raise ValueError(f"mask is {self.mask}, the network knows {self.vocabulary} tokens, numbered from 0")
            self._never(self.vocabulary)

    def _never(self, size: int) -> list[int]:
        """Which of `size` tokens are never drawn.

        Raises:
            ValueError: all, or others than these.
        """
        if self.forbid and max(self.forbid) >= size:
            raise ValueError(f"forbid names token {max(self.forbid)}, the network knows {size}, numbered from 0")
        never = {*self.forbid, *([self.mask] if self.masked and self.mask < size else [])}
        if len(never) == size:
            raise ValueError(f"none of {size} tokens is left to draw: forbid fewer")
        return sorted(never)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        length: int,
        num_steps: int,
        *,
        trust_remote_code: bool = False,
        tokenizer: str | None = None,
        chat: bool = False,
        mask: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        noise: Noise = "masked",
        schedule: Any = "log-linear",
        reveal: reveals.Order = "random",
        temperature: float = 1.0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        forbid: Sequence[int] = (),
        endpoint: Literal["argmax", "draw"] = "argmax",
    ) -> MaskedTextKernel:
        """A checkpoint of transformers, on the hub or in a folder, with its tokenizer.

        Args:
            checkpoint: anything that AutoModelForMaskedLM reads, or LLaDA, Dream or MDLM.
            length, num_steps: as in `MaskedTextKernel`.
            mask: number of the mask token; None is the checkpoint's where it says one.
            noise, schedule, reveal, temperature, top_p, guidance_scale, forbid, endpoint: as in `MaskedTextKernel`.
            trust_remote_code: run code that comes with the checkpoint.
            tokenizer: of another checkpoint, where this one has none, such as "gpt2" for MDLM.
            chat: see `Words`.
            device: None is a GPU where there is one.
            dtype: of the weights; None is as they are stored.

        Raises:
            CheckpointError: absent, gated, incomplete, or no masked language model.
            ValueError: code of its own without consent, no mask token, a tokenizer of another model, a text longer than
                the network reads, or a setting out of range.
            ImportError: transformers is not installed.
        """
        from treesearch.backends.text.loading import load

        settings: dict[str, Any] = {
            "length": length, "num_steps": num_steps, "noise": noise, "schedule": schedule, "reveal": reveal,
            "temperature": temperature, "top_p": top_p, "guidance_scale": guidance_scale, "forbid": forbid,
            "endpoint": endpoint, "device": as_device(device),
        }  # fmt: skip
        masked = noise != "uniform"
        cls(
            torch.nn.Identity(), **settings | ({"mask": 0} if masked else {"vocabulary": sys.maxsize})
        )  # before weights
        found = load(
            checkpoint, length, trust_remote_code=trust_remote_code, tokenizer=tokenizer, chat=chat, dtype=dtype
        )
        settings |= {"words": found.words, "asked": found.asked, "name": found.name, "vocabulary": found.vocabulary}
        own = found.mask if mask is None else mask
        if masked and own is None:
            raise ValueError(f"{checkpoint} says no mask token: give its number, mask=...")
        return cls(found.network, mask=own if masked else None, **settings)

    @property
    def masked(self) -> bool:
        return self.corruption.noise == "masked"

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def stochastic(self) -> tuple[bool, ...]:
        return (not self.masked, *[True] * self.num_steps)

    @property
    def rows_per_nfe(self) -> int:
        return 1 if self.guidance_scale == 1 else 2

    @property
    def network(self) -> nn.Module | None:
        """The module that a step calls; None where that is a function."""
        return self.model if isinstance(self.model, nn.Module) else None

    @property
    def writes(self) -> bool:
        """Whether its samples are texts."""
        return self.words is not None

    @property
    def departs(self) -> str | None:
        """Why its chain is another law than masked diffusion's."""
        said = [DEPARTS_TOP_P] if self.top_p < 1 else []
        said += [reveals.DEPARTS[self.reveal]] if self.reveal in reveals.DEPARTS else []
        return "; ".join(said) or None

    @property
    def base_law(self) -> str | None:
        """Whose law p is where tokens are not drawn as the network says."""
        said = [f"at temperature {self.temperature:g}"] if self.temperature != 1 else []
        said += [f"without {len(self.forbid)} tokens that are never drawn"] if self.forbid else []
        return f"the network {', '.join(said)}" if said else None

    def to(self, device: str | torch.device) -> MaskedTextKernel:
        """The same kernel, moved to a device."""
        self.device = torch.device(device)
        if isinstance(self.model, nn.Module):
            self.model.to(self.device)
        return self

    def memory_plan(self, batch_size: int, *, prompts: Sequence[Any] = (), backward: bool = False) -> Any:
        """What a search takes on this kernel's device, a `memory.TextPlan` in bytes, by shapes alone."""
        from treesearch.backends.text import memory

        return memory.plan(self, batch_size)

    def with_settings(self, **settings: Any) -> MaskedTextKernel:
        """The same network with other arguments, such as `reveal`, `num_steps` or `temperature`.

        Raises:
            ValueError: an unknown one, or one out of range.
        """
        own = [name for name in inspect.signature(MaskedTextKernel).parameters if name != "network"]
        if unknown := set(settings) - set(own):
            raise ValueError(f"unknown settings {', '.join(sorted(unknown))}: choose {', '.join(own)}")
        given = {name: self.corruption.noise if name == "noise" else getattr(self, name) for name in own}
        return MaskedTextKernel(self.model, **given | settings)

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        """x_T (n, L): masks, or any tokens, where nothing is known."""
        self._quiet.look()
        if self.masked:
            x = torch.full((len(noise), self.length), self.mask or 0, device=self.device)
        else:
            size = self.vocabulary or 0
            x = (uniform(noise.to(self.device)) * size).long().clamp(max=size - 1)
        known = self._known(cond)
        return x if known is None else torch.where(known == FREE, x, known)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tokens:
        """The law of x_{t-1}, with logits of the positions that are not known yet."""
        known = self._known(cond)
        free = x == self.mask if self.masked else torch.ones_like(x, dtype=torch.bool)
        if known is not None:
            free &= known == FREE
        row, column = free.nonzero(as_tuple=True)
        with self._quiet, torch.no_grad():
            logits = self._logits(x, t, self._hidden(cond, known), free)
        endpoint = x.clone()
        endpoint[row, column] = logits.argmax(-1)
        everything = logits
        if self.top_p < 1:
            logits = reveals.nucleus(logits, self.top_p, self.temperature)
        at = torch.full_like(x, NOWHERE)
        at[row, column] = torch.arange(len(row), device=x.device)
        if self.reveal != "random":  # by all that the network says, not by what is drawn
            jump, spread = reveals.first(self.reveal, everything, row, column, t).double(), None
        else:
            jump, spread = self._moves(x, t, logits, row, column)
        law = Tokens(x, at, logits, jump, endpoint, spread, self.temperature)
        return (
            law if self.endpoint == "argmax" else replace(law, endpoint=law.endpoints(level_normals(t, (self.length,))))
        )

    def _moves(self, x: Tensor, t: Tensor, logits: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities of free positions to leave x_t by the network, and to anywhere."""
        if self.masked:
            return self.corruption.reveal(t[row]), None
        now = logits.gather(-1, x[row, column][:, None])[:, 0].double() / self.temperature
        p_now = (now - log_norm(logits, self.temperature)).exp()
        return self.corruption.moves(t[row], p_now, logits.shape[-1])

    def _hidden(self, cond: Cond, known: Tensor | None) -> Tensor | None:
        """What guidance hides from ∅, (n, L) bool."""
        hidden = None if cond is None else cond.get(PROMPTED)
        return hidden if hidden is not None or known is None else known != FREE

    def _logits(self, x: Tensor, t: Tensor, hidden: Tensor | None, free: Tensor) -> Tensor:
        """Logits (m, V) of the free positions, -inf for what is never drawn."""
        if self.guidance_scale == 1:
            logits = self._called(x, t)[free]
        else:
            if hidden is None:
                raise ValueError(
                    f"guidance_scale={self.guidance_scale:g} guides by prompts: give prompts, or leave it out"
                )
            absent = torch.where(hidden, self.mask or 0, x)
            absent, given = self._called(torch.cat([absent, x]), torch.cat([t, t])).chunk(2)
            logits = extrapolated(absent[free], given[free], self.guidance_scale)
        logits[:, self._never(logits.shape[-1])] = -torch.inf
        return logits

    def _called(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits (n, L, V) of the network."""
        logits = self.asked.logits(self.model, x, t, self.corruption)
        if not self.masked and logits.shape[2] != self.vocabulary:
            raise ValueError(f"the network returned logits of {logits.shape[2]} tokens, the vocabulary of the noise is "
                             f"{self.vocabulary}")  # fmt: skip
        return logits

    def _known(self, cond: Cond) -> Tensor | None:
        return None if cond is None or KNOWN not in cond else cond[KNOWN].to(self.device)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Known tokens (n, L): each prompt at the beginning.

        Raises:
            TypeError, ValueError: a prompt that is no text (no tokens, without `words`), or does not fit.
        """
        known = torch.full((len(prompts), self.length), FREE, device="cpu")
        for row, prompt in zip(known, prompts, strict=True):
            tokens = self.tokens(prompt)
            if len(tokens) >= self.length:
                raise ValueError(f"a prompt of {len(tokens)} tokens leaves no room in length={self.length}: shorten "
                                 "it, or take a greater length")  # fmt: skip
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        return {KNOWN: known.to(self.device)}

    def tokens(self, text: Any) -> list[int]:
        """Tokens of a text; without `words` it is a sequence of them.

        Raises:
            TypeError, ValueError: neither.
        """
        if self.words is not None:
            return self._unmasked(self.words.ids(text), text)
        given = isinstance(text, Sequence) and not isinstance(text, str)
        if not given or not all(is_whole(token, 0) and token != self.mask for token in text):
            raise TypeError(f"a prompt is {text!r}: without words= it is a sequence of tokens, the mask not among them")
        if self.vocabulary is not None and max(text, default=0) >= self.vocabulary:
            raise ValueError(f"a prompt has token {max(text)}, the network knows {self.vocabulary}, numbered from 0")
        return [int(token) for token in text]

    def plain(self, text: str) -> list[int]:
        """Tokens of a text that stands in a state as it is, without marks around it.

        Raises:
            ValueError: no text that the tokenizer has tokens for, no `words`, or the mask is in it.
        """
        if self.words is None:
            raise ValueError("this kernel has no words: give words=")
        return self._unmasked(self.words.plain(text), text)

    def _unmasked(self, tokens: list[int], text: str) -> list[int]:
        if self.mask in tokens:
            raise ValueError(f"the mask token stands in {text!r}, where it would never be drawn: leave it out")
        return tokens

    def decode(self, x0: Tensor) -> Any:
        """Texts, a list of n; without `words` the tokens (n, L)."""
        return x0 if self.words is None else self.words.texts(x0)

    @property
    def fingerprint(self) -> str | None:
        """Hash of the network as it is now and all settings; None for a network that cannot be read."""
        if not isinstance(self.model, nn.Module):
            return None
        told = [self.corruption, self.asked, self.length, self.mask, self.vocabulary, self.reveal, self.temperature]
        told += [self.top_p, self.guidance_scale, self.forbid, self.endpoint, self._vocabulary()]
        found = fingerprint.of([self.name, self.model, *told])
        return None if found is None else f"{self.name}:{found}"

    def _vocabulary(self) -> Any:
        """What tells its words from others."""
        return None if self.words is None else [self.words.chat, sorted(self.words.tokenizer.get_vocab().items())]


def _numbers(tokens: Iterable[int]) -> tuple[int, ...]:
    """Tokens that are never drawn, by number.

    Raises:
        ValueError: something else.
    """
    found = tuple(tokens) if isinstance(tokens, Iterable) else None
    if found is None or not all(is_whole(token, 0) for token in found):
        raise ValueError(f"forbid is {found or tokens!r}, expected numbers of tokens, such as [0, 17]")
    return found
