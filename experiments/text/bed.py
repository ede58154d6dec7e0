"""The bed of the text experiments: the shipped model on short texts, rewards, judges that no search reads, attributes.

    fluency          mean log-probability of a token under a trigram model; its judge knows other sentences
    acceptability    log p(real | x) of the classifier that tells reviews from draws; its judge knows others of both
    sentiment        log p(positive | x) of the classifier of reviews; its judge knows others
    exclamation      1 where there is an exclamation mark      rare
    praise           VADER's score of a text; the attribute is a score of .9 or more      rare

States above t = 0 are scored by a draw of x_0: the most probable tokens of a half-masked text are no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.text import corpus
from experiments.text.trigrams import Trigrams, fluency
from treesearch.backends import small_text
from treesearch.rewards import lexicon, matches, ngrams
from treesearch.rewards.base import Reward

HIGH = 0.9  # of VADER's score
JUDGES = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True, kw_only=True)
class Bed:
    """What is searched, for what, and what judges it.

    Args:
        data: folder of rt-polarity.pos and rt-polarity.neg, for the trigrams.
        weights: of the model.
        length: L.
        num_steps: T.
        classifiers: folder of rewards and judges in place of the shipped ones.
    """

    data: Path
    weights: str = "text.safetensors"
    length: int = 32
    num_steps: int = 16
    classifiers: Path | None = None

    @cached_property
    def kernel(self) -> Any:
        return small_text(self.weights, num_steps=self.num_steps, length=self.length, endpoint="draw")

    @cached_property
    def _trigrams(self) -> tuple[Trigrams, Trigrams]:
        """Of every other sentence, and of the rest."""
        training, _ = corpus.split(corpus.reviews(self.data))
        words = self.kernel.words.tokenizer
        rows = [words(line)["input_ids"] for line in training]
        size = len(words.get_vocab())
        return Trigrams(rows[::2], size), Trigrams(rows[1::2], size)

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        """What is searched for."""
        return {
            "fluency": fluency(self._trigrams[0], self.kernel.words.tokenizer),
            "acceptability": self._classifier("text_acceptability", "real"),
            "sentiment": self._classifier("text_sentiment", "positive"),
            "exclamation": matches("!"),
            "praise": lexicon(),
        }

    @cached_property
    def judges(self) -> dict[str, Reward]:
        """What grades the samples, of each reward that has one."""
        return {
            "fluency": fluency(self._trigrams[1], self.kernel.words.tokenizer),
            "acceptability": self._classifier("text_acceptability_judge", "real", JUDGES),
            "sentiment": self._classifier("text_sentiment_judge", "positive", JUDGES),
        }

    def _classifier(self, name: str, label: str, shipped: Path | None = None) -> Reward:
        folder = self.classifiers or shipped
        return ngrams(f"{name}.safetensors" if folder is None else str(folder / f"{name}.safetensors"), label)

    def graded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What is measured of texts: perplexity's log, and shares as 0 or 1, (n,) each."""
        told = {name: judge(list(texts)) for name, judge in self.judges.items()}
        return {
            "nats": -told["fluency"],
            "acceptable": (told["acceptability"].exp() > 0.5).double(),
            "positive": (told["sentiment"].exp() > 0.5).double(),
            "exclamation": self.rewards["exclamation"](list(texts)),
            "praise": (self.rewards["praise"](list(texts)) >= HIGH).double(),
            "different": torch.tensor([len(set(text.split())) / max(len(text.split()), 1) for text in texts]).double(),
        }


@dataclass(frozen=True, kw_only=True)
class OnBed:
    """What every study on it is told."""

    data: Path
    """folder of rt-polarity.pos and rt-polarity.neg"""
    weights: str = "text.safetensors"
    """of the model"""
    classifiers: Path | None = None
    """folder of rewards and judges in place of the shipped ones"""
    length: int = 32
    """tokens of a text"""
    num_steps: int = 16
    """T"""

    def bed(self) -> Bed:
        """The model, its rewards and its judges."""
        how = {"length": self.length, "num_steps": self.num_steps, "classifiers": self.classifiers}
        return Bed(data=self.data, weights=self.weights, **how)
