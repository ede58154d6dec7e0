"""Grids of diffusers' schedulers: our timesteps and levels are those of `set_timesteps`, or the refusal says why."""

from __future__ import annotations

import functools
import inspect

import diffusers
import pytest
import torch

from tests.backends.test_pipelines import PROMPTS, SIZE, cond_of, noises, pipeline, walk
from tests.support.tolerance import EPS, float32_tolerance
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.pipelines.stepping import chain_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
TRAINED = 1000
AT_TIMESTEPS = ("DDIM", "DDPM", "LCM", "TCD", "PNDM", "DDIMParallel", "DDPMParallel")
TWICE = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")
SCALED = ("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", *TWICE)
UNSCALED = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver")
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
CONFIGS = (LEADING, LEADING | {"steps_offset": 0}, {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"})


def scheduler(name, **config):
    """With those of the settings that its class takes; PNDM without Runge-Kutta's evaluations between its points."""
    kind = getattr(diffusers, f"{name}Scheduler")
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in ({"skip_prk_steps": True} | config).items() if key in taken})


def where_steps_begin(theirs):
    """Of a solver's evaluations of the network those with which its steps begin."""
    name = type(theirs).__name__.removesuffix("Scheduler")
    if name == "PNDM":
        return theirs.timesteps.unique().flip(0)  # it evaluates the second twice
    return theirs.timesteps[::2] if name in TWICE else theirs.timesteps


def asked(make):
    """What is made, or why not."""
    try:
        return make(), ""
    except ValueError as error:
        return None, str(error)


def is_odd(own, num_steps):
    """Whether timesteps are too many, outside of the training grid, or one of them is there twice."""
    outside = float(own.max()) > TRAINED - 1 or float(own.min()) < 0
    return outside or len(own) != num_steps or len(own.unique()) < num_steps


@pytest.mark.parametrize("name", AT_TIMESTEPS + SCALED + UNSCALED)
def test_timesteps_are_the_scheduler_s_own(name):
    """At T = 1, a few, N and beyond. 61 is one of the numbers at which trailing spacing has a timestep too many."""
    slow = name.startswith("KDPM2")  # which takes seconds for a large T
    many = () if slow else (TRAINED - 1, TRAINED, TRAINED + 1)
    for config in CONFIGS[: 1 if slow else None]:
        theirs = scheduler(name, **config)
        for num_steps in (1, 2, 3, 10, 61, *many):
            where = (config, num_steps)
            try:
                theirs.set_timesteps(num_steps)
            except ValueError:
                with pytest.raises(ValueError, match=r"has no grid of .* take fewer|num_steps is 1001, expected 1\.\."):
                    Schedule.of(theirs, num_steps)
                continue
            own = where_steps_begin(theirs)
            ours, said = asked(lambda t=theirs, n=num_steps: Schedule.of(t, n))
            if ours is None:
                assert is_odd(own, num_steps), where
                assert any(why in said for why in ("visits", "end with the noise", "expected 1..1000")), where
            else:
                assert not is_odd(own, num_steps), where
                assert torch.equal(ours.timestep.flip(0).to(own), own), where


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize(
    "config",
    [*CONFIGS, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"final_sigmas_type": "sigma_min"},
     {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}],
)  # fmt: skip
def test_levels_are_those_to_which_a_scheduler_noises(config, num_steps):
    """α and σ of x_1..x_T, and the standard deviation of x_T, in its coordinates."""
    for name in AT_TIMESTEPS + SCALED[:-2] + UNSCALED:
        if name == "SASolver" and config.get("use_karras_sigmas", config.get("use_exponential_sigmas")):
            continue  # it steps from σ, and noises to ᾱ of the timestep that is nearest
        theirs = scheduler(name, **config)
        schedule = Schedule.of(theirs, num_steps)
        theirs.set_timesteps(num_steps)
        at = where_steps_begin(theirs)
        ones, zeros = torch.ones(num_steps), torch.zeros(num_steps)
        kept, noise = (theirs.add_noise(*given, at).double() for given in ((ones, zeros), (zeros, ones)))
        assert schedule.prior_std == pytest.approx(float(theirs.init_noise_sigma) * (
            float(schedule.alpha[-1]) if name in SCALED else 1))  # fmt: skip
        alpha, sigma = schedule.alpha[1:].flip(0), schedule.sigma[1:].flip(0)
        # In either of the coordinates; some ten roundings of float32 on each side.
        torch.testing.assert_close(sigma * kept, alpha * noise, rtol=10 * EPS, atol=10 * EPS)


