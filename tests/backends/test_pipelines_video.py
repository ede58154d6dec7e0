"""Video flow pipelines as kernels: Wan (one network and two experts) and LTX, beside their own `__call__`."""

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline

import treesearch as ts
from tests.support import tiny
from treesearch.backends.base.live import peak
from treesearch.backends.pipelines import DiffusersKernel, memory
from treesearch.backends.pipelines.ltx import LTX
from treesearch.backends.pipelines.settings import Settings
from treesearch.backends.pipelines.wan import Wan
from treesearch.rewards.base import as_reward

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
T = 4
PROMPTS = ["a cat", "two red dogs"]
SIZE = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 32}
STATES = {"wan": (4, 3, 8, 8), "wan_euler": (4, 3, 8, 8), "wan_experts": (4, 3, 8, 8), "ltx": (3 * 8 * 8, 8)}


@pytest.fixture(scope="module")
def load(tiny_root, tmp_path_factory):
    """Kernel of a checkpoint; `wan_experts` is `wan_euler` with a second transformer below timestep 700."""

    def two_experts():
        folder = tmp_path_factory.mktemp("video") / "wan_experts"
        parts = pipeline("wan_euler").components
        with tiny.seeded():
            torch.manual_seed(1)
            second = tiny.stirred(type(parts["transformer"]).from_config(parts["transformer"].config))
        WanPipeline(**parts | {"transformer_2": second}, boundary_ratio=0.7).save_pretrained(folder)
        return folder

    def folder(name):
        if name not in folders:
            folders[name] = str(two_experts() if name == "wan_experts" else tiny.checkpoint(name, tiny_root))
        return folders[name]

    def pipeline(name):
        pipe = DiffusionPipeline.from_pretrained(folder(name))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def kernel(name, num_steps=T, **settings):
        return DiffusersKernel.from_pretrained(folder(name), num_steps=num_steps, device="cpu", **SIZE | settings)

    folders = {}
    kernel.pipeline = pipeline
    return kernel


def wrap(pipe, num_steps=T, **settings):
    return DiffusersKernel(pipe, num_steps=num_steps, device="cpu", **SIZE | settings)


def cond_of(kernel, prompts):
    encoded = kernel.encode(prompts)
    return {k: getattr(v, "value", v) for k, v in encoded.items()} | {"task": torch.arange(len(prompts))}


def noises(kernel, n=2):
    """z[0] makes x_T, z[i] belongs to the i-th step."""
    return torch.randn(kernel.num_steps + 1, n, *kernel.state_shape, generator=torch.Generator().manual_seed(3))


def walk(kernel, z, prompts):
    cond = cond_of(kernel, prompts)
    x = kernel.prior(z[0], cond)
    for i, t in enumerate(range(kernel.num_steps, 0, -1)):
        x = kernel.transition(x, torch.full((len(x),), t), cond).sample(z[i + 1])
    return x


def close(x, y, tolerance):
    return x.shape == y.shape and (x - y).abs().max() <= tolerance * max(1.0, float(y.abs().max()))


def assert_same_chain(kernel, pipe, **call):
    """Latents and frames of the pipeline's own loop, to 1e-4 of their scale."""
    z = noises(kernel)
    x = walk(kernel, z, PROMPTS)
    call = {"prompt": PROMPTS, "num_inference_steps": T, **SIZE, **call}
    seen = []
    keep = lambda pipe, step, t, kept: seen.append(kept["latents"]) or {}  # noqa: E731
    frames = pipe(latents=z[0].clone(), output_type="pt", callback_on_step_end=keep, **call).frames
    assert len(seen) == T
    assert close(x, seen[-1], 1e-4)
    assert close(kernel.decode(x), frames, 1e-4)
    assert frames.shape == (2, 5, 3, 32, 32)
    assert float(frames.std()) > 0.02
    assert not close(x[:1], x[1:], 0.1)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["wan_euler", "wan_experts", "ltx"])
