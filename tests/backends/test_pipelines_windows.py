"""Guidance that holds for some of the steps: ControlNets between two shares of them, and layers that are skipped."""

import functools

import pytest
import torch
from diffusers import MultiControlNetModel, guiders
from diffusers.hooks import LayerSkipConfig
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch.utils._pytree import tree_leaves

from tests.backends.test_pipelines import assert_same_chain, cond_of, load, noises, pipeline
from tests.support import tiny, tiny_called, tiny_pictures  # noqa: F401  the builders
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.pipelines.windows import Steps, controls, skips

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
T = 8
PROMPTS = ["a red cube", "a small blue sphere on a table"]
EDGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def alone_and_together(kernel, levels, prompts=PROMPTS):
    """Means of rows at levels of their own in one batch, and of each alone; how often they differ."""
    x = torch.randn(len(levels), *kernel.state_shape, generator=torch.Generator().manual_seed(2))
    cond = cond_of(kernel, [prompts[i % 2] for i in range(len(levels))])
    together = kernel.transition(x, torch.tensor(levels), cond).mean
    for i, t in enumerate(levels):
        alone = kernel.transition(x[i : i + 1], torch.tensor([t]), cond_of(kernel, [prompts[i % 2]])).mean
        assert (together[i] - alone[0]).abs().max() < 1e-5 * max(1.0, float(alone.abs().max()))


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.25, 0.7), (0.0, 0.5), (0.26, 1.0)])
def test_a_controlnet_between_two_shares_of_the_steps(start, end, tiny_root, monkeypatch):
    window = {"control_guidance_start": start, "control_guidance_end": end}
    kernel = load("sd_controlnet", tiny_root, T, eta=0.0, control_image=EDGES, control_scale=0.8, **window)
    pipe, z = pipeline("sd_controlnet", tiny_root, ddim=True), noises(kernel.state_shape, steps=T)
    monkeypatch.setattr("tests.backends.test_pipelines.T", T)
    call = {"image": EDGES, "controlnet_conditioning_scale": 0.8, **window}
    assert_same_chain(kernel, pipe, z, monkeypatch, **call)
    alone_and_together(kernel, [8, 7, 5, 3, 1])


def test_a_controlnet_of_sdxl_has_a_window(tiny_root, monkeypatch):
    window = {"control_guidance_start": 0.25, "control_guidance_end": 0.7}
    kernel = load("sdxl_controlnet", tiny_root, T, eta=0.0, control_image=EDGES, control_scale=0.8, **window)
    pipe = pipeline("sdxl_controlnet", tiny_root, ddim=True)
    kernel = DiffusersKernel(pipe, num_steps=T, eta=0.0, device="cpu", **{k: getattr(kernel.family.settings, k) for k in
                             (*window, "control_image", "control_scale")})  # fmt: skip
    monkeypatch.setattr("tests.backends.test_pipelines.T", T)
    call = {"image": EDGES, "controlnet_conditioning_scale": 0.8, **window}
    assert_same_chain(kernel, pipe, noises(kernel.state_shape, steps=T), monkeypatch, **call)
    alone_and_together(kernel, [8, 7, 5, 3, 1])


def test_each_controlnet_has_a_window_of_its_own(tiny_root, monkeypatch):
    pipe = pipeline("sd_controlnet", tiny_root, ddim=True)
    other = pipeline("sd_controlnet", tiny_root).controlnet
    other.controlnet_mid_block.weight.data += 0.1
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, other])
    window = {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.4, 1.0]}
    images, scales = [EDGES, 1 - EDGES], [0.8, 1.2]
    settings = {"control_image": images, "control_scale": scales, **window}
    kernel = DiffusersKernel(pipe, num_steps=T, eta=0.0, device="cpu", **settings)
    monkeypatch.setattr("tests.backends.test_pipelines.T", T)
    call = {"image": images, "controlnet_conditioning_scale": scales, **window}
    assert_same_chain(kernel, pipe, noises(kernel.state_shape, steps=T), monkeypatch, **call)
    alone_and_together(kernel, [8, 6, 5, 3, 1])


@pytest.mark.parametrize("name", ["sd3_controlnet", "flux_controlnet", "qwen_controlnet"])
def test_a_controlnet_by_the_pipeline_s_call_has_a_window(name, tiny_root, monkeypatch):
    picture = Image.new("RGB", (32, 32), (200, 90, 30))
    window, size = {"control_guidance_start": 0.2, "control_guidance_end": 0.7}, {"height": 32, "width": 32}
    pipe = pipeline(name, tiny_root)
    given = {"num_steps": 5, "eta": 0.0, "device": "cpu", "control_image": picture, **size}
    kernels = [DiffusersKernel(pipe, **given, **each) for each in (window, {})]
    kernel, z = kernels[0], noises(kernels[0].state_shape, steps=5)
    for t in (5, 3, 1):  # the second and the third of five steps are inside
        rows, x = torch.full((2,), t), z[0]
        inside, always = (k.transition(x, rows, cond_of(k, PROMPTS)).mean for k in kernels)
        assert torch.equal(inside, always) == (t == 3)
    alone_and_together(kernel, [5, 4, 3, 2, 1])
    x = z[0][:1]
    for t in range(5, 0, -1):
        x = kernel.transition(x, torch.tensor([t]), cond_of(kernel, PROMPTS[:1])).mean
    call = {"num_inference_steps": 5, "control_image": picture, "output_type": "pt", **size, **window}
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    theirs = pipe(prompt=PROMPTS[:1], latents=z[0][:1].clone(), **call)[0]
    assert (kernel.decode(x) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [2.8, -1.0])
