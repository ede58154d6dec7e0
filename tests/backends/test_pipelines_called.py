"""Pipelines run by their own call, one step at a time, beside that call in one piece."""

import copy
import functools

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

import treesearch as ts
from tests.support import tiny, tiny_called  # noqa: F401  the builders
from treesearch.backends.base.live import LiveBytes
from treesearch.backends.pipelines import DiffusersKernel, memory
from treesearch.backends.pipelines.calls import Remembering
from treesearch.backends.pipelines.families import FAMILIES
from treesearch.backends.pipelines.listed import CALLED
from treesearch.backends.pipelines.proof import is_memoryless
from treesearch.rewards.base import as_reward

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
T = 4
PROMPTS = ["a cat", "two red dogs beside a house"]
SMALL, LARGE = {"height": 16, "width": 32}, {"height": 32, "width": 64}
PLAIN = {"use_resolution_binning": False}
SETTINGS = {
    "pixart_alpha": SMALL | {"network_inputs": PLAIN},
    "pixart_sigma": SMALL | {"network_inputs": PLAIN},
    "sana": LARGE | {"network_inputs": PLAIN | {"complex_human_instruction": None}},
    "lumina": LARGE,
    "lumina2": LARGE | {"network_inputs": {"system_prompt": "draw"}},
    "chroma": SMALL,
    "aura_flow": SMALL,
    "cogview3": SMALL,
    "cogview4": SMALL,
    "hunyuan_dit": LARGE | {"network_inputs": PLAIN},
    "cogvideox": SMALL | {"num_frames": 9, "max_sequence_length": 64},
    "hunyuan_video": LARGE
    | {"num_frames": 5, "network_inputs": {"prompt_template": {"template": "{}", "crop_start": 0}}},
    "bria": SMALL,
    "ovis": SMALL,
    "prx": SMALL | {"network_inputs": PLAIN | {"skip_text_cleaning": True}},
    "mochi": {"height": 32, "width": 32, "num_frames": 7},
    "skyreels": {"height": 32, "width": 32, "num_frames": 5},
    "latte": SMALL | {"network_inputs": {"video_length": 2}},
}
PICTURE = Image.fromarray((torch.arange(16 * 32 * 3).reshape(16, 32, 3) % 251).byte().numpy())
SETTINGS |= {
    "sd3_controlnet": SMALL | {"control_image": PICTURE, "control_scale": 0.8},
    "flux_controlnet": SMALL | {"control_image": PICTURE, "control_scale": 0.8},
    "qwen_controlnet": SMALL | {"control_image": PICTURE},
    "cogview4_control": SMALL | {"control_image": PICTURE},
    "cogvideox_i2v": SETTINGS["cogvideox"] | {"image": PICTURE},
}
STATES = {
    **dict.fromkeys(
        [
            "pixart_alpha",
            "pixart_sigma",
            "aura_flow",
            "cogview3",
            "cogview4",
            "prx",
            "sd3_controlnet",
            "cogview4_control",
        ],
        (4, 8, 16),
    ),
    **dict.fromkeys(["chroma", "bria", "ovis", "flux_controlnet", "qwen_controlnet"], (32, 16)),
    **dict.fromkeys(["lumina", "lumina2", "hunyuan_dit"], (4, 4, 8)),
    **{"sana": (4, 16, 32), "mochi": (12, 2, 4, 4), "skyreels": (4, 3, 8, 8)},
    **{"cogvideox": (3, 4, 4, 8), "cogvideox_i2v": (3, 4, 4, 8), "hunyuan_video": (4, 2, 4, 8), "latte": (4, 2, 8, 16)},
}
ROWS = dict.fromkeys(SETTINGS, 2) | dict.fromkeys(["hunyuan_video", "flux_controlnet", "qwen_controlnet"], 1)
SHARES = dict.fromkeys(SETTINGS, "all") | {"aura_flow": "level", "hunyuan_dit": "level", "prx": "none"}
"""Which rows share a call: some take one timestep for all, one a single row."""


