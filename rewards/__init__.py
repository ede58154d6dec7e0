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
    from rewards.channels import Channels, known
    from rewards.classifier import even, log_prob, log_prob_any, odd
    from rewards.clip_score import CLIPScore
    from rewards.compose import cached, normalise
    from rewards.critic import Critic
    from rewards.dynamics import PointMass, dynamics_consistency
    from rewards.execution import maze_execution
    from rewards.hps import HPSv2
    from rewards.image import brightness, compressibility, contrast, incompressibility, ink
    from rewards.image_classifier import ImageClassifier
    from rewards.image_reward import ImageReward
    from rewards.judge import VLMJudge
    from rewards.maze import MAZES, Maze, Unreachable, maze_plan, wall_collision
    from rewards.pickscore import PickScore
    from rewards.policy import PolicyLikelihood
    from rewards.remote import HTTPReward
    from rewards.trajectory import action_bounds, discounted_return, goal_reaching, novelty, smoothness
    from rewards.vision import frames, release

_MODULES = {
    "aesthetic": ("Aesthetic",),
    "base": ("Reward", "RewardError", "as_reward"),
    "channels": ("Channels", "known"),
    "classifier": ("even", "log_prob", "log_prob_any", "odd"),
    "clip_score": ("CLIPScore",),
    "compose": ("cached", "normalise"),
    "critic": ("Critic",),
    "dynamics": ("PointMass", "dynamics_consistency"),
    "execution": ("maze_execution",),
    "hps": ("HPSv2",),
    "image": ("brightness", "compressibility", "contrast", "incompressibility", "ink"),
    "image_classifier": ("ImageClassifier",),
    "image_reward": ("ImageReward",),
    "judge": ("VLMJudge",),
    "maze": ("MAZES", "Maze", "Unreachable", "maze_plan", "wall_collision"),
    "pickscore": ("PickScore",),
    "policy": ("PolicyLikelihood",),
    "remote": ("HTTPReward",),
    "trajectory": ("action_bounds", "discounted_return", "goal_reaching", "novelty", "smoothness"),
    "vision": ("frames", "release"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MAZES",
    "OWNER",
    "Aesthetic",
    "CLIPScore",
    "Channels",
    "Critic",
    "HPSv2",
    "HTTPReward",
    "ImageClassifier",
    "ImageReward",
    "Maze",
    "PickScore",
    "PointMass",
    "PolicyLikelihood",
    "Reward",
    "RewardError",
    "Unreachable",
    "VLMJudge",
    "action_bounds",
    "as_reward",
    "brightness",
    "cached",
    "compressibility",
    "contrast",
    "discounted_return",
    "dynamics_consistency",
    "even",
    "frames",
    "goal_reaching",
    "incompressibility",
    "ink",
    "known",
    "log_prob",
    "log_prob_any",
    "maze_execution",
    "maze_plan",
    "normalise",
    "novelty",
    "odd",
    "release",
    "smoothness",
    "wall_collision",
]


def __getattr__(name: str) -> Any:
    """A reward's module is imported when the reward is asked for."""
    import importlib

    if name not in _WHERE:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rewards.{_WHERE[name]}"), name)