def test_skipped_layers_are_those_of_stable_diffusion_3(scale, tiny_root, monkeypatch):
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_scale": scale, "skip_layer_guidance_start": 0.1,
                "skip_layer_guidance_stop": 0.6}  # fmt: skip
    kernel = load("sd3", tiny_root, T, eta=0.0, guidance_scale=4.0, **skipping)
    assert kernel.rows_per_nfe == 3
    monkeypatch.setattr("tests.backends.test_pipelines.T", T)
    size = {"height": 32, "width": 32} if kernel.family.settings.height else {}
    z = noises(kernel.state_shape, steps=T)
    assert_same_chain(kernel, pipeline("sd3", tiny_root), z, monkeypatch, guidance_scale=4.0, **skipping, **size)
    alone_and_together(kernel, [8, 7, 4, 3, 1])
    plain = load("sd3", tiny_root, T, eta=0.0, guidance_scale=4.0)
    for t, alike in ((8, True), (7, False), (4, False), (3, True)):
        one, two = (k.transition(z[0], torch.full((2,), t), cond_of(k, PROMPTS)).mean for k in (kernel, plain))
        assert torch.equal(one, two) == alike


def weaker(kind, stop=1.0, **config):
    layers = LayerSkipConfig([0], fqn="auto", **config)
    if kind == "slg":
        return guiders.SkipLayerGuidance(guidance_scale=3.0, skip_layer_config=layers, skip_layer_guidance_start=0.0,
                                         skip_layer_guidance_stop=stop)  # fmt: skip
    return guiders.AutoGuidance(guidance_scale=3.0, auto_guidance_config=layers)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["slg", "auto"])
@pytest.mark.parametrize(("name", "stack"), [("qwen_image", "transformer_blocks"), ("z_image", "layers")])
def test_whole_layers_are_left_out_of_a_pass(name, stack, kind, tiny_root):
    """As by a network that lacks the layer; diffusers' own hooks fail here."""
    pipe, given = pipeline(name, tiny_root), {"height": 32, "width": 32}
    given |= {"max_sequence_length": 64} if name == "z_image" else {}
    guider, blocks = weaker(kind), getattr(pipe.transformer, stack)

    def passes(own):
        """What the network says in the passes of a step."""
        kernel = DiffusersKernel(pipe, num_steps=5, eta=0.0, device="cpu", guider=own, **given)
        cond, x, said = cond_of(kernel, PROMPTS), noises(kernel.state_shape, steps=5)[0], []
        hook = pipe.transformer.register_forward_hook(lambda *call: said.append(torch.stack(tree_leaves(call[-1]))))
        try:
            kernel.transition(x, torch.tensor([3, 3]), cond)
        finally:
            hook.remove()
        return kernel.rows_per_nfe, said

    rows, found = passes(guider)
    _, (given_text, absent) = passes(guiders.ClassifierFreeGuidance(guidance_scale=3.0))
    setattr(pipe.transformer, stack, torch.nn.ModuleList(list(blocks)[1:]))
    try:
        _, (given_less, absent_less) = passes(guiders.ClassifierFreeGuidance(guidance_scale=3.0))
    finally:
        setattr(pipe.transformer, stack, blocks)
    wanted = [given_text, absent, given_less] if kind == "slg" else [given_text, absent_less]
    assert rows == len(found) == len(wanted)
    for one, want in zip(found, wanted, strict=True):
        assert (one - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))
    assert (given_text - given_less).abs().max() > 1e-3
    assert not any("forward" in vars(block) for block in blocks)
    assert guider.num_conditions == rows


