"""What a user chooses and what a network holds: settings, adapters, caches, LoRA, compiled networks."""

from __future__ import annotations

import functools
import inspect
import math
from unittest.mock import MagicMock

import diffusers
import peft
import pytest
import torch
from diffusers import hooks

from tests.backends.test_pipelines import PROMPTS, SIZE, cond_of, noises, pipeline
from tests.support import tiny
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.pipelines.families import FAMILIES, family_of
from treesearch.backends.pipelines.settings import RULES, Settings, check

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]
SKIPPING = tuple(f"skip_layer_guidance_{part}" for part in ("scale", "start", "stop"))
NUMBERS = ("guidance_scale", "guidance_scale_2", "guidance_rescale", "eta", "strength", *SKIPPING)
WHOLE = ("height", "width", "num_frames", "max_sequence_length", "clip_skip", "num_steps", "decode_batch")
TEXTS = ("negative_prompt", "step", "text_encoders", "variant", "revision", "checkpoint", "device", "dtype")
FLAGS = ("tiling", "slicing", "compile", "channels_last")
NAMED = ("network_inputs", "components", "prompt_embeds", "sizes")
SCALES = ("control_scale", "control_guidance_start", "control_guidance_end")
PICTURES, GUIDERS, LISTS = ("image", "mask", "ip_adapter_image"), ("guider",), ("sigmas", "skip_guidance_layers")


@pytest.mark.parametrize("name", ["sdxl", "sd3", "wan_euler"])
def test_each_prompt_has_its_own_negative(name, tiny_root):
    """And SD3 the user's grid."""
    pipe, absent = pipeline(name, tiny_root), ["grey", "many small things"]
    size = {"height": 32, "width": 32, "num_frames": 5} if name == "wan_euler" else SIZE.get(name, {})
    grid = {"sigmas": [1.0, 0.7, 0.2]} if name == "sd3" else {}
    said = dict(zip(PROMPTS, absent, strict=True))
    kernel = DiffusersKernel(
        pipe, num_steps=3, eta=0.0, device="cpu", guidance_scale=3.0, negative_prompt=said, **size, **grid
    )
    noise, cond = noises(kernel.state_shape)[0], cond_of(kernel, PROMPTS)
    x = kernel.prior(noise)
    for t in (3, 2, 1):
        x = kernel.transition(x, torch.full((2,), t), cond).mean
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", **size, **grid}
    theirs = pipe(prompt=PROMPTS, negative_prompt=absent, latents=noise, **call)[0]
    assert (x - theirs).abs().max() < 1e-4 * max(1.0, float(theirs.abs().max()))


def test_every_setting_has_a_rule():
    """Objects aside, which their own readers check."""
    assert {*NUMBERS, *WHOLE, *TEXTS, *FLAGS, *NAMED, *PICTURES, *GUIDERS, *LISTS, *SCALES, "lora"} == set(RULES)
    taken = set(inspect.signature(DiffusersKernel.__init__).parameters)
    taken |= set(inspect.signature(DiffusersKernel.from_pretrained).parameters)
    assert taken - set(RULES) == {"self", "pipe", "preview", "control_image", "settings"}


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family not in ("modular:Modular", "called:Called")]
)
def test_defaults_are_those_of_the_pipeline_s_own_call(name):
    """Of the families written by hand; what they leave open they read from the call."""
    kind, default = getattr(diffusers, name), Settings()
    told = inspect.signature(kind.__call__).parameters
    for setting, value in vars(default).items():
        if setting in told and value is not None:
            assert value == told[setting].default, setting
    sides = {"config.patch_size": 1, "config.patch_size_t": 1}
    bare = type(name, (kind,), {"__getattr__": lambda self, part: MagicMock(**sides)})
    pipe = bare.__new__(bare)
    wanted = {
        "control_scale": "controlnet_conditioning_scale",
        "guidance_scale": "guidance_scale",
        "strength": "strength",
    }
    family = family_of(name)(pipe, default)
    for setting, argument in wanted.items():
        if argument in told:
            assert getattr(family, setting) == told[argument].default, setting


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (NUMBERS, (True, "1", [1.0], (1.0, 2.0), {}, torch.tensor(1.0), 1j)),
        (SCALES, (True, "1", [], (1.0, 2.0), [1.0, "2"], {}, torch.tensor(1.0))),
        (WHOLE, (True, 1.5, 8.0, "8", [8], math.nan, math.inf)),
        (TEXTS, (3, True, ["a", "b"], ("a",), b"a", {})),
        (("lora",), (3, True, ["a", "b"], ("a",), b"a", {3: 1.0})),
        (FLAGS, (1, 0, "no", [True])),
        (NAMED, (3, "a", [1], {1: 2})),
        (PICTURES, (3, [None], {})),
        (GUIDERS, (3, "cfg", {})),
        (LISTS, (3, "1.0", {}, [True], ["1.0"])),
    ],
)
def test_settings_of_another_kind(names, values):
    for name in names:
        for value in values:
            with pytest.raises(TypeError, match=rf"^{name} is .*, expected "):
                check({name: value})