@pytest.fixture(scope="module")
def pipeline(tiny_root):
    """Pipeline of a checkpoint, loaded once: a kernel leaves it as it was."""

    @functools.cache
    def of(name):
        pipe = DiffusionPipeline.from_pretrained(tiny.checkpoint(name, tiny_root))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return of


@pytest.fixture(scope="module")
def kernel(pipeline):
    """Kernel of a checkpoint without noise, made once."""

    @functools.cache
    def of(name):
        return wrap(pipeline(name), name, eta=0.0)

    return of


def wrap(pipe, name, **settings):
    given = SETTINGS[name] | settings
    return DiffusersKernel(pipe, **{"num_steps": T, "device": "cpu"} | given)


def cond_of(kernel, prompts):
    encoded = kernel.encode(prompts)
    return {k: getattr(v, "value", v) for k, v in encoded.items()} | {"task": torch.arange(len(prompts))}


def walk(kernel, x_T, cond):
    x = kernel.prior(x_T, cond)
    for t in range(kernel.num_steps, 0, -1):
        x = kernel.transition(x, torch.full((len(x),), t), cond).mean
    return x


def noises(kernel, n=2):
    return torch.randn(n, *kernel.state_shape, generator=torch.Generator().manual_seed(3))


def drawn(pipe, name, noise, **call):
    """By the pipeline's own call, a prompt at a time; pictures are the modes of what their encoder says."""
    given = {"controlnet_conditioning_scale" if k == "control_scale" else k: v for k, v in SETTINGS[name].items()}
    given = {"num_inference_steps": T, "output_type": "pt"} | given.pop("network_inputs", {}) | given | call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        each = [pipe(prompt=[p], latents=x[None], **given) for p, x in zip(PROMPTS, noise.clone(), strict=True)]
    return torch.cat([next(iter(found.values())) for found in each])


@pytest.mark.parametrize("name", SETTINGS)
def test_without_noise_is_the_pipeline_s_own(name, pipeline, kernel):
    k = kernel(name)
    assert (k.state_shape, k.rows_per_nfe, k.family.shares) == (STATES[name], ROWS[name], SHARES[name])
    ours = k.decode(walk(k, noises(k), cond_of(k, PROMPTS)))
    theirs = drawn(pipeline(name), name, noises(k))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4
    assert float(theirs.std()) > 0.02