ORDER_ONE = {
    "DPMSolverMultistep": {"solver_order": 1, "algorithm_type": "dpmsolver++"},
    "DPMSolverSinglestep": {"solver_order": 1, "algorithm_type": "dpmsolver++"},
    "DEISMultistep": {"solver_order": 1},
    "UniPCMultistep": {"solver_order": 1, "disable_corrector": list(range(9)), "final_sigmas_type": "sigma_min"},
}


def network(x, timestep):
    """An endpoint of order 1, as any network's."""
    return torch.tanh(0.5 * x.roll(1, -1) + timestep / TRAINED)


def walked(chain, z):
    """x_0 of our chain, z[0] for x_T."""
    x = z[0]
    for i, t in enumerate(range(chain.schedule.num_steps, 0, -1)):
        at = torch.full((len(x),), t)
        x = chain.law(x, at, network(x, chain.timestep[t])).sample(z[i + 1])
    return x


def solved(theirs, z):
    """x_0 of a solver, from the same noise."""
    x, noisy = z[0], "sde" in theirs.config.get("algorithm_type", "")
    for i, timestep in enumerate(theirs.timesteps):
        drawn = {"variance_noise": z[i + 1]} if noisy else {}
        x = theirs.step(network(x, timestep), timestep, x, **drawn).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize("config", [*CONFIGS, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("name", [*ORDER_ONE, "noisy"])
def test_a_solver_of_order_one_is_our_chain(name, config, num_steps):
    """With its noise the stochastic DPM-Solver++ is ours at η = 1, the others without at η = 0."""
    noisy = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}
    given = {"prediction_type": "sample", "lower_order_final": True, **ORDER_ONE.get(name, noisy), **config}
    theirs = scheduler(name if name in ORDER_ONE else "DPMSolverMultistep", **given)
    z = torch.randn(num_steps + 1, 3, 8, generator=torch.Generator().manual_seed(0))
    ours = walked(Chain(Schedule.of(theirs, num_steps), eta=float(name == "noisy")), z)
    theirs.set_timesteps(num_steps)
    # Log σ/α is rounded, and x; DEIS divides by α where it computes with ε.
    sizes = theirs.sigmas[theirs.sigmas > 0]
    largest = float(sizes.max() if name == "DEISMultistep" else torch.maximum(sizes.log().abs().max(), z.abs().max()))
    assert (ours - solved(theirs, z)).abs().max() < float32_tolerance(largest, layers=12 * num_steps)


def test_settings_of_another_class_are_not_read():
    """`from_config` keeps them: a solver that knows no clipping and no thresholding does not clip."""
    pixels = diffusers.DDIMScheduler(clip_sample=True, thresholding=True)
    theirs = diffusers.EulerDiscreteScheduler.from_config(pixels.config)
    assert theirs.config["thresholding"]
    assert theirs.config["clip_sample"]
    assert Schedule.of(theirs, 3).num_steps == 3
    assert chain_of(theirs, Schedule.of(theirs, 3), 0.0, None).clip_sample is None
    with pytest.raises(ValueError, match="DDIM with dynamic thresholding is not supported"):
        Schedule.of(pixels, 3)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete"])
def test_zero_terminal_snr(name):
    """2⁻²⁴ stands for ᾱ = 0 in solvers that divide by it; a chain that visits a timestep with less is refused."""
    given = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    theirs = scheduler(name, **given)
    assert float(Schedule.of(theirs, 10).alpha[-1]) == pytest.approx(2.0**-12)
    with pytest.raises(ValueError, match=f"noise of {name} falls where t rises, at num_steps=999: take fewer steps"):
        Schedule.of(theirs, TRAINED - 1)


# Of pipelines


class Begun(Exception):
    """The first call of a network."""


FAMILIES = ("unconditional", "ddim", "sd", "sd_v", "lcm", "sdxl", "turbo", "dit", "sd3", "flux", "schnell", "wan",
            "wan_euler", "ltx")  # fmt: skip
VIDEO = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 32}
SIZES = SIZE | dict.fromkeys(("wan", "wan_euler", "ltx"), VIDEO)


