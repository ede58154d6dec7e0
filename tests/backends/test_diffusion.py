"""`DiffusionKernel` is diffusers' DDIM and DDPM step, for rows at any mix of levels, alone and inside a search."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import diffusers
import diffusers.schedulers.scheduling_ddpm as ddpm_module
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import nn

import treesearch as ts
from tests.support.tolerance import float32_tolerance
from treesearch.backends.base import describe
from treesearch.backends.chains.diffusion import Chain, DiffusionKernel, to_endpoint
from treesearch.backends.chains.schedules import Schedule, respace
from treesearch.core.noise import normals
from treesearch.core.tree import ROOT

SHAPE, N, T = (2, 4, 4), 1000, 10
NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


class Toy(nn.Module):
    """A fixed smooth function of (x, t)."""

    def __init__(self, channels: int = SHAPE[0], seed: int = 0) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.register_buffer("count", torch.tensor(3))  # a buffer without axes, like BatchNorm's
        draw = torch.Generator().manual_seed(seed)
        for weight in self.mix.parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=draw)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(x) + (timestep / N).reshape(-1, 1, 1, 1))


def kernel_of(scheduler, model=None, num_steps: int = T, shape=SHAPE, **options) -> DiffusionKernel:
    """The kernel with a diffusers scheduler's settings."""
    config = scheduler.config
    final = None if config.get("set_alpha_to_one") is False else 1.0
    return DiffusionKernel(
        model or Toy().requires_grad_(False),
        state_shape=shape,
        schedule=Schedule.variance_preserving(
            scheduler.alphas_cumprod,
            num_steps,
            prediction=NAMES[config.prediction_type],
            spacing=config.timestep_spacing,
            offset=config.steps_offset if config.timestep_spacing == "leading" else 0,
            final_alpha=final,
        ),
        clip_sample=config.clip_sample_range if config.clip_sample else None,
        **options,
    )


def plain(eta: float = 1.0, num_steps: int = T, **options) -> DiffusionKernel:
    return kernel_of(
        DDIMScheduler(timestep_spacing="trailing", clip_sample=False), eta=eta, num_steps=num_steps, **options
    )


def noises(n: int = 3, num_steps: int = T) -> torch.Tensor:
    return torch.randn(num_steps + 1, n, *SHAPE, generator=torch.Generator().manual_seed(7))


def run(kernel: DiffusionKernel, z: torch.Tensor) -> list[torch.Tensor]:
    """Predicted endpoints of the chain, and x_0 last; z[t] is the noise of the step from t."""
    x, seen = z[0], []
    for t in range(kernel.num_steps, 0, -1):
        law = kernel.transition(x, torch.full((len(x),), t))
        seen.append(law.endpoint)
        x = law.sample(z[t])
    return [*seen, x]


def run_ddim(scheduler, model, z: torch.Tensor, eta: float) -> list[torch.Tensor]:
    x, seen = z[0], []
    for t, timestep in zip(range(len(z) - 1, 0, -1), scheduler.timesteps, strict=True):
        with torch.no_grad():
            output = model(x, timestep.expand(len(x)))
        output = getattr(output, "sample", output)
        step = scheduler.step(output, timestep, x, eta=eta, variance_noise=z[t] if eta else None)
        seen.append(step.pred_original_sample)
        x = step.prev_sample
    return [*seen, x]


def in_float64(scheduler, model):
    """The same scheduler and network in float64: in float32 diffusers loses 3e-4 in 1 - ᾱ_s - σ²."""
    scheduler, model = copy.deepcopy(scheduler), copy.deepcopy(model).double()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler, model


def assert_chains_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """To rounding, at the chain's scale: x̂_0 reaches |x_T|/√ᾱ_T = 600 where nothing clips it."""
    largest = max(1.0, max(float(x.abs().max()) for x in theirs))
    close = float32_tolerance(largest, 9 * SHAPE[0], 4 * T)  # a convolution and three sums of the law a step
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= close