@pytest.mark.parametrize("name", [*NUMBERS, *WHOLE])
def test_settings_out_of_range(name):
    """Below, above, not finite; what has no range of its own has it in the family."""
    anything = ("control_scale", SKIPPING[0], "height", "width", "num_frames")
    wrong = {"guidance_scale": [-1]} | {setting: [] for setting in anything}
    wrong = wrong.get(name, [-1, *([2] if name in ("guidance_rescale", "eta", "strength") else [])])
    endless = [math.nan, math.inf, -math.inf] if name in NUMBERS else []
    for value in [*wrong, *endless]:
        with pytest.raises(ValueError, match=rf"^{name} is .*, expected "):
            check({name: value})


@functools.cache
def opened(name, root):
    return pipeline(name, root)


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("sd", {"height": -16}, ValueError, "height is -16, expected a multiple of 8"),
        ("sd", {"width": 16.0}, TypeError, r"width is 16\.0 \(float\), expected a whole number"),
        ("sd", {"guidance_scale": [3.0, 5.0]}, TypeError, "guidance_scale is .*list.*, expected a number"),
        ("sd", {"guidance_scale": math.inf}, ValueError, "guidance_scale is inf"),
        ("sd", {"negative_prompt": ["a", "b"]}, TypeError, "negative_prompt is .*expected text, one for all prompts"),
        ("sd", {"network_inputs": {"crossattention": {}}}, ValueError, "takes no 'crossattention': choose sample"),
        ("sd", {"network_inputs": {"timestep": 3}}, ValueError, "'timestep', which the kernel fills in itself"),
        ("sdxl", {"clip_skip": 2}, ValueError, r"clip_skip is 2, expected 0\.\.1: the text encoder has 2 layers"),
        ("sd", {"clip_skip": 1}, ValueError, "clip_skip needs a text encoder with a `text_model`"),
        ("sd", {"num_steps": True}, TypeError, "num_steps is True"),
        ("sd", {"device": 0}, TypeError, "device is 0"),
        ("sd3", {"max_sequence_length": 513}, ValueError, r"max_sequence_length is 513, expected 1\.\.512"),
    ],
)
def test_settings_are_refused_when_a_kernel_is_made(name, settings, error, message, tiny_root):
    with pytest.raises(error, match=message):
        DiffusersKernel(opened(name, tiny_root), **{"num_steps": 2, "device": "cpu"} | SIZE.get(name, {}) | settings)


