"""A pipeline's own `__call__`, run for one step, for its prompts or for its decoder, and cut off where that is done.

Between two calls of its scheduler's `step` a pipeline does all that a kernel wants of it: it joins the rows of ∅ to
those of the prompts, tells the time as its network wants it, guides, turns signs and leaves learned variances out. So a
step here is the pipeline's own call, on a copy of it whose scheduler has the timesteps of x as its whole grid, gives x
to the network as it is, and stops the call when it is handed the network's output. Text encoders run once: the copy's
`encode_prompt` hands out what it is told. With no timestep at all the call goes on to the decoder.

`__call__` forbids gradients; here it is called beneath that, so that it is the caller who decides.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from treesearch.backends.pipelines.blocks import generator

SECOND = "prepare_audio_latents"
"""Method of a pipeline that steps on sound beside its video."""
FRAMED = ("LTX2ImageToVideoPipeline",)
"""Pipelines whose first frame is a picture, and that step on those behind it."""
_PATCHES = ("transformer_spatial_patch_size", "transformer_temporal_patch_size")


class Reached(BaseException):
    """The call is where it was to be cut; no error, and nothing that a pipeline may catch."""


@dataclass
class Stage:
    """What a call is told, and what it shows.

    Args:
        device: where the network is.
        pictures: what the autoencoder has made of pictures that the call is told, which is made once.
        timesteps: the grid, of which pipelines take one entry after another; None for the scheduler's own.
        told: leaves of what `encode_prompt` returns, call by call; None to run the text encoders.
        watch: called with (i, timestep, network's output, state before) and the step's result, by a scheduler that
            does step.
    """

    device: torch.device
    pictures: dict[Any, Any]
    timesteps: Tensor | None = None
    told: Sequence[Any] | None = None
    watch: Callable[[int, float, Tensor, Tensor, Tensor], None] | None = None
    said: list[Any] = field(default_factory=list)  # what `encode_prompt` returned
    grid: dict[str, Any] = field(default_factory=dict)  # what `set_timesteps` was asked for
    output: Tensor | None = None  # of the network, guided
    state: Tensor | None = None  # that the scheduler would step from
    steps: int = 0
    encode: Callable[..., Any] | None = None  # the user's own, in place of the pipeline's
    beside: Tensor | None = None  # the state of a second stream, in place of the pipeline's own noise
    behind: Tensor | None = None  # frames behind a first one that is a picture, in place of the same
    streams: int = 1
    axes: int = 1  # of the states that a call is given, (n, ...)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the streams
    _seen: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> Stage:
        return self  # a call that copies its scheduler for a second stream is one call

    def see(self, *tensors: Tensor) -> tuple[Tensor, ...] | None:
        """What a scheduler is handed or makes, joined over the streams; None until each has been."""
        self._seen.append(tensors)
        if len(self._seen) < self.streams:
            return None
        seen, self._seen = self._seen, []
        self.shapes = [tuple(first.shape[1:]) for first, *_ in seen]
        return tuple(joined(parts) for parts in zip(*seen, strict=True))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """States of the streams (n, ...) as one: as they are where there is one, else flat (n, numbers)."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], 1)


def parted(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """States of the streams from one."""
    if len(shapes) < 2:
        return [x]
    parts = x.split([math.prod(shape) for shape in shapes], 1)
    return [part.reshape(len(x), *shape) for part, shape in zip(parts, shapes, strict=True)]


class Levels(Tensor):
    """Timesteps (n,), one a row, where a pipeline has a single one for all: spread over 2n rows they repeat."""

    def expand(self, *sizes: Any) -> Tensor:
        return self._spread(sizes)

    def repeat(self, *sizes: Any) -> Tensor:
        return self._spread(sizes)

    def _spread(self, sizes: tuple[Any, ...]) -> Tensor:
        (rows,) = sizes[0] if isinstance(sizes[0], (tuple, list, torch.Size)) else sizes
        return self.as_subclass(Tensor).tile(int(rows) // len(self))


class Remembering:
    """An autoencoder that does not encode again what it encoded last, and gives the mode where it is asked for a draw.

    Args:
        vae: that does the work.
        kept: by shape, what was encoded and what it gave.
    """

    def __init__(self, vae: Any, kept: dict[Any, Any]) -> None:
        self._vae, self._kept = vae, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    @property
    def __class__(self) -> Any:  # pipelines decode by what `isinstance` says of it
        return type(self._vae)

    def encode(self, pictures: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = (*pictures.shape, pictures.dtype)
        last, found = self._kept.get(key, (None, None))
        if last is None or pictures.is_meta or not torch.equal(last, pictures):
            found = self._vae.encode(pictures, *args, **kwargs)
            for law in (each for each in tree_leaves(found) if hasattr(each, "mode")):
                law.sample = lambda generator=None, law=law: law.mode()
            self._kept[key] = pictures, found
        return found


def encoded(pipe: Any, kind: Any, inputs: Mapping[str, Any], stage: Stage) -> list[Any]:
    """What the pipeline's `encode_prompt` returns, in the order of its calls.

    Raises:
        ValueError: it has none, or does not call it.
    """
    with before(networks(pipe), stop):
        call(pipe, kind, inputs, stage)
    if not stage.said:
        raise ValueError(f"{type(pipe).__name__} does not encode prompts by encode_prompt")
    return stage.said


def call(pipe: Any, kind: Any, inputs: Mapping[str, Any], stage: Stage) -> Any:
    """A class's call on a copy of a pipeline, with what a stage says; None where it was cut off."""
    actor = _copied(pipe, kind, stage)
    with _kept_attention(pipe):
        try:
            return inspect.unwrap(kind.__call__)(actor, **{"generator": generator(), **inputs})
        except Reached:
            return None


@contextmanager
def _kept_attention(pipe: Any) -> Iterator[None]:
    """PAG turns attention of some layers off while it is called, and on again where it is not cut off."""
    parts = networks(pipe) if hasattr(pipe, "pag_applied_layers") else ()
    kept = [(network, network.attn_processors) for network in parts]
    try:
        yield
    finally:
        for network, processors in kept:
            network.set_attn_processor(dict(processors))


def networks(pipe: Any) -> tuple[Any, ...]:
    """The denoisers of a pipeline, one or more experts."""
    names = ("unet", "transformer", "transformer_2", "unconditional_transformer")
    return tuple(part for name in names if (part := getattr(pipe, name, None)) is not None)


@contextmanager
def before(parts: Sequence[Any], look: Callable[..., Any]) -> Iterator[None]:
    """Call look(network, args, kwargs) before each call of one of the networks."""
    hooks = [network.register_forward_pre_hook(look, with_kwargs=True) for network in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def lazy(parts: Sequence[Any], wanted: Callable[[], bool]) -> Iterator[None]:
    """Networks that answer with what they said last, where nobody asks what they say."""

    def of(network: Any) -> Callable[..., Any]:
        own, last = network.forward, []

        def forward(*args: Any, **kwargs: Any) -> Any:
            if wanted() or not last:
                last[:] = [own(*args, **kwargs)]
            return last[0]

        return forward

    for network in parts:
        network.forward = of(network)
    try:
        yield
    finally:
        for network in parts:
            del network.forward


@contextmanager
def unsaid() -> Iterator[None]:
    """Without warnings of the libraries."""
    logs = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def stop(*_: Any) -> None:
    """Cut the call off."""
    raise Reached


def _copied(pipe: Any, kind: Any, stage: Stage) -> Any:
    other = copy.copy(pipe)
    parts = {"scheduler": _scheduler(pipe.scheduler, stage), "_progress_bar_config": {"disable": True}}
    if hasattr(getattr(pipe, "vae", None), "encode"):
        parts["vae"] = Remembering(pipe.vae, stage.pictures)
    stage.encode = vars(other).pop("encode_prompt", None)
    vars(other).update(parts | {"stage": stage})  # beneath the setter, which writes to the pipeline's configuration
    other.__class__ = _actor(kind)
    return other


def _frames(kind: Any) -> dict[str, Any]:
    """What makes the noise of frames behind a first one."""

    def prepare(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        packed, mask = kind.prepare_latents(self, *args, **kwargs)
        if (x := self.stage.behind) is not None:
            patches = [getattr(self, name) for name in _PATCHES]
            whole = kind._unpack_latents(packed, x.shape[2] + 1, *x.shape[3:], *patches)
            packed = kind._pack_latents(torch.cat([whole[:, :, :1], x.to(whole.dtype)], 2), *patches)
        return packed, mask

    return {"prepare_latents": prepare} if kind.__name__ in FRAMED else {}


def _second(kind: Any) -> dict[str, Any]:
    """What makes the noise of a second stream."""
    if not hasattr(kind, SECOND):
        return {}
    own = getattr(kind, SECOND)

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        told = self.stage.beside
        return own(self, *args, **kwargs) if told is None else told

    return {SECOND: prepare}


@functools.cache
def _actor(kind: type) -> type:
    """A pipeline whose prompts are encoded by its stage, and that is where its network is."""

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        stage = self.stage
        told, encode = stage.told, stage.encode or functools.partial(kind.encode_prompt, self)
        stage.said.append(encode(*args, **kwargs) if told is None else told[len(stage.said)])
        return stage.said[-1]

    body = {
        "encode_prompt": encode_prompt,
        "_execution_device": property(lambda self: self.stage.device),
        "maybe_free_model_hooks": lambda self: None,
    }
    return type(kind.__name__, (kind,), body | _second(kind) | _frames(kind))


def _scheduler(scheduler: Any, stage: Stage) -> Any:
    """A copy that says to the stage what it is asked, and has the stage's grid."""
    steps = stage.timesteps is None
    other = copy.deepcopy(scheduler) if steps else copy.copy(scheduler)
    other.__class__ = (_watched if steps else _silent)(type(scheduler))
    other.stage = stage
    return other


@functools.cache
def _silent(kind: Any) -> type:
    """A scheduler with a grid of its stage's, that gives states as they are and stops at a step."""

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        self.timesteps = self.stage.timesteps
        self.num_inference_steps = len(self.timesteps)
        if hasattr(kind, "scale_noise"):  # a flow's time is its noise level, which some calls guide by
            rows = (1,) * (self.stage.axes - 1) if self.timesteps.ndim > 1 else ()
            levels = self.timesteps.as_subclass(Tensor) / self.config.num_train_timesteps
            self.sigmas = levels.reshape(*levels.shape, *rows)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = taken.bind(self, *args, **kwargs).arguments
        found = self.stage.see(given["model_output"], given["sample"])
        if found is None:
            return (given["sample"],)
        self.stage.output, self.stage.state = found
        raise Reached

    taken = inspect.signature(kind.step)

    def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return sample

    body = {"set_timesteps": set_timesteps, "step": step, "scale_model_input": scale_model_input}
    body["init_noise_sigma"] = 1.0
    return type(kind.__name__, (kind,), body)


@functools.cache
def _watched(kind: Any) -> type:
    """A scheduler as it is, that tells its stage what it does."""

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        self.stage.grid = dict(inspect.signature(kind.set_timesteps).bind(self, *args, **kwargs).arguments)
        kind.set_timesteps(self, *args, **kwargs)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = taken.bind(self, *args, **kwargs).arguments
        done = kind.step(self, *args, **kwargs)
        after = tree_flatten(tuple(done.values()) if isinstance(done, dict) else done)[0][0]
        found = self.stage.see(given["model_output"], given["sample"], after)
        if found is not None and self.stage.watch is not None:
            self.stage.watch(self.stage.steps, float(given["timestep"]), *found)
        self.stage.steps += found is not None
        return done

    taken = inspect.signature(kind.step)
    body: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step}
    if not hasattr(kind, "scale_model_input"):  # which pipelines call where the class is none that they know
        body["scale_model_input"] = lambda self, sample, *args, **kwargs: sample
    return type(kind.__name__, (kind,), body)
