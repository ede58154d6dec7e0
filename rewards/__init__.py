"""Rewards: what scores samples.

    from treesearch.rewards import brightness, clip_score, digit
    reward = digit(8) + 10 * brightness()

A reward has one name, here, on the command line and in run folders: its line of `REWARDS` is all that makes it known.
Classes have their own names beside it: `clip_score` is `CLIPScore`. Each is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

if __name__ != "treesearch.rewards":
    raise ImportError("import treesearch.rewards: the folder has one name, whether installed or not")

REWARDS = {  # name: where it lies, and an example
    "digit": ("images.classifier:digit", "digit(8)"),
    "digits": ("images.classifier:digits", "digits([3, 8])"),
    "even": ("images.classifier:even", "even()"),
    "odd": ("images.classifier:odd", "odd()"),
    "compressibility": ("images.image:compressibility", "compressibility()"),
    "incompressibility": ("images.image:incompressibility", "incompressibility()"),
    "brightness": ("images.image:brightness", "brightness(target=0.2)"),
    "contrast": ("images.image:contrast", "contrast()"),
    "ink": ("images.image:ink", "ink(threshold=0.5)"),
    "background": ("images.fidelity:background", "background('photo.png', 'mask.png')"),
    "image_reward": ("images.image_reward:ImageReward", "image_reward()"),
    "clip_score": ("images.clip_score:CLIPScore", "clip_score()"),
    "pickscore": ("images.pickscore:PickScore", "pickscore()"),
    "hps": ("images.hps:HPSv2", "hps()"),
    "aesthetic": ("images.aesthetic:Aesthetic", "aesthetic()"),
    "image_classifier": ("images.image_classifier:ImageClassifier", "image_classifier('./classifier', 'tabby cat')"),
    "perplexity": ("text.perplexity:perplexity", "perplexity('./gpt2')"),
    "text_classifier": ("text.classifier:text_classifier", "text_classifier('./classifier', 'positive')"),
    "acceptability": ("text.classifier:acceptability", "acceptability()"),
    "sentiment": ("text.classifier:sentiment", "sentiment()"),
    "toxicity": ("text.classifier:toxicity", "toxicity('neutral')"),
    "ngrams": ("text.ngrams:ngrams", "ngrams('text_sentiment.safetensors', 'positive')"),
    "lexicon": ("text.lexicon:lexicon", "lexicon('positive')"),
    "text_length": ("text.patterns:text_length", "text_length(12)"),
    "matches": ("text.patterns:matches", "matches('[0-9]{4}')"),
    "json_schema": ("text.records:json_schema", "json_schema('./schema.json')"),
    "grounding": ("text.records:grounding", "grounding()"),
    "vlm_judge": ("remote.judge:VLMJudge", "vlm_judge(url_env='JUDGE_URL', model='judge')"),
    "http": ("remote.http:HTTPReward", "http(url_env='SCORER_URL')"),
    "measurement": ("observation:measurement", "measurement(pooled(4), 'observed.png', tolerance=0.2)"),
    "linear": ("analytic:linear", "linear(1.0)"),
    "quadratic": ("analytic:quadratic", "quadratic(k=1.0, y=0.5)"),
    "constant": ("analytic:constant", "constant(0.0)"),
    "discounted_return": ("trajectories.trajectory:discounted_return", "discounted_return((4, 2, 1))"),
    "goal_reaching": ("trajectories.trajectory:goal_reaching", "goal_reaching((4, 2), goal=(1.0, 1.0))"),
    "smoothness": ("trajectories.trajectory:smoothness", "smoothness((4, 2))"),
    "action_bounds": ("trajectories.trajectory:action_bounds", "action_bounds((4, 2), low=-1.0, high=1.0)"),
    "novelty": ("trajectories.trajectory:novelty", "novelty('./mine.py':plans, (4, 2))"),
    "wall_collision": ("trajectories.maze:wall_collision", "wall_collision('medium')"),
    "maze_plan": ("trajectories.maze:maze_plan", "maze_plan('medium')"),
    "maze_execution": ("trajectories.execution:maze_execution", "maze_execution('medium')"),
    "dynamics_consistency": ("trajectories.dynamics:dynamics_consistency", "dynamics_consistency((4, 2))"),
    "policy_likelihood": ("trajectories.policy:PolicyLikelihood", "policy_likelihood('./mine.py':policy, (4, 2))"),
    "critic": ("trajectories.critic:Critic", "critic('./mine.py':q, (4, 2))"),
    "normalise": ("compose:normalise", "normalise(digit(8), -5.0, 3.0)"),
    "cached": ("compose:cached", "cached(digit(8))"),
    "frames": ("images.video:frames", "frames(clip_score(), 'middle')"),
}
OPERATORS = {  # of measurements: where it lies, and an example
    "masked": ("observation:masked", "masked('mask.png')"),
    "pooled": ("observation:pooled", "pooled(4)"),
    "blurred": ("observation:blurred", "blurred(1.5)"),
    "grey": ("observation:grey", "grey()"),
    "frequencies": ("observation:frequencies", "frequencies('mask.png')"),
    "matrix": ("observation:matrix", "matrix('a.npy')"),
}
OTHERS = {  # what is no reward and has a name in Python only: where it lies
    "MAZES": "trajectories.maze",
    "Channels": "channels",
    "Headed": "headed",
    "LogProbability": "headed",
    "Maze": "trajectories.maze",
    "Operator": "observation",
    "PointMass": "trajectories.dynamics",
    "Reward": "base",
    "RewardError": "base",
    "Unreachable": "trajectories.maze",
    "as_reward": "base",
    "edges": "outlines",
    "known": "channels",
    "release": "loading",
    "silhouette": "outlines",
}


def _places() -> dict[str, tuple[str, str]]:
    """Module and attribute by name: registered ones, what they are called where they lie, and the others."""
    places = {name: (module, name) for name, module in OTHERS.items()}
    for name, (place, _) in (REWARDS | OPERATORS).items():
        module, _, attribute = place.partition(":")
        places |= {name: (module, attribute), attribute: (module, attribute)}
    return places


_PLACES = _places()
__all__ = sorted(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]  # made from the table


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'treesearch.rewards' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(f"treesearch.rewards.{module}"), attribute)


def __dir__() -> list[str]:
    return [*__all__, "OPERATORS", "REWARDS"]