WINDOWS = {
    "sd_controlnet": (
        {"control_image": EDGES, "control_guidance_end": 0.5}, {"control_image": EDGES, "control_scale": 0.0}, [4, 3]
    ),
    "sdxl_controlnet": (
        {"control_image": EDGES, "control_guidance_end": 0.5}, {"control_image": EDGES, "control_scale": 0.0}, [4, 3]
    ),
    "sd3": (
        {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.6}, {}, [3, 2]
    ),
    "qwen_image": (
        {"guider": weaker("slg", stop=0.6)}, {"guider": guiders.ClassifierFreeGuidance(guidance_scale=3.0)}, [3]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_of_the_steps_that_are_taken_from_a_picture(name, tiny_root):
    """And those of the whole chain stay as they were."""
    windowed, without, inside = WINDOWS[name]
    size = {"height": 32, "width": 32} if name == "qwen_image" else {}
    kernels = [load(name, tiny_root, T, eta=0.0, **size, **settings) for settings in (windowed, without)]
    state = noises(kernels[0].state_shape, steps=T)[0]
    side = kernels[0].family.unpack(state).shape[-1] * kernels[0].pipe.vae_scale_factor if name != "qwen_image" else 32
    picture = Image.new("RGB", (side, side), (200, 90, 30))

    def open_(pair, steps):
        means = {t: [k.transition(state, torch.full((2,), t), cond_of(k, PROMPTS)).mean for k in pair] for t in steps}
        return [t for t, (one, two) in means.items() if not torch.equal(one, two)]

    before = open_(kernels, range(T, 0, -1))
    rooted = [kernel.from_image(picture, 0.5) for kernel in kernels]
    assert rooted[0].num_steps == T // 2
    assert open_(rooted, range(T // 2, 0, -1)) == inside
    assert open_(kernels, range(T, 0, -1)) == before
    assert max(before) > T // 2


def test_a_hook_s_own_call_of_a_layer_is_there_afterwards(tiny_root):
    pipe = pipeline("qwen_image", tiny_root)
    first = pipe.transformer.transformer_blocks[0]
    hook = first.forward = functools.partial(type(first).forward, first)
    kernel = DiffusersKernel(pipe, num_steps=5, device="cpu", height=32, width=32, guider=weaker("slg"))
    kernel.transition(noises(kernel.state_shape)[0], torch.tensor([3, 3]), cond_of(kernel, PROMPTS))
    assert vars(first).get("forward") is hook


def test_layers_are_back_after_an_exception(tiny_root, monkeypatch):
    pipe = pipeline("qwen_image", tiny_root)
    kernel = DiffusersKernel(pipe, num_steps=5, device="cpu", height=32, width=32, guider=weaker("slg"))
    cond, x, t = cond_of(kernel, PROMPTS), noises(kernel.state_shape)[0], torch.tensor([3, 3])
    first, last = kernel.transition(x, t, cond).mean, pipe.transformer.transformer_blocks[-1]
    forward, calls = type(last).forward, []

    def failing(*args, **kwargs):
        calls.append("forward" in vars(pipe.transformer.transformer_blocks[0]))
        if calls[-1]:
            raise MemoryError("none left")
        return forward(last, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", failing)
        with pytest.raises(MemoryError):
            kernel.transition(x, t, cond)
    assert calls == [False, False, True]
    assert "forward" not in vars(pipe.transformer.transformer_blocks[0])
    assert torch.equal(kernel.transition(x, t, cond).mean, first)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sd_controlnet", {"control_image": EDGES, "control_guidance_start": [0.1, 0.2]}, "2 values of control"),
        ("sd_controlnet", {"control_image": EDGES, "control_guidance_start": 0.5, "control_guidance_end": 0.5},
         "control_guidance_start=0.5 is not below control_guidance_end=0.5"),
        ("sd", {"control_guidance_end": 0.5}, "has no ControlNet for a control_guidance_start"),
        ("sd", {"skip_guidance_layers": [0]}, "StableDiffusionPipeline takes no skip_guidance_layers"),
        ("sd3", {"skip_guidance_layers": [9]}, r"skip_guidance_layers is \[9\], expected some of 0\.\.1"),
        ("sd3", {"skip_guidance_layers": [0], "guidance_scale": 1.0}, "has no effect at guidance_scale=1"),
        ("sd3", {"skip_layer_guidance_stop": 0.3}, r"give them, skip_guidance_layers=\[7, 8, 9\]"),
        ("qwen_image", {"guider": weaker("auto", dropout=0.5)}, "dropout=0.5, which draws anew in every call"),
        ("qwen_image", {"guider": guiders.SkipLayerGuidance(skip_layer_guidance_layers=9, skip_layer_guidance_stop=1)},
         r"layers \[9\] of transformer_blocks are left out, expected some of 0\.\.1"),
    ],
)  # fmt: skip
def test_what_has_no_window(name, settings, message, tiny_root):
    size = {"height": 32, "width": 32} if name == "qwen_image" else {}
    with pytest.raises(ValueError, match=message):
        load(name, tiny_root, **size, **settings)


def test_windows_of_steps_by_the_words_of_the_pipelines():
    assert [controls(i, 4, [0.25], [0.8])[0] for i in range(4)] == [0.0, 1.0, 1.0, 0.0]
    assert [skips(i, 10, 0.1, 0.4) for i in range(5)] == [False, False, True, True, False]
    schedule = Schedule.flow(torch.tensor([0.0, 0.3, 0.6, 1.0]), torch.tensor([300.0, 600.0, 900.0]))
    assert Steps(schedule).of(schedule.timestep[torch.tensor([2, 0, 1])]) == [0, 2, 1]
    with pytest.raises(ValueError, match="timestep 1000 is above the grid's, 900 at most"):
        Steps(schedule).of(torch.tensor([300.0, 1000.0]))
