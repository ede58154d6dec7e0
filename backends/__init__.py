"""Kernels: what denoises. Imported as `treesearch.backends`, in a checkout too.

    from treesearch.backends import mnist, tds
    kernel = tds(mnist(num_steps=50), reward)

A kernel or a guide has one name, here, on the command line and in run folders: its line of `KERNELS` is all that makes
it known. Each is imported when it is asked for.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

if __name__ != "treesearch.backends":
    raise ImportError("import treesearch.backends: the folder has one name, whether installed or not")

KERNELS = {  # name: where it lies, and an example; a guide is a kernel made of a kernel
    "mnist": ("models.mnist:mnist_kernel", "mnist(num_steps=50)"),
    "student": ("models.student:student", "student('mnist_student.safetensors', num_steps=2)"),
    "spd": ("models.shortest_path:shortest_path_kernel", "spd(num_steps=10)"),
    "multitask": ("models.multi_task:multi_task_kernel", "multitask(num_steps=25)"),
    "diffusers": (
        "pipelines:DiffusersKernel.from_pretrained",
        "diffusers('stable-diffusion-v1-5/stable-diffusion-v1-5', num_steps=50, eta=1.0)",
    ),
    "second_order": ("chains.second_order:SecondOrder", "second_order(mnist(num_steps=10), order=3)"),
    "heun": ("chains.heun:Heun", "heun(mnist(num_steps=10, eta=0.0))"),
    "bdia": ("roots.bdia:Bdia", "bdia(mnist(num_steps=50, eta=0.0), gamma=0.9)"),
    "teleport": ("exact.teleport:Teleport", "teleport(mnist(num_steps=25), skip=0.3)"),
    "restoration": (
        "models.restoration:restoration_kernel",
        "restoration('blur.safetensors', process='mean_reverting', order=2, num_steps=8)",
    ),
    "tds": ("guidance:TDS", "tds(mnist(), digit(8))"),
    "das": ("guidance:DAS", "das(mnist(), digit(8))"),
    "dps": ("guidance:DPS", "dps(mnist(), digit(8), scale=0.1)"),
    "trust_region": ("guidance:TrustRegion", "trust_region(mnist(), digit(8))"),
    "flowchef": ("guidance:FlowChef", "flowchef(mnist(), digit(8), scale=0.1)"),
    "elucd": ("guidance:EluCD", "elucd(mnist(), digit(8, tau2=0.5), scale=0.5)"),
    "universal": ("guidance:Universal", "universal(mnist(), digit(8), steps=2)"),
    "steered": ("guidance:Steered", "steered(mnist(), measurement(pooled(4), 'observed.png', tolerance=0.2))"),
    "lacon": ("guidance.lacon:lacon", "lacon(mnist(), 'edges.safetensors', './seen.png', tolerance=0.2)"),
    "clamp": ("wrappers.clamped:clamp", "clamp(mnist(), './mask.png', './seed.png', inverted=True)"),
    "diffeditor": (
        "guidance.moves:diffeditor",
        "diffeditor(mnist(eta=0.0), './digit.png', './digit_mask.png', by=(0, 3))",
    ),
    "regional": ("roots.regional:regional", "regional(mnist(eta=0.0), './mask.png', eta=0.4)"),
    "completed": (
        "wrappers.completed:Completed",
        "completed(mnist(num_steps=50), student(num_steps=50), levels=(40, 30, 20))",
    ),
    "spliced": ("wrappers.spliced:Spliced", "spliced(mnist(num_steps=50), student(num_steps=50), at=25)"),
    "cycle": ("wrappers.cycle:Cycle", "cycle(mnist(), low=8, high=18, times=3)"),
    "edited": ("roots:edited", "edited(mnist(), './digit.png', keep='./mask.png', strength=0.8)"),
    "valued": ("guidance:Valued", "valued(mnist(), digit(8), 'ppap.safetensors')"),
    "softpag": (
        "interventions.softpag:softpag",
        "softpag(mnist(), {'mid_block.attentions.0': [0, 2]}, u=0.5, scale=2.0)",
    ),
    "pag": ("interventions.softpag:pag", "pag(mnist(), 'mid_block', scale=2.0)"),
    "seg": ("interventions.seg:seg", "seg(mnist(), 'mid_block', scale=2.0)"),
    "nasa": (
        "interventions.nasa:nasa",
        "nasa(diffusers('stable-diffusion-v1-5/stable-diffusion-v1-5', num_steps=50), 'blurry', alpha=0.1)",
    ),
    "actions": ("interventions:Actions", "actions(softpag(mnist(), {'mid_block': [0, 2]}), levels=(15, 5))"),
    "proposal": ("interventions:Proposal", "proposal(softpag(mnist(), {'mid_block': [0, 2]}))"),
    "away": ("interventions:Away", "away(mnist(num_steps=25), spd(num_steps=25), scale=0.5)"),
    "hspace": ("interventions.hspace:hspace", "hspace(mnist(num_steps=25), 'hspace.safetensors')"),
    "memory": ("interventions.retrieval:memory", "memory(diffusers('DIR', num_steps=50), 'clips.safetensors', k=5)"),
    "lina": (
        "interventions.lina:lina",
        "lina(diffusers('DIR', num_steps=50), {'a cat': 'a cat and its shadow on the floor'}, strengths=(0.5, 1.0))",
    ),
    "cfg": ("interventions.cfg:cfg", "cfg(diffusers('DIR', num_steps=50), (2.0, 7.5))"),
    "drafted": (
        "wrappers.drafted:Drafted",
        "drafted(diffusers('DIR', num_steps=50), diffusers('DIR', num_steps=50, guidance_scale=1), ratio=0.5)",
    ),
    "maze": ("models.trajectory:maze_kernel", "maze('medium')"),
    "trajectories": ("models.trajectory:trajectory_kernel", "trajectories('./model.safetensors')"),
    "composed": ("wrappers.composed:Composed", "composed(maze('medium', horizon=24), chunks=3)"),
    "policy": ("models.policy:policy", "policy('two_routes.safetensors', num_steps=5)"),
    "diffuser": ("guidance:Diffuser", "diffuser(maze(), maze_plan('medium'))"),
    "guidance_scales": (
        "guidance:GuidanceScales",
        "guidance_scales(diffuser(maze(), maze_plan('medium')), (0.0, 1.0), (2,))",
    ),
    "policy_guided": (
        "guidance:PolicyGuided",
        "policy_guided(maze(), policy_likelihood('./mine.py':policy, (4, 2)))",
    ),
    "drawn": (
        "guidance.drawn:Drawn",
        "drawn(masked_text('answerdotai/ModernBERT-base', length=32, num_steps=32), ./mine.py:score, draws=4)",
    ),
    "masked_text": (
        "text.kernel:MaskedTextKernel.from_pretrained",
        "masked_text('answerdotai/ModernBERT-base', length=32, num_steps=32)",
    ),
    "small_text": ("text.own:small_text", "small_text(num_steps=32)"),
    "rescored": (
        "text.rescored:Rescored",
        "rescored(masked_text('answerdotai/ModernBERT-base', length=32, num_steps=8, reveal='left'))",
    ),
    "scaffold": (
        "text.scaffold:scaffold",
        "scaffold(masked_text('answerdotai/ModernBERT-base', length=64, num_steps=16), './schema.json', blanks=8)",
    ),
    "field_order": (
        "text.turns:FieldOrder",
        "field_order(scaffold(small_text(num_steps=6), './schema.json', blanks=8))",
    ),
    "gaussian": ("exact.gaussian:LinearGaussian", "gaussian(dim=2)"),
    "ring": ("exact.gaussian:GaussianMixture.ring", "ring(modes=8)"),
    "discrete": ("exact.enumerable:DiscreteChain.random", "discrete(states=4)"),
    "masked_chain": ("exact.enumerable:MaskedChain.random", "masked_chain(length=3)"),
}
__all__ = sorted(KERNELS)  # pyright: ignore[reportUnsupportedDunderAll]  # made from the table


def __getattr__(name: str) -> Any:
    if name not in KERNELS:
        raise AttributeError(f"module 'treesearch.backends' has no attribute {name!r}")
    module, _, attributes = KERNELS[name][0].partition(":")
    return functools.reduce(getattr, attributes.split("."), importlib.import_module(f"treesearch.backends.{module}"))


def __dir__() -> list[str]:
    return [*__all__, "KERNELS"]