GRIDS = [("leading", 0), ("leading", 1), ("trailing", 0)]


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_diffusers(prediction: str, eta: float) -> None:
    for (spacing, offset), to_one, clip in itertools.product(GRIDS, (True, False), (True, False)):
        scheduler = DDIMScheduler(
            prediction_type=prediction,
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=to_one,
            clip_sample=clip,
            clip_sample_range=0.8,
        )
        scheduler.set_timesteps(T)
        kernel = kernel_of(scheduler, eta=eta)
        ours = run(kernel, noises())
        assert_chains_equal(ours, run_ddim(*in_float64(scheduler, kernel.model), noises().double(), eta))


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm_step_is_diffusers(prediction: str, spacing: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for num_steps in (T, 7):  # 7 does not divide 1000
        scheduler = DDPMScheduler(prediction_type=prediction, timestep_spacing=spacing, clip_sample=clip)
        scheduler.set_timesteps(num_steps)
        kernel = kernel_of(scheduler, step="ddpm", num_steps=num_steps)
        reference, model = in_float64(scheduler, kernel.model)
        z, theirs = noises(num_steps=num_steps), []
        x = z[0].double()
        for t, timestep in zip(range(num_steps, 0, -1), scheduler.timesteps, strict=True):
            monkeypatch.setattr(ddpm_module, "randn_tensor", lambda *_, z=z, t=t, **__: z[t].double())
            step = reference.step(model(x, timestep.expand(len(x))), timestep, x)
            theirs.append(step.pred_original_sample)
            x = step.prev_sample
        assert_chains_equal(run(kernel, z), [*theirs, x])


def test_clipping_tells_ddim_from_ddpm() -> None:
    """A planted difference: without ε recomputed from the clipped x̂_0 the DDPM comparison above would fail."""
    scheduler = DDPMScheduler(clip_sample=True)
    ddim, ddpm = kernel_of(scheduler), kernel_of(scheduler, step="ddpm")
    assert (run(ddim, noises())[-2] - run(ddpm, noises())[-2]).abs().max() > 1e-2


def test_grid_is_diffusers_for_every_number_of_steps() -> None:
    for spacing in ("trailing", "linspace", "leading"):
        scheduler = DDIMScheduler(timestep_spacing=spacing)
        for num_steps in range(1, N + 1, 7):
            scheduler.set_timesteps(num_steps)
            # numpy.arange with a fractional step sometimes adds an entry below the last: T + 1 steps.
            assert respace(N, num_steps, spacing).flip(0).tolist() == scheduler.timesteps[:num_steps].tolist()


def test_mixed_levels_equal_one_by_one() -> None:
    kernel = plain()
    t = torch.tensor([1, 10, 4, 4, 7])
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    law, z = kernel.transition(x, t), torch.ones(5, *SHAPE)
    for i in range(5):
        alone = kernel.transition(x[i : i + 1], t[i : i + 1])
        largest = max(1.0, float(law.endpoint[i].abs().max()))
        close = float32_tolerance(largest, 9 * SHAPE[0], 4)  # a convolution and three sums of the law
        one = law.take(torch.tensor([i])).sample(z[:1])
        torch.testing.assert_close(one, alone.sample(z[:1]), atol=close, rtol=0)
        torch.testing.assert_close(law.endpoint[i], alone.endpoint[0], atol=close, rtol=0)


@pytest.mark.parametrize(
    ("eta", "final_alpha", "offset"), [(0.0, 1.0, 0), (0.3, 1.0, 0), (1.0, None, 1), (1.0, None, 0)]
)
def test_stochastic_tells_which_steps_have_variance(eta: float, final_alpha: float | None, offset: int) -> None:
    bars = DDIMScheduler().alphas_cumprod
    schedule = Schedule.variance_preserving(bars, T, final_alpha=final_alpha, spacing="leading", offset=offset)
    kernel = DiffusionKernel(Toy(), state_shape=SHAPE, schedule=schedule, eta=eta)
    x = torch.zeros(1, *SHAPE)
    moved = [
        bool(
            (
                kernel.transition(x, torch.tensor([t])).sample(x + 1) != kernel.transition(x, torch.tensor([t])).mean
            ).any()
        )
        for t in range(1, T + 1)
    ]
    assert describe(kernel).stochastic == (True, *moved)
    # ᾱ = 1 at the end, or the end of the grid reached already: the last step adds no noise.
    assert moved == [eta > 0 and final_alpha is None and offset == 1] + [eta > 0] * (T - 1)


def test_predictions_convert_into_each_other() -> None:
    draw = torch.Generator().manual_seed(2)
    x0, eps = torch.randn(2, 4, *SHAPE, generator=draw, dtype=torch.float64)
    bar = torch.tensor([0.999, 0.7, 0.2, 0.01], dtype=torch.float64).reshape(-1, 1, 1, 1)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    x = alpha * x0 + sigma * eps
    for prediction, output in {"epsilon": eps, "v": alpha * eps - sigma * x0, "sample": x0}.items():
        endpoint, noise = to_endpoint(prediction, output, x, alpha, sigma)
        torch.testing.assert_close(endpoint, x0)
        torch.testing.assert_close(noise, eps)


def build(model: nn.Module | None = None, alphas_cumprod=None, num_steps: int = T, **change) -> DiffusionKernel:
    """A kernel from settings of the chain and of its schedule."""
    bars = DDIMScheduler().alphas_cumprod if alphas_cumprod is None else alphas_cumprod
    chain = {name: change.pop(name) for name in ("eta", "step", "clip_sample") if name in change}
    schedule = Schedule.variance_preserving(bars, num_steps, **change)
    return DiffusionKernel(model or Toy(), state_shape=SHAPE, schedule=schedule, **chain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 1001}, r"num_steps is 1001, expected 1\.\.1000"),
        ({"num_steps": 0}, r"num_steps is 0, expected 1"),
        (
            {"num_steps": 1000, "spacing": "leading", "offset": 1},
            r"offset 1 gives timesteps 1\.\.1000, expected .* 0\.\.999",
        ),
        ({"spacing": "karras"}, "unknown spacing 'karras': choose leading"),
        ({"prediction": "v_prediction"}, "unknown prediction 'v_prediction': choose epsilon, v, sample, flow"),
        ({"final_alpha": 1.5}, "final_alpha is 1.5, expected .* to 1"),
        ({"alphas_cumprod": torch.linspace(0.1, 0.9, N)}, "never increase"),
        ({"alphas_cumprod": torch.linspace(0.9, 0.0, N)}, "the network must predict v or sample"),
        ({"eta": 1.5}, r"eta is 1.5, expected 0\.\.1"),
        ({"step": "ddpm", "eta": 0.5}, "step='ddpm' has eta = 1, got 0.5"),
        ({"step": "renoise", "eta": 0.5}, "step='renoise' has eta = 1, got 0.5"),
        ({"step": "dpmsolver++"}, r"unknown step 'dpmsolver\+\+': choose ddim, ddpm or renoise; solvers with memory"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x, t: x.repeat(1, 2, 1, 1), r"network returned shape \(1, 4, 4, 4\), expected \(1, 2, 4, 4\), like x"),
        (lambda x, t: (x,), "network returned tuple, expected"),
    ],
)
def test_a_network_of_another_shape_is_refused(model: object, message: str) -> None:
    """Learned variances double the channels."""
    with pytest.raises(ValueError, match=message):
        plain(model=model).transition(torch.zeros(1, *SHAPE), torch.tensor([3]))