@pytest.mark.parametrize(
    ("name", "settings", "call", "rows"),
    [
        ("pixart_sigma", {"guidance_scale": 1.0}, {"guidance_scale": 1.0}, 1),
        ("sana", {"guidance_scale": 2.0, "negative_prompt": "blur"}, {"negative_prompt": ["blur"]}, 2),
        ("lumina2", {"negative_prompt": "blur"}, {"negative_prompt": ["blur"]}, 2),
        ("hunyuan_video", {"negative_prompt": "blur"}, {"negative_prompt": ["blur"]}, 2),
    ],
)  # fmt: skip
def test_guidance(name, settings, call, rows, pipeline):
    extra = {"true_cfg_scale": 3.0} if name == "hunyuan_video" else {}
    inputs = SETTINGS[name].get("network_inputs", {}) | extra
    k = wrap(pipeline(name), name, eta=0.0, network_inputs=inputs, **settings)
    assert k.rows_per_nfe == rows
    scale = {"guidance_scale": settings["guidance_scale"]} if "guidance_scale" in settings else {}
    theirs = drawn(pipeline(name), name, noises(k), **call | extra | scale)
    assert (k.decode(walk(k, noises(k), cond_of(k, PROMPTS))) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_do_not_depend_on_their_batch(name, kernel):
    k, prompts = kernel(name), [*PROMPTS, ""]
    x, t = noises(k, 8), torch.tensor([3, 1, 2, 3, 1, 2, 3, 1])
    rows = torch.arange(8) % 3
    together = k.encode(prompts)
    cond = {key: getattr(v, "value", None) if hasattr(v, "value") else v[rows] for key, v in together.items()}
    law = k.transition(x, t, cond | {"task": rows})
    for i in range(8):
        alone = k.transition(x[i : i + 1], t[i : i + 1], cond_of(k, [prompts[rows[i]]]))
        for part in ("mean", "endpoint"):
            a, b = getattr(law, part)[i], getattr(alone, part)[0]
            assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))
    other = k.transition(x[:1], t[:1], cond_of(k, [PROMPTS[1]]))
    assert (other.mean - law.mean[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sana", "aura_flow", "cogvideox"])
def test_nothing_leaks_between_calls(name, pipeline, kernel):
    pipe, k = pipeline(name), kernel(name)
    before, settings = torch.get_rng_state(), dict(pipe.scheduler.config)
    theirs, noise = drawn(pipe, name, noises(k)), noises(k)
    first = walk(k, noise, cond_of(k, PROMPTS))
    walk(k, noise[:1], cond_of(k, ["something else"]))
    searched = wrap(pipe, name)
    bright = as_reward(lambda samples: samples.flatten(1).mean(1), "bright")
    ts.search(searched, bright, ts.FeynmanKac(num_particles=2), prompts=["a", "b"], budget=ts.Budget(nfe=4 * T))
    assert torch.equal(walk(k, noise, cond_of(k, PROMPTS)), first)
    assert torch.equal(drawn(pipe, name, noise), theirs)
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(pipe.scheduler.config) == settings
    assert not any(network._forward_pre_hooks for network in k.family.networks)


@pytest.mark.parametrize("name", ["chroma", "cogvideox"])
def test_a_plan_s_peaks_are_measured(name, kernel):
    """Bytes of a step and of a decoding, by shapes on the meta device and by tensors on this one."""
    k = kernel(name)
    plan, encoded = k.memory_plan(2, prompts=PROMPTS[1:]), k.encode(PROMPTS[1:])
    for planned, work in ((plan.network, lambda: memory.step(k, encoded, 2)),
                          (plan.decode, lambda: memory.decoding(k, 2))):  # fmt: skip
        work()
        with LiveBytes("cpu") as live, torch.no_grad():
            work()
        assert 0.8 < planned / live.peak < 1.25


@pytest.mark.parametrize("name", ["pixart_sigma", "aura_flow", "cogvideox"])
def test_gradients_go_through_the_call(name, kernel):
    """Along a direction, the gradient of a picture's brightness and a difference of two."""
    k, cond, t = kernel(name), cond_of(kernel(name), PROMPTS), torch.tensor([2, 3])
    x = noises(k)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

    def value(step):
        return k.decode(k.transition(x + step * along, t, cond).endpoint).double().mean()

    step = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(value(step), step)
    h = 3e-3
    difference = (value(torch.tensor(h)) - value(torch.tensor(-h))) / (2 * h)
    assert abs(float(slope)) > 1e-3
    assert abs(float(slope - difference)) < 0.05 * abs(float(slope))


@pytest.mark.parametrize("name", ["lumina2", "hunyuan_dit"])
def test_loads_as_real_ones_do(name, tiny_root):
    """By a folder's name, text encoders run once and go, and many prompts of unequal lengths are one list."""
    k = DiffusersKernel.from_pretrained(
        str(tiny.checkpoint(name, tiny_root)), num_steps=2, device="cpu", text_encoders="free", **SETTINGS[name]
    )
    prompts = ["a" * (1 + i % 5) for i in range(18)]
    rows = k.encode(prompts)
    assert len(rows["lengths"]) == 18
    assert k.pipe.text_encoder is None
    assert k.encode(prompts)["text_0"].equal(rows["text_0"])
    cond = {key: getattr(v, "value", None) if hasattr(v, "value") else v[:1] for key, v in rows.items()}
    assert walk(k, noises(k, 1), cond).isfinite().all()
    assert k.decode(noises(k, 1)).isfinite().all()
    with pytest.raises(ValueError, match="freed"):
        k.encode(["another"])


@pytest.mark.parametrize("draws", [False, True])
def test_rows_that_mix_are_called_alone_and_noise_is_refused(draws, pipeline, monkeypatch):
    pipe = pipeline("sana")
    forward = type(pipe.transformer).forward

    @functools.wraps(forward)
    def mixing(self, hidden_states, **more):
        out = forward(self, hidden_states, **more)
        other = torch.randn_like(hidden_states) if draws else hidden_states.roll(1, 0)
        return (out[0] + 0.1 * other, *out[1:])

    monkeypatch.setattr(type(pipe.transformer), "forward", mixing)
    if not draws:
        assert wrap(pipe, "sana", guidance_scale=1.0).family.shares == "none"
        return
    with torch.random.fork_rng(), pytest.raises(ValueError, match=r"rows in a batch at .*, and alone, differ by"):
        wrap(pipe, "sana", guidance_scale=1.0)


def test_rows_that_share_a_time_are_called_level_by_level(pipeline, monkeypatch):
    """A network that reads the first row's time for all is called once a level, and each row has what it has alone."""
    pipe = pipeline("pixart_sigma")
    forward, calls = type(pipe.transformer).forward, []

    @functools.wraps(forward)
    def first(self, hidden_states, timestep, **more):
        calls.append(len(hidden_states))
        return forward(self, hidden_states, timestep=timestep[:1].expand_as(timestep), **more)

    monkeypatch.setattr(type(pipe.transformer), "forward", first)
    k = wrap(pipe, "pixart_sigma")
    assert k.family.shares == "level"
    x, t, cond = noises(k, 3), torch.tensor([1, 4, 1]), cond_of(k, ["a", "b", "c"])
    calls.clear()
    law = k.transition(x, t, cond)
    assert sorted(calls) == [2, 4]  # with those of ∅
    for i in range(3):
        alone = k.transition(x[i : i + 1], t[i : i + 1], cond_of(k, ["abc"[i]]))
        torch.testing.assert_close(law.mean[i], alone.mean[0], atol=1e-5, rtol=1e-5)


def test_a_solver_of_another_law_is_refused(pipeline, monkeypatch):
    pipe = pipeline("chroma")
    step = type(pipe.scheduler).step
    longer = functools.wraps(step)(lambda self, model_output, *a, **k: step(self, 1.1 * model_output, *a, **k))
    monkeypatch.setattr(type(pipe.scheduler), "step", longer)
    with pytest.raises(ValueError, match="states after step 1 of 4, and the pipeline's own, differ by"):
        wrap(pipe, "chroma")


@pytest.mark.parametrize(
    ("name", "inputs", "step"),
    [("lumina2", {"cfg_trunc_ratio": 0.5}, 1), ("lumina2", {"cfg_trunc_ratio": 0.8}, 1),
     ("cogvideox", {"use_dynamic_cfg": True}, 1)],
)  # fmt: skip
def test_guidance_that_counts_steps_is_refused(name, inputs, step, pipeline):
    """It is no function of x_t and t alone; the first, middle and last step are looked at."""
    with pytest.raises(ValueError, match=f"step {step} of 4, and the pipeline's own, differ by"):
        wrap(pipeline(name), name, network_inputs=inputs)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sana", {"height": 48}, "have to be divisible by 32"),
        ("latte", {"height": 24, "width": 20}, "have to be divisible by 8"),
        ("chroma", {"clip_skip": 1}, "ChromaPipeline takes no clip_skip"),
        ("sana", {"num_frames": 5}, "SanaPipeline takes no num_frames"),
        ("cogvideox", {"num_frames": 6}, r"num_frames is 6, of which CogVideoXPipeline makes \d+: ask for a size"),
        ("aura_flow", {"guidance_scale": 1.0, "negative_prompt": "x"}, "has no effect at guidance_scale=1: leave it"),
        ("aura_flow", {"network_inputs": {"colour": 1}}, "AuraFlowPipeline takes no 'colour' from you: choose"),
        ("aura_flow", {"network_inputs": {"latents": 1}}, "takes no 'latents' from you"),
        ("aura_flow", {"preview": "x"}, "takes no preview"),
        ("aura_flow", {"control_scale": 0.5}, "has no ControlNet"),
    ],
)
def test_bad_settings(name, settings, message, pipeline):
    with pytest.raises(ValueError, match=message):
        wrap(pipeline(name), name, **settings)


