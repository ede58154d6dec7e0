"""Any pipeline with a row in `kinds`, run by the modular blocks that diffusers has of it.

    prompts → encode → rows;   rows, x_t, t → prepare → one turn of the loop → ε̃;   x_0 → unpack, decode → pictures

States are what the loop steps on, packed where it packs. The grid is what the blocks hand to their scheduler. The loop
takes one timestep a row, though it never does so itself: `verify` holds that, and two steps of the loop's own solver,
against the chain before anything is searched.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from treesearch.backends.base import Cond
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import fitting, framed
from treesearch.backends.pipelines.asked import check_prompts, sides
from treesearch.backends.pipelines.blocks import Program, asked, copied, generator, no_noise, watched
from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.flow import steps_from_below
from treesearch.backends.pipelines.guiders import Stepped, explained
from treesearch.backends.pipelines.inputs import ANY, Inputs
from treesearch.backends.pipelines.kinds import KINDS, form_of
from treesearch.backends.pipelines.proof import FEW, MORE, Proof, Seen, is_memoryless
from treesearch.backends.pipelines.roots import refuse_another_picture
from treesearch.backends.pipelines.rows import join
from treesearch.backends.pipelines.settings import Settings


class Modular(Family):
    """A pipeline by its own blocks.

    Raises:
        ValueError: a setting that the blocks do not read.
    """

    unread: tuple[str, ...] = ("safety_checker",)
    plain: ClassVar[bool] = False

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self.pipe, self.settings, self.name = pipe, settings, type(pipe).__name__
        self.kind = KINDS[self.name]
        self.network_name = "transformer" if getattr(pipe, "unet", None) is None else "unet"  # pyright: ignore
        self.guidance_scale = fitting.scale(pipe, self.kind.scale, settings.guidance_scale)
        self._guider = fitting.guider_of(pipe, settings)
        self._schedule: Schedule | None = None
        self.scheduler = no_noise(copy.deepcopy(pipe.scheduler))
        self._program, self._stepped = self._load()
        self._inputs = Inputs(self.kind, settings, self._program, self.guidance_scale)
        self._shape: tuple[int, ...] | None = None

    def _load(self, given: Sequence[str] = ()) -> tuple[Program, Stepped | None]:
        """The blocks for what is given, and the guider that they were given."""
        guider = dict(self.kind.guider) | {"guidance_scale": self.guidance_scale, "enabled": True}
        if self.settings.guidance_rescale:
            guider["guidance_rescale"] = self.settings.guidance_rescale
        stepped = None if self._guider is None else Stepped(self._guider)
        if stepped is not None and self._schedule is not None:
            stepped.on(self._schedule)
        own = guider if stepped is None else stepped.guider
        return Program(self.kind, self.pipe, self.scheduler, own, given or self._given()), stepped

    def _given(self) -> list[str]:
        return ["prompt", "image"] if self.is_told else ["prompt"]

    @classmethod
    def check(cls, name: str, settings: Settings, parts: Collection[str]) -> None:
        fitting.check(name, settings, parts)

    def on(self, pipe: Any) -> Modular:
        _ = self.latent_shape  # found while there are values to unpack by
        other = copy.copy(self)
        other.pipe = pipe
        other._program, other._stepped = other._load()
        other._inputs = self._inputs.on(other._program, meta=other.network.device.type == "meta")
        return other

    def on_grid(self, schedule: Schedule) -> Modular:
        other = copy.copy(self)
        other._schedule = schedule
        if self._stepped is not None:
            other._program, other._stepped = other._load()
            other._inputs = self._inputs.on(other._program, meta=self.network.device.type == "meta")
        return other

    def refuse(self) -> None:
        runner, factor = self._program.runner, self._factor
        default = (getattr(runner, "default_height", 0) or factor, getattr(runner, "default_width", 0) or factor)
        sides(self.pipe, self.settings, default, self.kind.patch * factor)
        if self.settings.negative_prompt is not None and not self.guided:
            raise ValueError(f"negative_prompt has no effect at guidance_scale={self.guidance_scale:g}: leave it out")
        fitting.refuse(self.pipe, self.kind, self.settings, self._program.inputs)

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
            self._shape = tuple(self._ready().get("latents").shape[1:])
        return self._shape

    @functools.cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one state as the decoder takes it."""
        return tuple(self._program.unpack(self._ready()).get("latents").shape[1:])

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
        if "strength" not in form_of(self.pipe, self.kind)[1].input_names:
            raise ValueError(f"{self.name} has no blocks that begin at a picture: begin from latents with from_noise")
        program, _ = self._load(["prompt", "image"])
        return framed.encoded(self._inputs, program, self._example(), image, self._pixels)

    def _edited(self) -> Tensor:
        """x_0 of the picture that is edited, which the blocks make of their own size."""
        found = self._ready().get("image_latents")[0].float()
        if tuple(found.shape) != self.state_shape:
            raise ValueError(f"{self.name} draws {self._pixels} pixels, and sees its picture at another size: leave "
                             "height and width out")  # fmt: skip
        return found

    def free(self, mask: Any) -> Tensor:
        """Entries of a state (1, *state) that the chain draws under a mask, by where its entries are in latents."""
        mask = framed.resized(mask, self._pixels) if self.kind.edits else mask
        return framed.drawn_under(mask, self._ready(), self._program, self.state_shape, self._pixels)

    def grid(self, num_steps: int) -> dict[str, Any]:
        with asked(self.scheduler) as found:
            self._ready(1, num_steps)
        return {k: v for k, v in found.items() if k not in ("num_inference_steps", "device") and v is not None}

    # Conditioning

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        texts = check_prompts(prompts)
        if self.kind.sees:
            return join([self._encode([text]) for text in texts])
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> dict[str, Any]:
        absent = self.negatives(texts) if isinstance(self.settings.negative_prompt, Mapping) else None
        return self._inputs.encode(self.pipe, texts, absent)

    def _example(self, n: int = 1) -> dict[str, Any]:
        """Conditioning of n rows without a prompt, where only shapes matter."""
        if self._inputs.first is None:
            with torch.no_grad(), self._quiet():
                self._inputs.first = self.encode([FEW])
        return self._inputs.example(n)

    def _ready(self, n: int = 1, num_steps: int = ANY) -> Any:
        """The state of the blocks before their loop, for n rows without a prompt."""
        return self._inputs.ready(self._example(n), num_steps)

    def _quiet(self) -> Quiet:
        return Quiet(*(part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)))

    # Steps

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        if cond is None or not any(name in cond for names in self._inputs.rows.values() for name in names):
            raise ValueError(f"{self.name} needs prompts: prompts=[...], or prompts=[''] for no text")
        rows = {name: value for name, value in cond.items() if name != "task"}
        if self._stepped is None:
            return self._program.predict(self._inputs.kept(rows), x, timestep)
        parts = self._stepped.groups(timestep)
        if len(parts) == 1:
            return self._guided(parts[0][0], self._inputs.kept(rows), x, timestep)
        output = torch.empty_like(x)
        for step, of in parts:
            part = {name: value if _is_one(name, value) else value[of] for name, value in rows.items()}
            output[of] = self._guided(step, self._inputs.ready(part), x[of], timestep[of])
        return output

    def _guided(self, step: int, ready: Any, x: Tensor, timestep: Tensor) -> Tensor:
        assert self._stepped is not None
        with self._stepped.at(step, self.network):
            return self._program.predict(ready, x, timestep)

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
            return framed.drawn(x0, self._ready(len(x0)), self._program, self.pipe.vae, self.latent_shape)

    # Proof

    def verify(self, schedule: Schedule) -> None:
        """Hold a batch at mixed levels against its rows alone, and the chain against the loop's own solver.

        Raises:
            ValueError: they differ; the message has the difference.
        """
        with torch.no_grad(), self._quiet():
            chain = Chain(schedule, eta=0.0).to(self.device)
            levels = self._levels(schedule.num_steps)
            shape = (len(levels), *self.state_shape)
            noise = torch.randn(shape, generator=generator(), device="cpu").to(self.device)
            with explained(self._guider, self.network):
                proof, t = Proof(self, chain), torch.tensor(levels, device=self.device)
                prompts = [MORE if i % 2 else FEW for i in range(len(levels))]
                proof.rows(noise, t, prompts, proof.alone(noise, t, prompts))
                seen = self._own_steps(chain, noise[:1])
                proof.steps(seen, seen, memoryless=is_memoryless(self.scheduler, schedule))
        self._inputs.forget()

    def _levels(self, steps: int) -> list[int]:
        """The last level and the first, and one for each set of open windows."""
        windows = [] if self._stepped is None else self._stepped.first_steps
        return sorted({1, steps} | {steps - step for step in windows}) if steps > 1 else [1, 1]

    def _own_steps(self, chain: Chain, x_T: Tensor) -> dict[int, Seen]:
        """The first two steps of the loop, with its own solver."""
        T, seen = chain.schedule.num_steps, dict[int, Seen]()
        state = self._inputs.ready({k: getattr(v, "value", v) for k, v in self.encode([MORE]).items()}, T)
        x = (chain.schedule.prior_std * x_T).to(self.network.dtype)
        with watched(self.scheduler, lambda *step: seen.update({len(seen): step})):
            self._solve(copied(state, latents=x, timesteps=state.get("timesteps")[:2]))
        return seen

    def _solve(self, state: Any) -> None:
        try:
            self._program.solve(state)
        finally:
            if self._stepped is not None:
                self._stepped.release(self.network)
                self._stepped.reset()


def _is_one(name: str, value: Tensor) -> bool:
    """Whether rows share a row of ∅."""
    return name.startswith("negative_") and len(value) == 1