def test_zero_terminal_snr_runs_with_v() -> None:
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False
    )
    scheduler.set_timesteps(T)
    for eta in (1.0, 0.9):
        kernel = kernel_of(scheduler, eta=eta)
        ours, theirs = run(kernel, noises()), run_ddim(*in_float64(scheduler, kernel.model), noises().double(), eta)
        if eta < 1:  # at 1, √(1 - ᾱ_s - σ²) is √0 here, and the NaN of a rounding error there
            assert_chains_equal(ours, theirs)
        assert all(x.isfinite().all() for x in ours)


def test_fingerprint_changes_with_weights_and_settings() -> None:
    bars = DDIMScheduler().alphas_cumprod
    changes = [
        {}, {"num_steps": 20}, {"eta": 0.5}, {"step": "ddpm"}, {"step": "renoise"}, {"prediction": "v"},
        {"spacing": "leading"}, {"spacing": "leading", "offset": 1}, {"final_alpha": None}, {"clip_sample": 1.0},
        {"alphas_cumprod": bars**1.1},
    ]  # fmt: skip
    prints = [build(**change).fingerprint for change in changes]
    prints.append(build(Toy(seed=1)).fingerprint)
    assert len(set(prints)) == len(prints)
    assert prints[0] == build().fingerprint
    assert build(Toy().forward).fingerprint is None


BUILD = """
import torch
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
model = torch.nn.Linear(3, 3)
model.weight.data, model.bias.data = torch.arange(9.0).reshape(3, 3), torch.zeros(3)
schedule = Schedule.variance_preserving(torch.linspace(0.99, 0.01, 50), 5)
kernel = DiffusionKernel(model, state_shape=(3,), schedule=schedule)
"""