def test_bad_pipelines(pipeline):
    pipe = copy.copy(pipeline("aura_flow"))
    vars(pipe)["text_encoder"] = None
    with pytest.raises(OSError, match="AuraFlowPipeline has no text_encoder: load it whole"):
        wrap(pipe, "aura_flow")
    k = wrap(pipeline("aura_flow"), "aura_flow")
    with pytest.raises(ValueError, match="from_noise"):
        k.from_image(torch.rand(3, 16, 32), 0.5)
    with pytest.raises(ValueError, match="needs prompts"):
        k.transition(noises(k), torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="prompt 3 is int, expected text"):
        k.encode([3])


def test_a_controlnet_is_a_component_and_a_picture_is_encoded_once(tiny_root, pipeline, tmp_path, monkeypatch):
    net, file = pipeline("sd3_controlnet").controlnet, tmp_path / "edges.png"
    PICTURE.save(file)
    given = SETTINGS["sd3_controlnet"] | {"control_image": str(file), "num_steps": T, "device": "cpu"}
    folder = str(tiny.checkpoint("sd3", tiny_root))
    k = DiffusersKernel.from_pretrained(folder, components={"controlnet": net}, **given)
    assert type(k.pipe).__name__ == "StableDiffusion3ControlNetPipeline"
    encode, calls = type(k.pipe.vae).encode, []
    monkeypatch.setattr(type(k.pipe.vae), "encode", lambda *a, **more: calls.append(1) or encode(*a, **more))
    cond, x = cond_of(k, [*PROMPTS, ""]), noises(k, 3)
    for t in (4, 3, 2):
        x = k.transition(x, torch.full((3,), t), cond).mean
    assert len(calls) == 1
    other = wrap(pipeline("sd3_controlnet"), "sd3_controlnet", control_image=PICTURE.rotate(180))
    cond, t = cond_of(k, PROMPTS), torch.full((2,), 4)
    one, two = (each.transition(noises(k), t, cond).mean for each in (k, other))
    assert (one - two).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"needs control_image=\.\.\., a picture"):
        wrap(pipeline("sd3_controlnet"), "sd3_controlnet", control_image=None, control_scale=1.0)
    with pytest.raises(ValueError, match="AuraFlowPipeline takes no image"):
        wrap(pipeline("aura_flow"), "aura_flow", image=PICTURE)


