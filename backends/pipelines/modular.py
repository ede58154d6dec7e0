"""Any pipeline with a row in `kinds`, run by the modular blocks that diffusers has of it.

    prompts → encode → rows;   rows, x_t, t → prepare → one turn of the loop → ε̃;   x_0 → unpack, decode → pictures

States are what the loop steps on, packed where it packs. The grid is what the blocks hand to their scheduler. The loop
takes one timestep a row, though it never does so itself: `verify` holds that, and two steps of the loop's own solver,
against the chain before anything is searched.

    ‖mixed - alone‖ ≤ √eps ‖alone‖,    ‖x - own‖ ≤ √eps ‖own - x_T‖ + 2 eps ‖own‖      eps of the network's dtype
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from treesearch.backends.base import Cond, Shared
from treesearch.backends.base.pictures import pixels_of
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import masks
from treesearch.backends.pipelines.blocks import Program, copied, generator, is_text, no_noise, state_of
from treesearch.backends.pipelines.checkpoint import CheckpointError
from treesearch.backends.pipelines.family import OPTIONAL, Family, check_pictures, check_prompts, join, sides
from treesearch.backends.pipelines.flow import steps_from_below
from treesearch.backends.pipelines.guiders import Stepped, explained
from treesearch.backends.pipelines.kinds import KINDS, modular_form
from treesearch.backends.pipelines.meta import to_meta
from treesearch.backends.pipelines.proof import FEW, MORE
from treesearch.backends.pipelines.roots import refuse_another_picture
from treesearch.backends.pipelines.rows import as_blocks_take_them, as_rows
from treesearch.backends.pipelines.settings import Settings

_OF_THE_BLOCKS = ("guidance_rescale", "num_frames", "negative_prompt", "max_sequence_length", "image", "sigmas")
_OF_A_BEGINNING = ("image", "mask", "strength")
_SIZES = ("height", "width", "num_frames")
_PARTS = ("scheduler", "vae", "transformer", "unet")
_MEMORYLESS = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler")
_OUTPUTS = ("images", "videos")
_LANCZOS = 1  # of PIL, by which blocks resize pictures
_ANY = 2  # steps of a grid that is not used: some have none of a single one


class Modular(Family):
    """A pipeline by its own blocks.

    Raises:
        ValueError: a setting that the blocks do not read.
    """

    plain: ClassVar[bool] = False

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self.pipe, self.settings, self.name = pipe, settings, type(pipe).__name__
        self.kind = KINDS[self.name]
        self.network_name = "transformer" if getattr(pipe, "unet", None) is None else "unet"  # pyright: ignore
        self.guidance_scale = _scale(pipe, self.kind.scale, settings.guidance_scale)
        self._stepped: Stepped | None = None
        self._schedule: Schedule | None = None
        self.scheduler = no_noise(copy.deepcopy(pipe.scheduler))
        self._program = self._load()
        self._rows: dict[str, Sequence[str]] = {}  # names of conditioning, by what the blocks ask for it as
        self._shared: dict[str, Any] = {}  # what the blocks make of pictures, and sizes that they take from them
        self._prepared: tuple[Any, ...] | None = None
        self._first: dict[str, Any] | None = None
        self._shape: tuple[int, ...] | None = None

    def _load(self, given: Sequence[str] = ()) -> Program:
        guider = dict(self.kind.guider) | {"guidance_scale": self.guidance_scale, "enabled": True}
        if self.settings.guidance_rescale:
            guider["guidance_rescale"] = self.settings.guidance_rescale
        if self.settings.guider is not None:
            self._stepped = Stepped(self.settings.guider)
            if self._schedule is not None:
                self._stepped.on(self._schedule)
        own = None if self._stepped is None else self._stepped.guider
        return Program(self.kind, self.pipe, self.scheduler, own or guider, given or self._given())

    def _given(self) -> list[str]:
        return ["prompt", "image"] if self.is_told else ["prompt"]

    @classmethod
    def check(cls, name: str, settings: Settings, parts: Collection[str]) -> None:
        _, blocks = modular_form(KINDS[name], {})
        for part in blocks.component_names:
            if (part in _PARTS or is_text(part)) and part not in parts:
                raise CheckpointError(f"{name} has no {part}: load it whole")
        check_pictures(name, settings, needs=KINDS[name].needs_image)
        known = set(_OF_THE_BLOCKS) & set(blocks.input_names)
        if "guider" in blocks.component_names:
            known |= {"guidance_rescale", "guider"}
        if not KINDS[name].edits:
            known.discard("image")
        if "strength" in blocks.input_names and (settings.mask is not None or not KINDS[name].edits):
            known |= set(_OF_A_BEGINNING)
        default = Settings()
        for option in OPTIONAL:
            if getattr(settings, option) != getattr(default, option) and option not in known:
                raise ValueError(f"{name} takes no {option}")
        if settings.guider is not None and (settings.guidance_scale is not None or settings.guidance_rescale):
            raise ValueError("the guider has its own scale: leave guidance_scale and guidance_rescale out")
        if settings.control_scale != 1:
            raise ValueError(f"{name} has no ControlNet for a control_scale")

    def on(self, pipe: Any) -> Modular:
        _ = self.latent_shape  # found while there are values to unpack by
        other = copy.copy(self)
        other.pipe, other._prepared = pipe, None
        other._program = other._load()
        if self._first is not None and other.network.device.type == "meta":
            other._first = to_meta(self._first)
            other._shared = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, self._shared)
        return other

    def refuse(self) -> None:
        runner, factor = self._program.runner, self._factor
        default = (getattr(runner, "default_height", 0) or factor, getattr(runner, "default_width", 0) or factor)
        sides(self.pipe, self.settings, default, self.kind.patch * factor)
        for name, value in self.kind.assumes:
            found = self.pipe.config.get(name, value)
            if found != value and list(found) != list(value):
                raise ValueError(f"{self.name} has {name}={found}, and its blocks in diffusers take {value} for given")
        if self.settings.negative_prompt is not None and not self.guided:
            raise ValueError(f"negative_prompt has no effect at guidance_scale={self.guidance_scale:g}: leave it out")
        reserved = {"prompt", "latents", "timesteps", "sigmas", "generator", "num_inference_steps", "output_type"}
        free = sorted(self._program.inputs - reserved - {*vars(self.settings)})
        for name in self.settings.network_inputs:
            if name not in free:
                raise ValueError(f"the blocks of {self.name} take no {name!r}: choose {', '.join(free)}")

    @property
    def text_encoders(self) -> list[str]:
        return self._program.text_encoders

    @property
    def guided(self) -> bool:
        return self.rows_per_nfe > 1

    @property
    def rows_per_nfe(self) -> int:
        if not self._program.guided:
            return 1
        return (self._stepped or self._program.runner.guider).num_conditions

    @property
    def state_shape(self) -> tuple[int, ...]:
        if self._shape is None:
            self._shape = tuple(self._ready(self._example(1), _ANY).get("latents").shape[1:])
        return self._shape

    @functools.cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one state as the decoder takes it."""
        return tuple(self._program.unpack(self._ready(self._example(1), _ANY)).get("latents").shape[1:])

    @property
    def begins(self) -> bool:
        return self.settings.image is not None and not (self.kind.edits and self.settings.mask is None)

    @property
    def is_told(self) -> bool:
        return self.kind.edits and self.settings.image is not None

    def image_steps(self, num_steps: int, strength: float) -> int:
        return steps_from_below(num_steps, strength)

    @property
    def _pixels(self) -> tuple[int, int]:
        """Height and width of a picture."""
        height, width = (self._factor * side for side in self.latent_shape[-2:])
        return height, width

    @property
    def _factor(self) -> int:
        """Pixels of a side that one latent stands for."""
        runner = self._program.runner
        return getattr(runner, "vae_scale_factor", None) or runner.vae_scale_factor_spatial

    def state_of(self, image: Any) -> Tensor:
        """x_0 (*state) of a picture, by the blocks that begin at one.

        Raises:
            ValueError: there are none, a picture of another size, or another than the one that is edited.
        """
        if self.is_told:
            refuse_another_picture(self, image)
            return self._edited()
        if "strength" not in modular_form(self.kind, self.pipe.config)[1].input_names:
            raise ValueError(f"{self.name} has no blocks that begin at a picture: begin from latents with from_noise")
        program, cond = self._load(["prompt", "image"]), self._example(1)
        given = {"image": pixels_of(image, 3, self._pixels)[None], "strength": 1.0, "num_inference_steps": _ANY}
        seen = program.see(self._state(given, {})).get("image_latents")
        values = self._shared | as_blocks_take_them(cond, 1) | given | {"image_latents": seen}
        return program.prepare(self._state(values, self._rows)).get("image_latents")[0].float()

    def _edited(self) -> Tensor:
        """x_0 of the picture that is edited, which the blocks make of their own size."""
        found = self._ready(self._example(1), _ANY).get("image_latents")[0].float()
        if tuple(found.shape) != self.state_shape:
            raise ValueError(f"{self.name} draws {self._pixels} pixels, and sees its picture at another size: leave "
                             "height and width out")  # fmt: skip
        return found

    def free(self, mask: Any) -> Tensor:
        """Entries of a state (1, *state) that the chain draws under a mask, by where its entries are in latents."""
        if self.kind.edits and not isinstance(mask, Tensor):
            mask = mask.convert("L").resize(self._pixels[::-1], _LANCZOS)
        count = math.prod(self.state_shape)
        index = torch.arange(count, dtype=torch.float64, device=self.device).reshape(1, *self.state_shape)
        places = self._program.unpack(copied(self._ready(self._example(1), _ANY), latents=index)).get("latents")
        if places.numel() != count or not torch.equal(places.flatten().sort().values, index.flatten()):
            raise ValueError(f"{self.name} mixes its latents when it packs them, and a mask has no place there")
        small = torch.nn.functional.interpolate(masks.white(mask, self._pixels), size=places.shape[-2:])
        found = torch.empty(count, device=self.device)
        found[places.flatten().long()] = small.to(self.device).expand(places.shape[:-2].numel(), 1, -1, -1).flatten()
        return found.reshape(1, *self.state_shape)

    def grid(self, num_steps: int) -> dict[str, Any]:
        asked: dict[str, Any] = {}
        own = self.scheduler.set_timesteps

        @functools.wraps(own)
        def record(*args: Any, **kwargs: Any) -> None:
            asked.update(inspect.signature(own).bind(*args, **kwargs).arguments)
            own(*args, **kwargs)

        self.scheduler.set_timesteps = record
        try:
            self._ready(self._example(1), num_steps)
        finally:
            del self.scheduler.set_timesteps
        return {k: v for k, v in asked.items() if k not in ("num_inference_steps", "device") and v is not None}

    # Conditioning

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        texts = check_prompts(prompts)
        if self.kind.sees:
            return join([self._encode([text]) for text in texts])
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> dict[str, Any]:
        state = self._program.encode(self.pipe, self._state({"prompt": texts} | self._absent(texts), {}))
        self._rows = state.kwargs_mapping
        self._shared = {name: size for name in _SIZES if (size := state.get(name)) is not None}
        out: dict[str, Any] = {}
        for name, is_row in self._program.encoded.items():
            if (value := state.get(name)) is None:
                continue
            if is_row:
                out |= as_rows(name, value, len(texts), each=isinstance(self.settings.negative_prompt, Mapping))
            else:
                self._shared[name] = value
        return out

    def _absent(self, texts: list[str]) -> dict[str, Any]:
        said = self.settings.negative_prompt
        return {"negative_prompt": self.negatives(texts)} if isinstance(said, Mapping) else {}

    def _inputs(self) -> dict[str, Any]:
        """What the user chose, as the blocks call it."""
        names = ("height", "width", *_OF_THE_BLOCKS)
        chosen = {name: getattr(self.settings, name) for name in names if name in self._program.inputs}
        if self.kind.distilled:
            chosen["guidance_scale"] = self.guidance_scale
        if "max_area" in self._program.inputs and chosen.get("height") and chosen.get("width"):
            chosen["max_area"] = chosen["height"] * chosen["width"]  # a size that is asked for is not rescaled
        return {k: v for k, v in chosen.items() if v is not None} | dict(self.settings.network_inputs)

    def _state(self, values: Mapping[str, Any], kinds: Mapping[str, Sequence[str]]) -> Any:
        return state_of(self._inputs() | {"generator": generator(), "output_type": "pt"} | dict(values), kinds)

    def _example(self, n: int) -> dict[str, Any]:
        """Conditioning of n rows without a prompt, where only shapes matter."""
        if self._first is None:
            with torch.no_grad(), Quiet(*(part for part in self.pipe.components.values() if _is_module(part))):
                self._first = self.encode([FEW])
        return {k: v.value if isinstance(v, Shared) else v.expand(n, *v.shape[1:]) for k, v in self._first.items()}

    def _ready(self, cond: Mapping[str, Any], num_steps: int) -> Any:
        """The state of the blocks before their loop, for rows of conditioning."""
        n = len(next(value for name, value in cond.items() if not name.startswith("negative_")))
        values = self._shared | as_blocks_take_them(cond, n)
        values |= {
            name: values[name].expand(n, *values[name].shape[1:]) for name in self.kind.repeats if name in values
        }
        with torch.no_grad():
            return self._program.prepare(self._state(values | {"num_inference_steps": num_steps}, self._rows))

    # Steps

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        if cond is None or not any(name in cond for names in self._rows.values() for name in names):
            raise ValueError(f"{self.name} needs prompts: prompts=[...], or prompts=[''] for no text")
        rows = {name: value for name, value in cond.items() if name != "task"}
        if self._stepped is None:
            return self._program.predict(self._kept_ready(rows), x, timestep)
        parts = self._stepped.groups(timestep)
        if len(parts) == 1:
            return self._guided(parts[0][0], self._kept_ready(rows), x, timestep)
        output = torch.empty_like(x)
        for step, of in parts:
            part = {name: value if _is_one(name, value) else value[of] for name, value in rows.items()}
            output[of] = self._guided(step, self._ready(part, _ANY), x[of], timestep[of])
        return output

    def _guided(self, step: int, ready: Any, x: Tensor, timestep: Tensor) -> Tensor:
        assert self._stepped is not None
        with self._stepped.at(step, self.network):
            return self._program.predict(ready, x, timestep)

    def _kept_ready(self, rows: Mapping[str, Any]) -> Any:
        """The state of the blocks before their loop, made once for as long as the engine hands in the same rows."""
        key = tuple(rows.values())
        if self._prepared is None or not _same(self._prepared[0], key):
            self._prepared = (key, self._ready(rows, _ANY))
        return self._prepared[1]

    # Pictures

    def draw(self, x0: Tensor, batch: int, decoder: Any = None) -> Tensor:
        if decoder is not None:
            raise ValueError(f"{self.name} has no previews: leave preview out")
        parts = []
        for part in x0.split(min(batch, self.kind.draws or batch)):
            keeps = part.requires_grad and torch.is_grad_enabled()
            parts.append(checkpoint(self._draw, part, use_reentrant=False) if keeps else self._draw(part))
        return torch.cat(parts)

    def _draw(self, x0: Tensor) -> Tensor:
        with Quiet(self.pipe.vae):  # here, since a checkpoint calls this again when the gradient is taken
            state = copied(self._ready(self._example(len(x0)), _ANY), latents=x0.to(self.pipe.vae.dtype))
            if x0.is_meta:  # some unpack by the values of positions, which are not there
                state = copied(state, latents=state.get("latents").new_empty(len(x0), *self.latent_shape))
            else:
                state = self._program.unpack(state)
            done = self._program.decode(state)
        return next(done.get(name) for name in _OUTPUTS if done.get(name) is not None).float()

    # Proof

    def verify(self, schedule: Schedule) -> None:
        """Hold a batch at mixed levels against its rows alone, and the chain against the loop's own solver.

        Raises:
            ValueError: they differ; the message has the difference.
        """
        self._schedule = schedule
        if self._stepped is not None:
            self._stepped.on(schedule)
        with torch.no_grad(), Quiet(*(part for part in self.pipe.components.values() if _is_module(part))):
            chain = Chain(schedule, eta=0.0).to(self.device)
            levels = self._levels(schedule.num_steps)
            shape = (len(levels), *self.state_shape)
            noise = torch.randn(shape, generator=generator(), device="cpu").to(self.device)
            with explained(self.settings.guider, self.network):
                self._verify_rows(chain, noise, levels)
                self._verify_steps(chain, noise[:1])
        self._prepared = None

    def _levels(self, steps: int) -> list[int]:
        """The last level and the first, and one for each set of open windows."""
        windows = [] if self._stepped is None else self._stepped.first_steps
        return sorted({1, steps} | {steps - step for step in windows}) if steps > 1 else [1, 1]

    def _verify_rows(self, chain: Chain, x: Tensor, levels: list[int]) -> None:
        t = torch.tensor(levels, device=self.device)
        prompts = [MORE if i % 2 else FEW for i in range(len(levels))]
        mixed = self._output(chain, x, t, self._cond(prompts))
        for i, prompt in enumerate(prompts):
            alone = self._output(chain, x[i : i + 1], t[i : i + 1], self._cond([prompt]))
            self._refuse_difference("a row in a batch at mixed timesteps", mixed[i : i + 1], alone, alone, 0.0)

    def _verify_steps(self, chain: Chain, x_T: Tensor) -> None:
        T = chain.schedule.num_steps
        steps = min(2, T) if type(self.scheduler).__name__ in _MEMORYLESS else 1
        cond, x = self._cond([MORE]), chain.schedule.prior_std * x_T
        state = self._ready(cond, T)
        own = copied(state, latents=x.to(self._dtype), timesteps=state.get("timesteps")[:steps])
        own = self._solved(own).get("latents").float()
        began = x
        for t in range(T, T - steps, -1):
            levels = torch.tensor([t], device=self.device)
            x = chain.law(x, levels, self._output(chain, x, levels, cond)).mean
        self._refuse_difference(f"{steps} steps of the chain and of the blocks' own loop", x, own, own - began, 2.0)

    def _solved(self, state: Any) -> Any:
        try:
            return self._program.solve(state)
        finally:
            if self._stepped is not None:
                self._stepped.release(self.network)
                self._stepped.reset()

    def _cond(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {k: getattr(v, "value", v) for k, v in self.encode(prompts).items()}

    def _output(self, chain: Chain, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.predict(x.to(self._dtype), chain.timestep[t], cond).float()

    @property
    def _dtype(self) -> torch.dtype:
        return self.network.dtype

    def _refuse_difference(self, what: str, one: Tensor, other: Tensor, scale: Tensor, roundings: float) -> None:
        eps = torch.finfo(self._dtype).eps
        bound = eps**0.5 * float(scale.norm()) + roundings * eps * float(other.norm())
        found = float((one - other).norm())
        if not found <= bound:
            raise ValueError(f"{self.name} cannot be searched: {what} differ by {found:.3g}, expected {bound:.3g} at "
                             "most; its blocks keep something that is not of the row")  # fmt: skip


def _scale(pipe: Any, name: str, chosen: float | None) -> float:
    """The guidance scale: the user's, else what the pipeline's own `__call__` or guider takes."""
    if chosen is not None:
        return float(chosen)
    if not name:
        return float(pipe.guider.guidance_scale)
    default = inspect.signature(type(pipe).__call__).parameters[name].default
    return 1.0 if default is None else float(default)


def _is_one(name: str, value: Tensor) -> bool:
    """Whether rows share a row of ∅."""
    return name.startswith("negative_") and len(value) == 1


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def _is_module(part: Any) -> bool:
    return isinstance(part, torch.nn.Module)