def ip_adapter(tiny_root):
    pipe = pipeline("sd", tiny_root)
    state = {"image_proj": {"proj.weight": torch.randn(128, 32), "proj.bias": torch.zeros(128),
                            "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}, "ip_adapter": {}}  # fmt: skip
    cross = [n for n in pipe.unet.attn_processors if n.endswith("attn2.processor")]
    for key, name in enumerate(cross):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("to_k_ip", "to_v_ip"):
            state["ip_adapter"][f"{2 * key + 1}.{part}.weight"] = torch.randn(width, 32)
    pipe.unet._load_ip_adapter_weights([state])
    return pipe


def unet(**config):
    return lambda root: diffusers.StableDiffusionPipeline(**tiny.sd_parts() | {"unet": tiny.text_unet(**config)})


def classes(root):
    net = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, norm_num_groups=8, num_class_embeds=10,
    )  # fmt: skip
    return diffusers.DDPMPipeline(net, diffusers.DDPMScheduler())


def flux_ip(root):
    pipe = pipeline("flux", root)
    pipe.transformer.config.encoder_hid_dim_type = "ip_image_proj"
    return pipe


def more_channels(name):
    def build(root):
        pipe = pipeline(name, root)
        pipe.transformer.register_to_config(in_channels=36)
        return pipe

    return build


def image_to_video(root):
    pipe = pipeline("wan_euler", root)
    pipe.transformer.register_to_config(image_dim=1280)
    return pipe


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (ip_adapter, r"has an IP-Adapter, .*: give it one, ip_adapter_image=.*pipe\.unload_ip_adapter\(\)"),
        (flux_ip, "FluxPipeline has an IP-Adapter"),
        (unet(in_channels=9), "network of 9 channels for latents of 4: it is made for inpainting"),
        (unet(num_class_embeds=10), "is conditioned on a class: say which, network_inputs="),
        (classes, "DDPMPipeline is conditioned on a class"),
        (unet(attention_type="gated"), "is a GLIGEN, which needs boxes"),
        (unet(addition_embed_type="image", encoder_hid_dim=32), "needs image_embeds with every call"),
        (more_channels("sd3"), "StableDiffusion3Pipeline has a network of 36 channels for latents of 4"),
        (more_channels("flux"), "FluxPipeline has a network of 36 channels for latents of 16"),
        (more_channels("wan_euler"), "WanPipeline has a network of 36 channels"),
        (more_channels("ltx"), "LTXPipeline has a network of 36 channels"),
        (more_channels("dit"), "DiTPipeline has a network of 36 channels"),
        (image_to_video, "begins from an image"),
    ],
)
def test_networks_that_need_more_than_they_are_handed(build, message, tiny_root):
    """At construction, and with what to do."""
    with pytest.raises(ValueError, match=message):
        DiffusersKernel(build(tiny_root), num_steps=2, device="cpu")


def test_a_class_that_is_said_is_handed_on():
    torch.manual_seed(0)
    pipe = classes(None)
    kernels = [
        DiffusersKernel(pipe, num_steps=2, device="cpu", network_inputs={"class_labels": torch.tensor([label])})
        for label in (1, 2)
    ]
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([2, 1, 2])
    one, two = (kernel.transition(x, t).mean for kernel in kernels)
    assert (one - two).abs().max() > 1e-4
    alone = kernels[0].transition(x[:1], t[:1]).mean
    torch.testing.assert_close(one[:1], alone, atol=1e-4, rtol=1e-5)


EVERYWHERE = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}
CACHES = {
    "PyramidAttentionBroadcastConfig": lambda: hooks.PyramidAttentionBroadcastConfig(
        **EVERYWHERE, current_timestep_callback=lambda: 500
    ),
    "MagCacheConfig": lambda: hooks.MagCacheConfig(
        threshold=0.5, num_inference_steps=6, mag_ratios=[1.0] * 6, retention_ratio=0.1
    ),
    "FirstBlockCacheConfig": lambda: hooks.FirstBlockCacheConfig(threshold=0.5),
    "TaylorSeerCacheConfig": lambda: hooks.TaylorSeerCacheConfig(
        cache_interval=3, max_order=1, disable_cache_before_step=1
    ),
    "FasterCacheConfig": lambda: hooks.FasterCacheConfig(**EVERYWHERE, current_timestep_callback=lambda: 500),
}


@pytest.mark.parametrize("name", CACHES)
def test_networks_with_memory(name, tiny_root):
    """Refused when a kernel is made, and when a search begins; well again once the cache is off."""
    pipe = opened("flux", tiny_root)
    kernel = DiffusersKernel(pipe, num_steps=2, device="cpu", **SIZE["flux"])
    message = rf"the transformer caches activations between calls \({name}\).*: pipe\.transformer\.disable_cache\(\)"
    pipe.transformer.enable_cache(CACHES[name]())
    try:
        for begin in (
            lambda: DiffusersKernel(pipe, num_steps=2, device="cpu", **SIZE["flux"]),
            lambda: kernel.encode(["a"]),
            lambda: kernel.prior(torch.zeros(1, *kernel.state_shape)),
        ):
            with pytest.raises(ValueError, match=message):
                begin()
    finally:
        pipe.transformer.disable_cache()
    assert kernel.encode(["a"])["prompt_embeds"].shape[0] == 1


def test_hooks_with_memory(tiny_root):
    """Put in by hand, and under torch.compile."""
    pipe = pipeline("flux", tiny_root)
    hooks.apply_first_block_cache(pipe.transformer, hooks.FirstBlockCacheConfig(threshold=0.5))
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match=r"transformer\..* has a hook with a memory \(FBCHeadBlockHook\)"):
        DiffusersKernel(pipe, num_steps=2, device="cpu", **SIZE["flux"])