def test_an_encoding_is_kept_for_the_picture_that_it_is_of(pipeline):
    """Pictures of one size, one after the other: each has the mode of its own law, and the last one costs nothing."""
    vae, kept = pipeline("sd3_controlnet").vae, {}
    one, two = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for picture in (one, two, one):
        law = Remembering(vae, kept).encode(picture).latent_dist
        assert torch.equal(law.sample(), vae.encode(picture).latent_dist.mode())
        assert Remembering(vae, kept).encode(picture.clone()).latent_dist is law
    assert isinstance(Remembering(vae, kept), type(vae))  # pipelines choose how to decode by it


@pytest.mark.parametrize(
    ("spacing", "steps", "lands"),
    [("linspace", 4, False), ("leading", 4, True), ("leading", 3, True), ("trailing", 4, True), ("trailing", 3, False)],
)
def test_ddim_on_each_of_its_grids(spacing, steps, lands, pipeline):
    """DDIM's own step is the chain's where it lands on the next of the grid, which it does not with linspace."""
    pipe = copy.copy(pipeline("pixart_sigma"))
    config = {"timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config, clip_sample=False)
    k = wrap(pipe, "pixart_sigma", num_steps=steps)
    assert is_memoryless(pipe.scheduler, k.chain.schedule) == lands


def test_every_row_is_a_family():
    assert set(CALLED) == {name for name, place in FAMILIES.items() if place == "called:Called"}