@functools.cache
def opened(name, root):
    return pipeline(name, root)


def prompts_of(name):
    """What a pipeline is told to draw."""
    pixels = {"batch_size": 1}
    return {"unconditional": pixels, "ddim": pixels, "dit": {"class_labels": [1]}}.get(name, {"prompt": ["a cat"]})


def grid_of(pipe, name, num_steps, monkeypatch):
    """The scheduler of a pipeline as its own call sets it."""

    def begin(*args, **kwargs):
        raise Begun

    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, "forward", begin)
        with pytest.raises(Begun):
            pipe(num_inference_steps=num_steps, **prompts_of(name), **SIZES.get(name, {}))
    return pipe.scheduler


@pytest.mark.parametrize("name", FAMILIES)
def test_the_grid_of_a_family_is_its_pipeline_s(name, tiny_root, monkeypatch):
    """At T = 1, a few, N and beyond; refused where the pipeline itself fails."""
    pipe = opened(name, tiny_root)
    for num_steps in (1, 2, 7, TRAINED, TRAINED + 1):
        try:
            theirs = grid_of(pipe, name, num_steps, monkeypatch)
        except (ValueError, RuntimeWarning):  # 0 / 0 where shift_terminal stretches a single step
            theirs = None
        ours, said = asked(lambda n=num_steps: DiffusersKernel(pipe, num_steps=n, device="cpu", **SIZES.get(name, {})))
        if ours is None:
            assert any(why in said for why in ("visits", "end with", "expected", "has no grid of")), num_steps
            assert theirs is None or is_odd(where_steps_begin(theirs), num_steps), num_steps
            continue
        assert theirs is not None, num_steps
        ours = ours.chain.schedule
        assert (ours.sigma[1:].diff() > 0).all(), num_steps  # timesteps of UniPC are rounded
        assert torch.equal(ours.timestep.flip(0).to(theirs.timesteps), where_steps_begin(theirs)), num_steps
        if ours.prediction == "flow":
            assert torch.equal(ours.sigma.flip(0).float(), theirs.sigmas), num_steps


@pytest.mark.parametrize(
    ("name", "config", "num_steps"),
    [*((name, None, 1) for name in ("sd", "sd_v", "sdxl", "turbo", "sd3", "flux", "schnell")),
     ("sd", LEADING | {"use_karras_sigmas": True}, 5), ("sd", LEADING, 5)],
)  # fmt: skip
def test_latents_are_the_pipeline_s(name, config, num_steps, tiny_root):
    """Of one step, with whichever solver; and of DPM-Solver++ of order one on its own grid."""
    pipe = opened(name, tiny_root)
    if config is not None:
        order = {"prediction_type": "epsilon", "solver_order": 1}
        pipe = type(pipe)(**pipe.components | {"scheduler": scheduler("DPMSolverMultistep", **order, **config)})
        pipe.set_progress_bar_config(disable=True)
    scale = 0.0 if name == "schnell" else 3.0
    kernel = DiffusersKernel(
        pipe, num_steps=num_steps, device="cpu", eta=0.0, guidance_scale=scale, **SIZE.get(name, {})
    )
    z = noises(kernel.state_shape, steps=num_steps)
    x = walk(kernel, z, cond_of(kernel, PROMPTS))
    call = {"num_inference_steps": num_steps, "guidance_scale": scale, "output_type": "latent", **SIZE.get(name, {})}
    theirs = pipe(PROMPTS, latents=z[0].clone(), **call)[0]
    # Networks of some hundred layers in all steps, their widest sums over 64 × 9 terms, behind a division by α.
    largest = float(theirs.abs().max()) * max(1.0, scale)
    assert (x - theirs).abs().max() < float32_tolerance(largest, terms=64 * 9, layers=20 * num_steps)
