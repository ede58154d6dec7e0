"""Rewards: what scores samples.

from rewards import Aesthetic, CLIPScore, ImageReward
reward = ImageReward() + 0.1 * CLIPScore().clip(0, 2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

OWNER = "treesearch"

if TYPE_CHECKING:
    from rewards.aesthetic import Aesthetic
    from rewards.base import Reward, RewardError, as_reward
    from rewards.classifier import even, log_prob, log_prob_any, odd
    from rewards.clip_score import CLIPScore
    from rewards.compose import cached, normalise
    from rewards.hps import HPSv2
    from rewards.image import brightness, compressibility, contrast, incompressibility, ink
    from rewards.image_classifier import ImageClassifier
    from rewards.image_reward import ImageReward
    from rewards.judge import VLMJudge
    from rewards.pickscore import PickScore
    from rewards.remote import HTTPReward
    from rewards.vision import frames, release

_MODULES = {
    "aesthetic": ("Aesthetic",),
    "base": ("Reward", "RewardError", "as_reward"),
    "classifier": ("even", "log_prob", "log_prob_any", "odd"),
    "clip_score": ("CLIPScore",),
    "compose": ("cached", "normalise"),
    "hps": ("HPSv2",),
    "image": ("brightness", "compressibility", "contrast", "incompressibility", "ink"),
    "image_classifier": ("ImageClassifier",),
    "image_reward": ("ImageReward",),
    "judge": ("VLMJudge",),
    "pickscore": ("PickScore",),
    "remote": ("HTTPReward",),
    "vision": ("frames", "release"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "OWNER",
    "Aesthetic",
    "CLIPScore",
    "HPSv2",
    "HTTPReward",
    "ImageClassifier",
    "ImageReward",
    "PickScore",
    "Reward",
    "RewardError",
    "VLMJudge",
    "as_reward",
    "brightness",
    "cached",
    "compressibility",
    "contrast",
    "even",
    "frames",
    "incompressibility",
    "ink",
    "log_prob",
    "log_prob_any",
    "normalise",
    "odd",
    "release",
]


def __getattr__(name: str) -> Any:
    """A reward's module is imported when the reward is asked for."""
    import importlib

    if name not in _WHERE:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rewards.{_WHERE[name]}"), name)