TARGETS = {"text_encoder": ["q_proj", "v_proj"], "text_encoder_2": ["q_proj", "v_proj", "q", "v"]}
ATTENTION = {"sd": "cross_attention_kwargs", "sdxl": "cross_attention_kwargs"}
ATTENTION |= {"sd3": "joint_attention_kwargs", "flux": "joint_attention_kwargs"}


def adapted(name, root):
    """A pipeline with LoRA in its network and its text encoders."""
    pipe = pipeline(name, root, ddim=name == "sd")
    torch.manual_seed(0)
    network = "unet" if name in ("sd", "sdxl") else "transformer"
    for part in (network, "text_encoder", "text_encoder_2"):
        if (module := getattr(pipe, part, None)) is not None:
            targets = TARGETS.get(part, ["to_q", "to_v"])
            module.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False), "x")
    return pipe


@functools.cache
def with_lora(name, root):
    return adapted(name, root)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", ATTENTION)
def test_the_scale_of_a_lora_reaches_text_encoders(name, scale, tiny_root):
    """As in the pipeline's own loop; and the scales that a user set are left as they were."""
    pipe, steps = with_lora(name, tiny_root), 2
    pipe.text_encoder.set_adapter("x")
    layer = next(part for part in pipe.text_encoder.modules() if getattr(part, "scaling", None))
    layer.scaling["x"] = 0.7
    inputs = {ATTENTION[name]: {"scale": scale}}
    settings = {"guidance_scale": 3.0, **SIZE.get(name, {})}
    kernel = DiffusersKernel(pipe, num_steps=steps, eta=0.0, device="cpu", network_inputs=inputs, **settings)
    cond, z = cond_of(kernel, PROMPTS), noises(kernel.state_shape, steps=steps)
    assert layer.scaling["x"] == 0.7
    x = kernel.prior(z[0], cond)
    for t in range(steps, 0, -1):
        x = kernel.transition(x, torch.full((2,), t), cond).mean
    call = {"num_inference_steps": steps, "output_type": "latent", **settings, **inputs}
    y = pipe(PROMPTS, latents=z[0].clone(), **call).images
    assert (x - y).abs().max() < 1e-4 * max(1.0, float(y.abs().max()))


@pytest.fixture
def _untraced():
    """Wrappers of torch.compile that run what they wrap as it is."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("_untraced")
@pytest.mark.parametrize(("name", "part"), [("sd", "unet"), ("unconditional", "unet"), ("flux", "transformer")])
def test_compiled_networks(name, part, tiny_root):
    """The wrapper of torch.compile has no length, and hands attributes on."""
    pipe, plain = pipeline(name, tiny_root), opened(name, tiny_root)
    for each in (part, "vae"):
        if getattr(pipe, each, None) is not None:
            setattr(pipe, each, torch.compile(getattr(pipe, each), backend="eager"))
    kernels = [DiffusersKernel(each, num_steps=2, device="cpu", **SIZE.get(name, {})) for each in (pipe, plain)]
    x, t = noises(kernels[0].state_shape)[0], torch.tensor([2, 1])
    found = []
    for kernel in kernels:
        cond = None if name == "unconditional" else cond_of(kernel, PROMPTS)
        found.append(kernel.decode(kernel.transition(x, t, cond).endpoint))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert kernels[0].memory_plan(2).total > 0


@pytest.mark.usefixtures("_untraced")
def test_compiled_decoders_keep_their_units(tiny_root):
    """LTX keeps the mean and scale of its latents in buffers, which a wrapper does not have."""
    pipe = pipeline("ltx", tiny_root)
    pipe.vae.latents_mean += 0.5
    size = {"height": 32, "width": 32, "num_frames": 5}
    kernel = DiffusersKernel(pipe, num_steps=2, device="cpu", **size)
    x = noises(kernel.state_shape, n=1)[0]
    before = kernel.decode(x)
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    assert torch.equal(DiffusersKernel(pipe, num_steps=2, device="cpu", **size).decode(x), before)


@pytest.mark.parametrize(
    ("count", "change", "message"),
    [
        (2, {}, "2 control images for 1 ControlNets: give one each"),
        (1, {"global_pool_conditions": True}, "a ControlNet with global_pool_conditions"),
    ],
)
def test_controlnets_that_are_not_followed(count, change, message, tiny_root):
    pipe = pipeline("sd_controlnet", tiny_root)
    pipe.controlnet.register_to_config(**change)
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=message):
        DiffusersKernel(pipe, num_steps=2, device="cpu", control_image=[image] * count if count > 1 else image)