def test_fingerprint_is_the_same_in_another_process() -> None:
    here: dict = {}
    exec(BUILD, here)
    there = subprocess.run(
        [sys.executable, "-c", BUILD + "print(kernel.fingerprint)"], capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here["kernel"].fingerprint


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "config",
    [
        {}, {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"final_sigmas_type": "sigma_min"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ],
)  # fmt: skip
def test_euler_on_any_grid(config: dict, prediction: str) -> None:
    """Euler's chain in σ/α, from its own prior, is ours without noise; also where T does not divide N."""
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        return
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction, beta_schedule="scaled_linear", **config)
    schedule, model, z = Schedule.of(scheduler, 7), Toy(), noises(num_steps=7)
    kernel = DiffusionKernel(model, state_shape=SHAPE, schedule=schedule, eta=0.0)
    ours = run(kernel, torch.cat([schedule.prior_std * z[:1], z[1:]]))[-1]
    scheduler.set_timesteps(7)
    x, largest = z[0] * scheduler.init_noise_sigma, 1.0
    for timestep, after in zip(scheduler.timesteps, scheduler.sigmas[1:], strict=True):
        largest = max(
            largest, float(x.abs().max() / (1 + after**2).sqrt())
        )  # what a step adds, as the next one sees it
        with torch.no_grad():
            output = model(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)))
        x = scheduler.step(output, timestep, x).prev_sample
    close = float32_tolerance(largest, 9 * SHAPE[0], 4 * 7)
    assert (ours / schedule.alpha[0] - x).abs().max() <= close


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["flow", "variance preserving"])
def test_covariance_error_halves_when_the_steps_double(kind: str, eta: float) -> None:
    """Exact scores of N(0, Λ): every step is linear, so the chain's covariance is known without drawing."""
    spread = torch.tensor([0.3, 0.7, 2.0], dtype=torch.float64)  # standard deviations

    def error(steps: int) -> torch.Tensor:
        if kind == "flow":
            schedule = Schedule.flow(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        else:
            bars = torch.cos(torch.linspace(0, 1.55, 20001, dtype=torch.float64)[1:]) ** 2
            schedule = Schedule.variance_preserving(bars, steps, prediction="v")
        chain = Chain(schedule, eta=eta)
        variance = torch.ones(3, dtype=torch.float64)
        for t in range(steps, 0, -1):
            alpha, sigma = schedule.alpha[t], schedule.sigma[t]
            gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)  # x̂_0 = gain x
            eps = (1 - alpha * gain) / sigma
            output = eps - gain if kind == "flow" else alpha * eps - sigma * gain
            law = chain.law(torch.ones(1, 3), torch.tensor([t]), output.float()[None])
            variance = law.mean[0].double() ** 2 * variance + law.std.double().flatten() ** 2
        return (variance / spread**2 - 1).abs().max()

    coarse, fine = error(100), error(200)
    assert 1.7 < coarse / fine < 2.3
    assert fine < 0.1


@pytest.mark.parametrize("sigma", [1.0, 0.4])
def test_flow_steps(sigma: float) -> None:
    """η = 0 is Euler's step, full renoising is x_s = α_s x̂_0 + σ_s z, and both are finite at σ = 1."""
    draw = torch.Generator().manual_seed(0)
    x, v, z = torch.randn(3, 2, 4, generator=draw)
    schedule = Schedule.flow(torch.tensor([0.0, 0.25, sigma], dtype=torch.float64))
    t = torch.tensor([2, 2])
    euler = Chain(schedule, eta=0.0).law(x, t, v)
    close = float32_tolerance(float((x.abs() + v.abs() + z.abs()).max()), 3, 3)  # three terms, three sums
    torch.testing.assert_close(euler.sample(z), x + (0.25 - sigma) * v, atol=close, rtol=0)
    renoised = Chain(schedule, step="renoise").law(x, t, v).sample(z)
    torch.testing.assert_close(renoised, 0.75 * (x - sigma * v) + 0.25 * z, atol=close, rtol=0)
    ancestral = Chain(schedule, eta=1.0).law(x, t, v)
    want = 0.25 / sigma * (sigma**2 - ((1 - sigma) / 0.75) ** 2 * 0.25**2) ** 0.5
    torch.testing.assert_close(ancestral.std.flatten(), torch.full((2,), want))


def brightness(samples: torch.Tensor) -> torch.Tensor:
    return samples.flatten(1).mean(1)