def test_without_noise_is_the_pipeline_s_own(name, scale, load):
    kernel = load(name, eta=0.0, guidance_scale=scale)
    assert kernel.state_shape == STATES[name]
    assert kernel.rows_per_nfe == (2 if scale > 1 else 1)
    assert not kernel.stochastic[1:].any()
    assert_same_chain(kernel, load.pipeline(name), guidance_scale=scale)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("wan_euler", {"negative_prompt": "blur", "max_sequence_length": 40}),
        ("ltx", {"negative_prompt": "blur", "max_sequence_length": 40, "guidance_rescale": 0.7}),
    ],
)
def test_what_a_user_passes_through(name, call, load):
    kernel = load(name, eta=0.0, **call)
    assert_same_chain(kernel, load.pipeline(name), **call | {"negative_prompt": ["blur"] * 2})
    plain, z = load(name, eta=0.0), noises(kernel)
    assert not close(walk(kernel, z, PROMPTS), walk(plain, z, PROMPTS), 0.1)


def test_the_grid_is_unipc_s_and_its_solver_is_not_used(load):
    kernel, pipe = load("wan", eta=0.0), load.pipeline("wan")
    pipe.scheduler.set_timesteps(T)
    schedule = kernel.chain.schedule
    assert torch.equal(schedule.timestep.flip(0), pipe.scheduler.timesteps)
    assert torch.equal(schedule.sigma.flip(0).float(), pipe.scheduler.sigmas)
    torch.testing.assert_close(schedule.alpha, 1 - schedule.sigma)
    # Of order 1 and without its corrector UniPC has no memory, and is the same step.
    pipe.scheduler.register_to_config(solver_order=1, disable_corrector=list(range(T)))
    pipe.scheduler.disable_corrector = list(range(T))
    assert_same_chain(kernel, pipe)


def test_ltx_shifts_its_grid_by_the_number_of_tokens(load):
    small, large = load("ltx").chain.schedule, load("ltx", height=64).chain.schedule
    assert float(small.sigma[1]) == pytest.approx(0.1)  # shift_terminal
    assert float(large.sigma[2]) > float(small.sigma[2]) + 1e-3


def test_one_expert_takes_the_noisy_steps_and_one_the_rest(load, monkeypatch):
    kernel = load("wan_experts")
    timesteps = kernel.chain.timestep[1:]
    early = int((timesteps >= 700).sum())
    assert 0 < early < T
    told = {"transformer": [], "transformer_2": []}
    for name, seen in told.items():
        expert = getattr(kernel.pipe, name)
        spy = lambda *a, f=expert.forward, s=seen, **k: s.append(k["timestep"]) or f(*a, **k)  # noqa: E731
        monkeypatch.setattr(expert, "forward", spy)
    t = torch.arange(1, T + 1)
    kernel.transition(torch.randn(T, *kernel.state_shape), t, cond_of(kernel, ["a", "b", "c", "d"]))
    for name, rows in (("transformer", timesteps[-early:]), ("transformer_2", timesteps[:-early])):
        assert torch.equal(torch.cat(told[name]), torch.cat([rows, rows]))


def test_a_time_for_every_token_is_one_time(load):
    """Wan 2.2 TI2V without an image."""
    pipe = load.pipeline("wan_euler")
    pipe.register_to_config(expand_timesteps=True)
    assert_same_chain(wrap(pipe, eta=0.0), pipe)


def test_ltx_decoders_that_are_told_a_time(load):
    """Also with a mean and a scale of the latents, which LTX keeps in buffers."""
    pipe = load.pipeline("ltx")
    plain = pipe.vae
    with tiny.seeded():
        pipe.vae = tiny.stirred(AutoencoderKLLTXVideo.from_config(plain.config, timestep_conditioning=True))
    pipe.vae.latents_mean += torch.linspace(-0.5, 0.5, 8)
    pipe.vae.latents_std *= torch.linspace(0.5, 2.0, 8)
    kernel = wrap(pipe, eta=0.0)
    assert_same_chain(kernel, pipe)
    x = torch.randn(2, *kernel.state_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernel.decode(x), kernel.decode(x))
    assert torch.equal(kernel.family.pack(kernel.family.unpack(x)), x)


