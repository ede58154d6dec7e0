"""The modular blocks of a pipeline, in the order in which they run, cut where the chain takes over.

    encode    what text encoders and autoencoders make of the user's prompts and pictures
    prepare   rows of the network: positions, masks, the grid, guidance inputs
    loop      one network call, without the solver's step that follows it
    unpack    states to latents, where the loop steps on packed ones
    decode    latents to pictures

Blocks run one after another on a `PipelineState`, with the components of the user's pipeline. They forbid gradients;
here they are called beneath that, so that it is the caller who decides.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from treesearch.backends.pipelines.kinds import Kind, form_of

Blocks = dict[str, Any]


class Program:
    """Blocks of one kind, with the components that they use.

    Args:
        kind: of the pipeline.
        pipe: the diffusers pipeline whose components they are.
        scheduler: a copy that the blocks may set.
        guider: settings of the guider, if the blocks have one, or a guider.
        given: names of the user's inputs, which choose among the blocks.
    """

    def __init__(self, kind: Kind, pipe: Any, scheduler: Any, guider: Any, given: Sequence[str]) -> None:
        form, blocks = form_of(pipe, kind)
        blocks = blocks.get_execution_blocks(**dict.fromkeys(given, True))
        with _unsaid():
            self.runner = form(blocks=blocks)
            names = self.runner.component_names
            parts = {name: part for name, part in pipe.components.items() if name in names and not is_text(name)}
            parts |= _own_processors(pipe, self.runner)
            self.guided = "guider" in names
            if self.guided:
                parts["guider"] = self.runner.guider.new(**guider) if isinstance(guider, Mapping) else guider
            configs = {
                spec.name: pipe.config[spec.name] for spec in blocks.expected_configs if spec.name in pipe.config
            }
            self.runner.update_components(**parts | {"scheduler": scheduler}, **configs)
        for block in blocks.sub_blocks.values():
            for name, attribute in kind.says:
                if hasattr(block, name) and hasattr(pipe, attribute):
                    setattr(block, name, getattr(pipe, attribute))
        self._cut(dict(blocks.sub_blocks))

    def _cut(self, blocks: Blocks) -> None:
        from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks

        names = list(blocks)
        at = next(i for i, name in enumerate(names) if isinstance(blocks[name], LoopSequentialPipelineBlocks))
        group = names[at].split(".")[0]
        start = next(i for i, name in enumerate(names) if name.split(".")[0] == group)
        self.encoders = {name: blocks[name] for name in names[:start]}
        self.preparers = {name: blocks[name] for name in names[start:at]}
        end = next(i for i, name in enumerate(names) if i > at and name.split(".")[0] != group)
        self.unpackers = {name: blocks[name] for name in names[at + 1 : end]}
        self.decoders = {name: blocks[name] for name in names[end:]}
        self.loop = blocks[names[at]]
        self.loop.set_progress_bar_config(disable=True)
        self._once = _without_solver(self.loop)

    @property
    def inputs(self) -> set[str]:
        """Names of what the blocks read from a user."""
        return set(self.runner.blocks.input_names)

    @property
    def text_encoders(self) -> list[str]:
        return [name for name in self.runner.component_names if is_text(name)]

    @property
    def encoded(self) -> dict[str, bool]:
        """Names of what the encoders make, and whether each has a row a prompt: where a text encoder makes it."""
        return {
            name: any(map(is_text, block.component_names))
            for block in self.encoders.values()
            for name in block.intermediate_output_names
        }

    def encode(self, pipe: Any, state: Any) -> Any:
        """Run the encoders, with the text encoders of a pipeline."""
        for name in self.text_encoders:
            setattr(self.runner, name, getattr(pipe, name))
        try:
            return self._run(self.encoders, state)
        finally:
            for name in self.text_encoders:  # not held on to: the kernel may let go of them
                setattr(self.runner, name, None)

    def see(self, state: Any) -> Any:
        """Run the encoders of pictures alone."""
        return self._run({k: v for k, v in self.encoders.items() if not any(map(is_text, v.component_names))}, state)

    def prepare(self, state: Any) -> Any:
        return self._run(self.preparers, state)

    def unpack(self, state: Any) -> Any:
        return self._run(self.unpackers, state)

    def decode(self, state: Any) -> Any:
        return self._run(self.decoders, state)

    def solve(self, state: Any) -> Any:
        """The loop with its own solver, over the timesteps of the state."""
        return _call(self.loop, self.runner, state)[1]

    def predict(self, state: Any, x: Tensor, timestep: Tensor) -> Tensor:
        """The network's output, guided, for x (n, *state) and timestep (n,): one turn of the loop."""
        state = copied(state, latents=x, timesteps=timestep[None], num_inference_steps=1)
        _call(self._once, self.runner, state)
        return self._once.sub_blocks["kept"].take()

    def _run(self, blocks: Blocks, state: Any) -> Any:
        for block in blocks.values():
            _, state = _call(block, self.runner, state)
        return state


