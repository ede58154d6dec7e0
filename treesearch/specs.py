"""Kernels, rewards and methods by name, for the command line and saved runs.

    mnist                      a registered name
    mnist(num_steps=50)        with settings
    ./mine.py:make(eta=0.5)    an attribute of a file or of a package, called if settings follow or if it is a factory
    2*digit(8) + compressibility().clip(-3, 0)      rewards have an algebra

Expressions hold names of the registry, literals, + - *, and the methods of `Reward`; nothing else is evaluated.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treesearch.errors import TreeSearchError, unknown
from treesearch.methods import METHODS

KERNELS = {
    "mnist": "backends.mnist:mnist_kernel",
    "diffusers": "backends.pipelines:DiffusersKernel.from_pretrained",
    "tds": "backends.guidance:TDS",
    "das": "backends.guidance:DAS",
    "dps": "backends.guidance:DPS",
    "trust_region": "backends.guidance:TrustRegion",
    "maze": "backends.trajectory:maze_kernel",
    "trajectories": "backends.trajectory:trajectory_kernel",
    "diffuser": "backends.guidance:Diffuser",
    "guidance_scales": "backends.guidance:GuidanceScales",
    "policy_guided": "backends.guidance:PolicyGuided",
    "gaussian": "backends.gaussian:LinearGaussian",
    "ring": "backends.gaussian:GaussianMixture.ring",
    "discrete": "backends.enumerable:DiscreteChain.random",
    "masked": "backends.enumerable:MaskedChain.random",
}
REWARDS = {
    "digit": "rewards.classifier:log_prob",
    "digits": "rewards.classifier:log_prob_any",
    "even": "rewards.classifier:even",
    "odd": "rewards.classifier:odd",
    "compressibility": "rewards.image:compressibility",
    "incompressibility": "rewards.image:incompressibility",
    "brightness": "rewards.image:brightness",
    "image_reward": "rewards.image_reward:ImageReward",
    "clip_score": "rewards.clip_score:CLIPScore",
    "pickscore": "rewards.pickscore:PickScore",
    "hps": "rewards.hps:HPSv2",
    "aesthetic": "rewards.aesthetic:Aesthetic",
    "image_classifier": "rewards.image_classifier:ImageClassifier",
    "vlm_judge": "rewards.judge:VLMJudge",
    "http": "rewards.remote:HTTPReward",
    "linear": "rewards.analytic:linear",
    "quadratic": "rewards.analytic:quadratic",
    "constant": "rewards.analytic:constant",
    "discounted_return": "rewards.trajectory:discounted_return",
    "goal_reaching": "rewards.trajectory:goal_reaching",
    "smoothness": "rewards.trajectory:smoothness",
    "action_bounds": "rewards.trajectory:action_bounds",
    "novelty": "rewards.trajectory:novelty",
    "wall_collision": "rewards.maze:wall_collision",
    "maze_plan": "rewards.maze:maze_plan",
    "maze_execution": "rewards.execution:maze_execution",
    "dynamics_consistency": "rewards.dynamics:dynamics_consistency",
    "policy_likelihood": "rewards.policy:PolicyLikelihood",
    "critic": "rewards.critic:Critic",
    "normalise": "rewards.compose:normalise",
    "cached": "rewards.compose:cached",
    "frames": "rewards.vision:frames",
}
METHOD_NAMES = {
    "best_of_n": "BestOfN",
    "rejection": "Rejection",
    "fk": "FeynmanKac",
    "dts": "DiffusionTreeSampling",
    "dts_star": "DiffusionTreeSearch",
    "tree_sampling": "TreeSampling",
    "tree_search": "TreeSearch",
    "beam": "BeamSearch",
    "svdd": "SVDD",
    "lookahead_beam": "LookaheadBeam",
    "mcts": "MCTS",
    "depth_first": "DepthFirst",
    "rollover": "RolloverBudget",
    "noise_search": "NoiseSearch",
}
_REWARD_METHODS = ("min", "clip", "gate")
_PLUGIN = re.compile(r"^\s*([^()\s]+\.py|[A-Za-z_][\w.]*):([A-Za-z_][\w.]*)\s*(\(.*\))?\s*$", re.DOTALL)
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
}


@dataclass(frozen=True)
class Recipe:
    """How to make a kernel or a reward where it is needed: each worker builds its own, with weights from its own disk.

    Args:
        what: an expression, as on the command line, or a factory that can be imported.
        settings: keyword arguments of the factory; one named `device` is filled in by the worker.
    """

    what: str | Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.what, str) and self.settings:
            raise TypeError(
                f"Recipe({self.what!r}, ...): write the settings of an expression into it, as name(eta=1.0)"
            )
        if not isinstance(self.what, str) and not callable(self.what):
            raise TypeError(f"Recipe({self.what!r}): expected an expression or a factory")
        if isinstance(self.what, str) and (plugin := _PLUGIN.match(self.what)) and plugin[1].endswith(".py"):
            object.__setattr__(self, "what", self.what.replace(plugin[1], str(Path(plugin[1]).resolve()), 1))

    def kernel(self, device: str | None = None) -> Any:
        """The kernel, on a device if one is named."""
        return place(kernel(self.what) if isinstance(self.what, str) else self._call(device), device)

    def reward(self, device: str | None = None) -> Any:
        """The reward."""
        return reward(self.what) if isinstance(self.what, str) else self._call(device)

    def _call(self, device: str | None) -> Any:
        assert callable(self.what)
        settings = dict(self.settings)
        if device is not None and "device" in inspect.signature(self.what).parameters:
            settings.setdefault("device", device)
        return self.what(**settings)


def place(kernel: Any, device: str | None) -> Any:
    """A kernel on a device; one without `to` stays where it is."""
    return kernel.to(device) if device is not None and hasattr(kernel, "to") else kernel


class SpecError(TreeSearchError, ValueError):
    """A name or an expression that cannot be read."""


class UnknownName(SpecError):
    """A name that is not registered."""

    def __init__(self, what: str, name: str, names: Mapping[str, Any]) -> None:
        super().__init__(unknown(what, name, names))
        self.name = name


def kernel(spec: str) -> Any:
    """The kernel that an expression names."""
    try:
        return _build(
            spec, "kernel", {name: _lazy(path) for name, path in (REWARDS | KERNELS).items()}
        )  # guides take both
    except UnknownName as error:
        raise SpecError(unknown("kernel", error.name, KERNELS)) from None


def reward(spec: str) -> Any:
    """The reward that an expression names."""
    return _build(spec, "reward", {name: _lazy(path) for name, path in REWARDS.items()})


def method(spec: str) -> Any:
    """The method that an expression names, such as fk(num_particles=8)."""
    short = {name: METHODS[path] for name, path in METHOD_NAMES.items()}
    return _build(spec.replace("-", "_"), "method", short | METHODS)


def load(path: str) -> Any:
    """The attribute `package.module:attr` or `./file.py:attr`.

    Raises:
        SpecError: no such file, module or attribute.
    """
    where, _, attributes = path.partition(":")
    try:
        found = _file(where) if where.endswith(".py") else importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise SpecError(f"cannot load {path!r}: {error}") from error
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise SpecError(unknown(f"attribute of {where}", name, [n for n in dir(found) if n[0] != "_"]))
        found = getattr(found, name)
    return found


def _lazy(path: str) -> Callable[..., Any]:
    return lambda *args, **settings: load(path)(*args, **settings)


def _file(where: str) -> Any:
    file = Path(where).resolve()
    if not file.is_file():
        raise SpecError(f"cannot load {where!r}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise SpecError(f"cannot load {where!r}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _build(spec: str, what: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    if plugin := _PLUGIN.match(spec):
        found = load(f"{plugin[1]}:{plugin[2]}")
        if plugin[3] is None:
            is_factory = isinstance(found, type) or (what == "kernel" and not hasattr(found, "transition"))
            return found() if is_factory else found
        names, spec = {"plugin": found}, f"plugin{plugin[3]}"
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
    except SyntaxError as error:
        hint = (
            f': write diffusers("{spec}", num_steps=50)' if what == "kernel" and "/" in spec and "(" not in spec else ""
        )
        raise SpecError(f"cannot read the {what} {spec!r}: {error.msg}{hint}") from error
    value = _evaluate(tree, what, names)
    return value() if isinstance(tree, ast.Name) and callable(value) and tree.id in names else value


def _evaluate(node: ast.expr, what: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        sides = (_evaluate(side, what, names) for side in (node.left, node.right))
        return _OPERATORS[type(node.op)](*(s() if _bare(s, names) else s for s in sides))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        return -_evaluate(node.operand, what, names)
    if isinstance(node, ast.Call):
        return _call(node, what, names)
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise UnknownName(what, node.id, names)
        return names[node.id]
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise SpecError(
            f"cannot read {ast.unparse(node)!r} in a {what}: names, numbers, + - * and calls only"
        ) from error


def _call(node: ast.Call, what: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node.func, ast.Attribute):
        if node.func.attr not in _REWARD_METHODS:
            raise SpecError(unknown(f"operation of a {what}", node.func.attr, _REWARD_METHODS))
        owner = _evaluate(node.func.value, what, names)
        function = getattr(owner() if _bare(owner, names) else owner, node.func.attr)
    elif isinstance(node.func, ast.Name):
        function = _evaluate(node.func, what, names)
    else:
        raise SpecError(f"cannot call {ast.unparse(node.func)!r} in a {what}")
    args = [_evaluate(a, what, names) for a in node.args]
    args = [a() if _bare(a, names) else a for a in args]
    settings = {k.arg: _evaluate(k.value, what, names) for k in node.keywords if k.arg}
    try:
        return function(*args, **settings)
    except TypeError as error:
        raise SpecError(f"{ast.unparse(node)}: {error}") from error


def _bare(value: Any, names: Mapping[str, Callable[..., Any]]) -> bool:
    """Whether it is a registered factory that was named without being called."""
    return any(value is factory for factory in names.values())
