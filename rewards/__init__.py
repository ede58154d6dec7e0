"""Rewards: what scores samples.

from treesearch.rewards import Aesthetic, CLIPScore, ImageReward
reward = ImageReward() + 0.1 * CLIPScore().clip(0, 2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "treesearch.rewards":
    raise ImportError("import treesearch.rewards: the folder has one name, whether installed or not")

if TYPE_CHECKING:
    from treesearch.rewards.base import Reward, RewardError, as_reward
    from treesearch.rewards.channels import Channels, known
    from treesearch.rewards.compose import cached, normalise
    from treesearch.rewards.images.aesthetic import Aesthetic
    from treesearch.rewards.images.classifier import even, log_prob, log_prob_any, odd
    from treesearch.rewards.images.clip_score import CLIPScore
    from treesearch.rewards.images.hps import HPSv2
    from treesearch.rewards.images.image import brightness, compressibility, contrast, incompressibility, ink
    from treesearch.rewards.images.image_classifier import ImageClassifier
    from treesearch.rewards.images.image_reward import ImageReward
    from treesearch.rewards.images.pickscore import PickScore
    from treesearch.rewards.images.vision import frames, release
    from treesearch.rewards.remote.http import HTTPReward
    from treesearch.rewards.remote.judge import VLMJudge
    from treesearch.rewards.trajectories.critic import Critic
    from treesearch.rewards.trajectories.dynamics import PointMass, dynamics_consistency
    from treesearch.rewards.trajectories.execution import maze_execution
    from treesearch.rewards.trajectories.maze import MAZES, Maze, Unreachable, maze_plan, wall_collision
    from treesearch.rewards.trajectories.policy import PolicyLikelihood
    from treesearch.rewards.trajectories.trajectory import (
        action_bounds,
        discounted_return,
        goal_reaching,
        novelty,
        smoothness,
    )

_MODULES = {
    "images.aesthetic": ("Aesthetic",),
    "base": ("Reward", "RewardError", "as_reward"),
    "channels": ("Channels", "known"),
    "images.classifier": ("even", "log_prob", "log_prob_any", "odd"),
    "images.clip_score": ("CLIPScore",),
    "compose": ("cached", "normalise"),
    "trajectories.critic": ("Critic",),
    "trajectories.dynamics": ("PointMass", "dynamics_consistency"),
    "trajectories.execution": ("maze_execution",),
    "images.hps": ("HPSv2",),
    "images.image": ("brightness", "compressibility", "contrast", "incompressibility", "ink"),
    "images.image_classifier": ("ImageClassifier",),
    "images.image_reward": ("ImageReward",),
    "remote.judge": ("VLMJudge",),
    "trajectories.maze": ("MAZES", "Maze", "Unreachable", "maze_plan", "wall_collision"),
    "images.pickscore": ("PickScore",),
    "trajectories.policy": ("PolicyLikelihood",),
    "remote.http": ("HTTPReward",),
    "trajectories.trajectory": ("action_bounds", "discounted_return", "goal_reaching", "novelty", "smoothness"),
    "images.vision": ("frames", "release"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MAZES",
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
        raise AttributeError(f"module 'treesearch.rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"treesearch.rewards.{_WHERE[name]}"), name)