@pytest.mark.parametrize("name", ["wan", "wan_experts", "ltx"])
def test_rows_do_not_depend_on_their_batch(name, load):
    """Mixed levels and mixed prompts in one batch, and each row alone."""
    kernel = load(name)
    prompts = ["a cat", "two red dogs", "a cat", ""]
    cond = cond_of(kernel, prompts)
    per_row = {k for k, v in kernel.encode(prompts).items() if not hasattr(v, "value")} | {"task"}

    def rows(i):
        return {k: v[i : i + 1] if k in per_row else v for k, v in cond.items()}

    x = torch.randn(4, *kernel.state_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([4, 1, 3, 2])
    law = kernel.transition(x, t, cond)
    for i in range(4):
        one = kernel.transition(x[i : i + 1], t[i : i + 1], rows(i))
        assert close(law.mean[i : i + 1], one.mean, 1e-5)
        assert close(law.endpoint[i : i + 1], one.endpoint, 1e-5)
    assert not close(kernel.transition(x[:1], t[:1], rows(1)).mean, law.mean[:1], 1e-3)  # the prompt matters
    assert not close(kernel.transition(x[:1], t[:1] - 1, rows(0)).endpoint, law.endpoint[:1], 1e-3)  # and the level


@pytest.mark.parametrize("method", [ts.BestOfN(), ts.DiffusionTreeSampling(wave=3)], ids=["bon", "dts"])
@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_searches(name, method, load):
    """Two prompts in shared batches find what the first finds alone."""

    def mean_of_frames(videos):
        return videos.double().flatten(1).mean(1)

    kernel, budget = load(name), 4 * T
    both, alone = (
        ts.search(kernel, as_reward(mean_of_frames), method, prompts=PROMPTS[:n], budget=ts.Budget(nfe=n * budget),
                  batch_size=3)
        for n in (2, 1)
    )  # fmt: skip
    assert both.cost.rows == 2 * both.cost.nfe
    for task in both.tasks:
        assert task.samples.shape[1:] == (5, 3, 32, 32)
        assert 0 <= float(task.samples.min()) < float(task.samples.max()) <= 1
        torch.testing.assert_close(task.rewards, mean_of_frames(task.samples), atol=1e-5, rtol=0)
    assert close(both.tasks[0].samples, alone.tasks[0].samples, 1e-4)
    assert not close(both.tasks[0].samples[:1], both.tasks[1].samples[:1], 1e-3)


@pytest.mark.parametrize("name", ["wan_experts", "ltx"])
def test_nothing_leaks_between_calls(name, load):
    """Other prompts in between change neither the chain nor the pipeline."""
    pipe = load.pipeline(name)
    call = {"prompt": PROMPTS, "num_inference_steps": 2, "output_type": "latent", **SIZE}
    theirs = pipe(generator=torch.Generator().manual_seed(0), **call).frames
    kernel = wrap(pipe)
    z = noises(kernel)
    first = walk(kernel, z, PROMPTS)
    walk(kernel, z[:, :1], ["something else"])
    kernel.decode(z[0])
    assert torch.equal(walk(kernel, z, PROMPTS), first)
    assert torch.equal(pipe(generator=torch.Generator().manual_seed(0), **call).frames, theirs)


def test_decoding_in_parts_with_gradients(load):
    kernel, whole = load("wan", decode_batch=1), load("wan")
    x = torch.randn(3, *kernel.state_shape, generator=torch.Generator().manual_seed(0))
    slopes = []
    for each in (kernel, whole):
        leaf = x.clone().requires_grad_()
        slopes += torch.autograd.grad(each.decode(leaf).sum(), leaf)
    assert close(kernel.decode(x), whole.decode(x), 1e-5)
    assert close(*slopes, 1e-4)


@pytest.mark.parametrize("name", ["wan_experts", "ltx"])
def test_half_precision_and_gradients(name, load):
    kernel = load(name, dtype="bfloat16")
    x = torch.randn(2, *kernel.state_shape, requires_grad=True)
    law = kernel.transition(x, torch.tensor([4, 1]), cond_of(kernel, PROMPTS))
    assert law.mean.dtype == torch.float32
    (slope,) = torch.autograd.grad(law.endpoint.sum(), x)
    assert slope.flatten(1).abs().amax(1).min() > 0
    assert kernel.decode(law.endpoint.detach()).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wan", {"num_frames": 6}, "num_frames is 6, expected 1 plus a multiple of 2 for WanPipeline: 5 or 7"),
        ("wan", {"num_frames": 0}, "num_frames is 0, .*: 1$"),
        ("wan", {"height": 36}, "height is 36, expected a multiple of 16 for WanPipeline: 32 or 48"),
        ("wan", {"guidance_rescale": 0.5}, "WanPipeline takes no guidance_rescale"),
        ("ltx", {"num_frames": 4}, "num_frames is 4, expected 1 plus a multiple of 2 for LTXPipeline: 3 or 5"),
        ("ltx", {"width": 30}, "width is 30, expected a multiple of 32 for LTXPipeline: 32$"),
        ("ltx", {"num_steps": 1}, "num_steps is 1, expected at least 2: shift_terminal"),
    ],
)
def test_sizes_that_do_not_fit(name, settings, message, load):
    with pytest.raises(ValueError, match=message):
        load(name, **settings)