@pytest.mark.parametrize(
    ("eta", "method"),
    [
        (1.0, ts.DiffusionTreeSampling(branch_at=(T, 1))),  # the step 1 -> 0 adds no noise
        (1.0, ts.FeynmanKac(schedule=(5, 1, 0))),
        (0.0, ts.DiffusionTreeSearch(branch_at=(5,))),
        (0.0, ts.FeynmanKac(schedule=(5, 0))),
        (0.0, ts.FeynmanKac()),
        (0.0, ts.BeamSearch()),
        (0.0, ts.DiffusionTreeSampling()),
    ],
)
def test_branching_where_no_noise_follows_is_refused(eta: float, method: object) -> None:
    with pytest.raises(
        ValueError, match=r"deterministic below level.*identical copies: use BestOfN, a kernel with eta"
    ):
        ts.search(plain(eta), brightness, method, budget=ts.Budget(nfe=400))


def test_default_levels_skip_the_last_step() -> None:
    kernel = plain(num_steps=4)  # below five steps, the default is every level
    result = ts.search(kernel, brightness, ts.DiffusionTreeSampling(), budget=ts.Budget(nfe=80))
    assert set(result.tree.t.tolist()) == {5, 4, 3, 2, 0}
    result = ts.search(kernel, brightness, ts.FeynmanKac(), budget=ts.Budget(nfe=80))
    assert set(result.tree.t.tolist()) == {5, 3, 2, 0}


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip


def path_noise(tree: ts.Tree, leaves: np.ndarray, shape: tuple[int, ...], num_steps: int) -> torch.Tensor:
    """The noise along the path of each leaf: [0] for the prior, [t] for the step from t."""
    out = np.zeros((num_steps + 1, len(leaves), int(np.prod(shape))), np.float32)
    for i, node in enumerate(leaves):
        while node != ROOT:
            above = int(tree.parent[node])
            for t in range(int(tree.t[node]) + 1, min(int(tree.t[above]), num_steps) + 1):
                out[t, i] = normals(tree.key[[node]], np.array([t]), out.shape[2])
            if above == ROOT:
                out[0, i] = normals(tree.key[[node]], np.array([num_steps + 1]), out.shape[2])
            node = above
    return torch.from_numpy(out).reshape(num_steps + 1, len(leaves), *shape)


@pytest.mark.parametrize(
    "method",
    [
        ts.BestOfN(lam=0.0),
        ts.DiffusionTreeSampling(lam=0.0, widening_c=1.0, widening_alpha=0.6),
        ts.FeynmanKac(lam=0.0, num_particles=8, ess_threshold=1.0),
    ],
)
def test_untilted_search_is_the_diffusers_loop(unet: UNet2DModel, method: object) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(T)
    kernel = kernel_of(scheduler, unet, shape=(2, 8, 8), eta=0.7)
    result = ts.search(kernel, brightness, method, budget=ts.Budget(nfe=16 * T), batch_size=7)
    z = path_noise(result.tree, result.leaves, (2, 8, 8), T)
    theirs = run_ddim(*in_float64(scheduler, unet), z.double(), 0.7)[-1].float()
    # Some thirty sums a step, the widest over 9 × 32 terms, of values that are clipped at 1 in the end.
    torch.testing.assert_close(result.samples, theirs, atol=float32_tolerance(1, 9 * 32, 30 * T), rtol=0)
    assert result.cost.nfe <= 16 * T
    assert len(result.samples) >= 16


class Uneven(nn.Module):
    """A network whose rows depend on the number of rows, as BLAS kernels do in the last digits."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * len(x)


@pytest.mark.parametrize("uneven", [True, False])
def test_batch_invariant_rows_do_not_depend_on_their_batch(unet: UNet2DModel, uneven: bool) -> None:
    """Bitwise: on the CPU a row of a batch of fixed shape depends neither on its place nor on its neighbours."""
    kernel = plain(model=Uneven() if uneven else unet, num_steps=3, shape=(2, 8, 8))

    def samples(nfe: int, **options) -> torch.Tensor:
        result = ts.search(kernel, brightness, ts.BestOfN(), budget=ts.Budget(nfe=nfe), batch_size=16, **options)
        return result.tasks[0].samples

    few = samples(15, batch_invariant=True)
    assert torch.equal(few, samples(90, batch_invariant=True)[:5])
    assert torch.equal(few, samples(60, batch_invariant=True, prompts=["a", "b", "c"])[:5])
    assert not uneven or not torch.equal(samples(15), samples(90)[:5])
