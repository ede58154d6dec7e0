"""A vision-language model (or one of language, of texts) as judge, behind any endpoint with the chat format of OpenAI.

    r(x, c) = the number in the judge's answer to a rubric about image or text x and prompt c, from low to high
    r(x, c) = Σ_k p(k) k / Σ_k p(k)  over the digits k = low..high as first token          (expected=True)

One request a sample; an image travels as a data URL. The first form asks once more when the answer holds no number.
The second is finer than whole numbers and steadier, where the endpoint tells log-probabilities.

Source of the second: G-Eval: NLG Evaluation using GPT-4 with Better Human Alignment (Liu et al., 2023), eq. 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.numeric import is_number
from treesearch.rewards.remote.endpoint import MAX_BYTES, SENT, Ask, Endpoint, address
from treesearch.rewards.remote.http import are_texts, base64_pngs, check_pairs
from treesearch.rewards.remote.verdict import read_number

RUBRIC = """You grade images that were made from a prompt.
Prompt: {prompt}
How well does the image show what the prompt asks for, and how good is it as a picture? Objects, their number, \
colours, places and readable text count, and so do flaws such as extra limbs or blur.
Answer with one number from {low} (unusable) to {high} (flawless) on the last line, and nothing else on that line."""

TEXT_RUBRIC = """You grade texts that were written to a prompt; the text follows in a part of its own.
Prompt: {prompt}
How well does the text do what the prompt asks for, and how good is it as a text? Sense, grammar and style count.
Answer with one number from {low} (unusable) to {high} (flawless) on the last line, and nothing else on that line."""

_DIGIT_MASS = 0.5  # a judge that puts less on digits is not answering with one


@facts(
    range="low..high, 0..10 unless told otherwise",
    differentiable=False,
    prompts=True,
    checkpoint="behind the endpoint",
    licence="the judge's",
    memory="none here",
    limits=SENT,
    source="G-Eval (Liu et al., 2023) for expected=True",
)
def VLMJudge(
    url: str | None = None,
    model: str = "",
    *,
    url_env: str | None = None,
    rubric: str | None = None,
    low: float = 0,
    high: float = 10,
    expected: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
    token_env: str | None = None,
    token_header: str = "Authorization",
    timeout: float = 120.0,
    retries: int = 4,
    backoff: float = 0.5,
    max_pause: float = 60.0,
    concurrency: int = 8,
    max_bytes: int = MAX_BYTES,
) -> Reward:
    """r = the mark that a vision-language model gives an image; not the same twice on most endpoints, so wrap it
    in `cached()` and a search sees one mark a sample.

    Args:
        url: base of the API, such as http://localhost:8000/v1; requests go to /chat/completions below it.
        model: name of the model there.
        url_env: name of an environment variable that holds the URL instead, for one with a key in its path or query.
        rubric: what the judge is told; {prompt}, {low} and {high} are filled in. None is RUBRIC of images and
            TEXT_RUBRIC of texts, which are sent as a part of their own.
        low, high: ends of the scale; an answer outside counts as none. With `expected`, whole numbers within 0..9.
        expected: score by the mean over the digits of the first token instead of reading the text.
        options: more fields of the request; they replace `temperature` (0) and `max_tokens`, None leaves a field out.
        token_env, token_header, timeout, retries, backoff, max_pause, concurrency, max_bytes: see `Endpoint`.

    Raises:
        ValueError: an argument out of range, credentials in the URL, no URL or no model.
    """
    if not model:
        raise ValueError("got no model: give the name that the endpoint knows it by")
    if not (is_number(low) and is_number(high) and low < high):
        raise ValueError(f"expected low < high, got {low!r} and {high!r}")
    if expected and (low not in range(10) or high not in range(10)):
        raise ValueError(f"expected=True reads one digit: give low and high within 0..9, got {low} and {high}")
    defaults = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    fields = (defaults if expected else {"temperature": 0, "max_tokens": 512}) | dict(options)
    endpoint = Endpoint(
        url=_completions(address(url, url_env)),
        token_env=token_env,
        token_header=token_header,
        timeout=timeout,
        retries=retries,
        backoff=backoff,
        max_pause=max_pause,
        concurrency=concurrency,
        max_bytes=max_bytes,
    )
    request = {"model": model} | {name: value for name, value in fields.items() if value is not None}
    return Reward(_Judge(endpoint, request, rubric, low, high, expected), f"judge({model})")


@dataclass(frozen=True)
class _Judge:
    """One conversation a sample."""

    endpoint: Endpoint
    request: dict[str, Any]
    rubric: str | None
    low: float
    high: float
    expected: bool

    def __call__(self, samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        check_pairs(samples, prompts)
        rubric = self.rubric or (TEXT_RUBRIC if are_texts(samples) else RUBRIC)
        if prompts is None and "{prompt}" in rubric:
            raise ValueError("the rubric names {prompt}, got no prompts: give prompts, or a rubric without it")

        def score(ask: Ask, rows: Sequence[int]) -> float:
            (row,) = rows
            messages = [self._question(rubric, samples[row : row + 1], "" if prompts is None else str(prompts[row]))]
            return self._digits(ask, messages) if self.expected else self._number(ask, messages)

        return torch.tensor(
            self.endpoint.map(score, [[i] for i in range(len(samples))]), dtype=torch.float64, device="cpu"
        )

    def _question(self, rubric: str, sample: Any, prompt: str) -> dict[str, Any]:
        told = rubric.replace("{low}", f"{self.low:g}").replace("{high}", f"{self.high:g}")
        return {"role": "user", "content": [{"type": "text", "text": told.replace("{prompt}", prompt)}, _part(sample)]}

    def _number(self, ask: Ask, messages: list[dict[str, Any]]) -> float:
        """The number in the answer, or in a second answer where the first has none.

        Raises:
            RewardError: neither has one on the scale.
        """
        answer = ""
        for _ in range(2):
            choice = self._choice(ask, messages)
            answer = _text(choice["message"].get("content"))
            cut = choice.get("finish_reason") == "length"  # "Score: 1" may be the beginning of a 10
            found = None if cut else read_number(answer, self.high)
            if found is not None and self.low <= found <= self.high:
                return found
            reminder = f"Answer with one number from {self.low:g} to {self.high:g} and nothing else."
            said = {"role": "assistant", "content": answer}
            messages = [*messages, said, {"role": "user", "content": reminder}]
        scale = f"one number from {self.low:g} to {self.high:g}"
        raise self.endpoint.error(f"was asked twice for {scale}, answered {self.endpoint.quote(answer)}")

    def _digits(self, ask: Ask, messages: list[dict[str, Any]]) -> float:
        """Mean of the digits of the scale under the probabilities of the first token.

        Raises:
            RewardError: no log-probabilities came, or the judge does not answer with a digit.
        """
        choice = self._choice(ask, messages)
        try:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            found = [(t["token"].strip(), math.exp(t["logprob"])) for t in tokens]
        except (KeyError, IndexError, TypeError, AttributeError):
            what = f"answered no log-probabilities, got {self.endpoint.quote(choice)}: use expected=False"
            raise self.endpoint.error(what) from None
        scale = {str(k): k for k in range(int(self.low), int(self.high) + 1)}
        marks = [(scale[token], p) for token, p in found if token in scale]
        mass = sum(p for _, p in marks)
        if mass < _DIGIT_MASS:
            text = f"puts probability {mass:.2g} on the digits {self.low:g}..{self.high:g}, expected {_DIGIT_MASS}"
            hint = "ask for one digit alone in the rubric, or use expected=False"
            raise self.endpoint.error(f"{text} or more: {hint}; got {self.endpoint.quote(choice)}")
        return sum(mark * p for mark, p in marks) / mass

    def _choice(self, ask: Ask, messages: list[dict[str, Any]]) -> dict[str, Any]:
        answer = ask(self.request | {"messages": messages})
        try:
            choice = answer["choices"][0]
            choice["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError):
            what = f"answered no chat completion, got {self.endpoint.quote(answer)}: check the url"
            raise self.endpoint.error(what) from None
        return choice


def _completions(url: str) -> str:
    """The address of chat completions below the base of an API; a query stays at its end."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/chat/completions"))


def _part(sample: Any) -> dict[str, Any]:
    """One sample as a part of a message."""
    if are_texts(sample):
        return {"type": "text", "text": sample[0]}
    (image,) = base64_pngs(sample)
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}


def _text(content: Any) -> str:
    """The text of a message, which some write as a list of parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))