def test_sizes_are_the_pipeline_s_own_by_default(load):
    wan, ltx = Wan(load.pipeline("wan"), Settings()), LTX(load.pipeline("ltx"), Settings())
    assert wan.state_shape == (4, 41, 120, 208)  # 81 frames of 480 x 832
    assert ltx.latent_size == (81, 128, 176)  # 161 frames of 512 x 704
    assert wan.encode(["a"])["prompt_embeds"].shape[1] == 512
    assert ltx.encode(["a"])["prompt_mask"].shape[1] == 128


def test_what_is_refused_by_name(load):
    lone = load.pipeline("wan")
    lone.register_to_config(boundary_ratio=0.9)
    with pytest.raises(ValueError, match=r"boundary_ratio is 0.9, but there is no transformer_2"):
        wrap(lone)
    noisy = load.pipeline("ltx")
    noisy.vae.register_to_config(decoder_inject_noise=(True, False, False))
    with pytest.raises(ValueError, match=r"the decoder of this LTX draws noise \(decoder_inject_noise\)"):
        wrap(noisy)
    packed = load.pipeline("ltx")
    packed.transformer.register_to_config(patch_size=2)
    with pytest.raises(ValueError, match=r"packs patches of \(1, 2\) latents into a token, expected \(1, 1\)"):
        wrap(packed)
    inverted = load.pipeline("wan")
    inverted.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="invert_sigmas=True is not supported"):
        wrap(inverted)


def test_a_step_of_two_experts_can_be_planned_by_shapes(load):
    shadow, encoded = load("wan_experts").shadow(), {}
    peak(lambda: encoded.update(shadow.encode(["a"])))
    assert peak(lambda: memory.step(shadow, encoded, 4)) > peak(lambda: memory.step(shadow, encoded, 2))


@pytest.mark.parametrize("name", ["wan", "wan_experts", "ltx"])
def test_the_networks_are_those_that_a_step_calls(load, name):
    kernel, called = load(name), []
    networks = kernel.network if name == "wan_experts" else (kernel.network,)
    assert len(set(networks)) == (2 if name == "wan_experts" else 1)
    hooks = [network.register_forward_hook(lambda network, *_: called.append(network)) for network in networks]
    cond = cond_of(kernel, PROMPTS)
    kernel.transition(torch.zeros(2, *kernel.state_shape), torch.tensor([T, 1]), cond)
    for hook in hooks:
        hook.remove()
    assert set(called) == set(networks)