def _own_processors(pipe: Any, runner: Any) -> dict[str, Any]:
    """What a pipeline keeps beside its components, by its own sizes: blocks make theirs for the published model's."""
    made = {name: part for name, part in runner.components.items() if name.endswith("_processor") and part is not None}
    own = {name: getattr(pipe, name, None) for name in made}
    return {name: part for name, part in own.items() if isinstance(part, type(made[name]))}


@contextmanager
def _unsaid() -> Iterator[None]:
    """Every guider warns that its kind is new, and components that they were not made here."""
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def is_text(name: str) -> bool:
    """Whether a component encodes text."""
    return name.startswith("text_encoder")


def state_of(values: Mapping[str, Any], kinds: Mapping[str, Sequence[str]]) -> Any:
    """A state of diffusers' blocks.

    Args:
        values: by name.
        kinds: names of the values that the blocks ask for by what they are.
    """
    from diffusers.modular_pipelines.modular_pipeline import PipelineState

    return PipelineState(dict(values), {kind: list(names) for kind, names in kinds.items()})


def copied(state: Any, **values: Any) -> Any:
    """The same state with other values."""
    return state_of(state.values | values, state.kwargs_mapping)


def _call(block: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a block beneath its decorators."""
    return inspect.unwrap(type(block).__call__)(block, *args, **kwargs)


def _without_solver(loop: Any) -> Any:
    """A loop that ends with the network's output instead of the solver's step."""
    from diffusers.modular_pipelines.modular_pipeline_utils import InsertableDict

    names = list(loop.sub_blocks)
    last = next(i for i, name in enumerate(names) if name.startswith("after"))
    once = copy.copy(loop)
    once.sub_blocks = InsertableDict((name, _open(loop.sub_blocks[name])) for name in names[:last])
    once.sub_blocks["kept"] = _kept()
    return once


def _open(block: Any) -> Any:
    """A block of a loop that lets gradients through."""
    opened = type(f"Open{type(block).__name__}", (type(block),), {"__call__": inspect.unwrap(type(block).__call__)})
    other = object.__new__(opened)
    vars(other).update(vars(block))
    return other


def _kept() -> Any:
    """The last block of a loop: it hands out what the network said."""
    from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

    class Kept(ModularPipelineBlocks):
        output: Tensor | None = None

        def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
            self.output = block_state.noise_pred
            return components, block_state

        def take(self) -> Tensor:
            output, self.output = self.output, None
            assert output is not None
            return output

    return Kept()


def no_noise(scheduler: Any) -> Any:
    """A scheduler whose steps draw none, where it is the configuration that says so."""
    if scheduler.config.get("stochastic_sampling"):
        scheduler.register_to_config(stochastic_sampling=False)
    return scheduler


@contextmanager
def asked(scheduler: Any) -> Iterator[dict[str, Any]]:
    """What a scheduler's `set_timesteps` is asked for meanwhile."""
    found: dict[str, Any] = {}
    own = scheduler.set_timesteps

    @functools.wraps(own)
    def record(*args: Any, **kwargs: Any) -> None:
        found.update(inspect.signature(own).bind(*args, **kwargs).arguments)
        own(*args, **kwargs)

    scheduler.set_timesteps = record
    try:
        yield found
    finally:
        del scheduler.set_timesteps


@contextmanager
def watched(scheduler: Any, look: Callable[[float, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Call look(timestep, network's output, state before, state after) at each step of a scheduler."""
    own = scheduler.step

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own).bind(*args, **kwargs).arguments
        done = own(*args, **kwargs)
        look(float(given["timestep"]), given["model_output"], given["sample"], tree_leaves(done)[0])
        return done

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def generator() -> torch.Generator:
    """What blocks draw from instead of the process's own generator; nothing of it stays in the chain."""
    return torch.Generator("cpu").manual_seed(0)
