"""Perturbed attention and ControlNets by the pipeline's own call, and chains of it that begin at a picture."""

import functools
import importlib
import inspect

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from tests.backends.test_pipelines_called import PROMPTS, SETTINGS, cond_of, noises, walk
from tests.support import tiny, tiny_called, tiny_pictures  # noqa: F401  the builders
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.pipelines.listed import CALLED

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
T = 3


def picture(seed):
    draw = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=draw, dtype=torch.uint8).numpy())


def half():
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 4, 16, 12))
    return mask


CONTROL, BEGUN = {"control_image": picture(1)}, {"image": picture(2), "strength": 0.6}
MASKED, SIDE = BEGUN | {"mask": half()}, {"height": 16, "width": 16}
UNION = CONTROL | {"network_inputs": {"control_mode": [1]}}
CASES = {
    "StableDiffusionPAGPipeline": ("sd", {}),
    "StableDiffusionXLPAGPipeline": ("sdxl", {"network_inputs": {"pag_scale": 2.0}}),
    "StableDiffusion3PAGPipeline": ("sd3", {}),
    "HunyuanDiTPAGPipeline": ("hunyuan_dit", SETTINGS["hunyuan_dit"]),
    "PixArtSigmaPAGPipeline": ("pixart_sigma", SETTINGS["pixart_sigma"]),
    "SanaPAGPipeline": ("sana", SETTINGS["sana"]),
    "StableDiffusionControlNetPAGPipeline": ("sd_controlnet", CONTROL),
    "StableDiffusionXLControlNetPAGPipeline": ("sdxl_controlnet", CONTROL),
    "StableDiffusionPAGImg2ImgPipeline": ("sd", BEGUN),
    "StableDiffusionPAGInpaintPipeline": ("sd", MASKED),
    "StableDiffusionXLPAGImg2ImgPipeline": ("sdxl", BEGUN),
    "StableDiffusionXLPAGInpaintPipeline": ("sdxl", MASKED),
    "StableDiffusion3PAGImg2ImgPipeline": ("sd3", BEGUN),
    "StableDiffusionControlNetPAGInpaintPipeline": ("sd_controlnet", MASKED | CONTROL),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": ("sdxl_controlnet", BEGUN | CONTROL),
    "StableDiffusionXLControlNetUnionPipeline": ("sdxl_union", UNION),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": ("sdxl_union", BEGUN | UNION),
    "StableDiffusionXLControlNetUnionInpaintPipeline": ("sdxl_union", MASKED | UNION),
    "FluxControlNetImg2ImgPipeline": ("flux_controlnet", BEGUN | CONTROL | SIDE),
    "FluxControlNetInpaintPipeline": ("flux_controlnet", MASKED | CONTROL | SIDE),
    "ChromaImg2ImgPipeline": ("chroma", BEGUN | SIDE),
    "StableDiffusion3ControlNetInpaintingPipeline": ("sd3_inpainting", CONTROL | {"mask": half()} | SIDE),
}


@pytest.fixture(scope="module")
def parts(tiny_root):
    """Components of a checkpoint, loaded once: a kernel leaves them as they were."""

    @functools.cache
    def of(name):
        return diffusers.DiffusionPipeline.from_pretrained(tiny.checkpoint(name, tiny_root)).components

    return of


def made(kind, components):
    """A pipeline of another class of the same model; SD's and SDXL's with DDIM, whose steps are the chain's."""
    cls = getattr(diffusers, kind)
    taken = inspect.signature(cls.__init__).parameters
    given = {name: part for name, part in components.items() if name in taken}
    if "requires_safety_checker" in taken:
        given["requires_safety_checker"] = False
    pipe = cls(**given)
    if "unet" in given:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if kind == "SanaPAGPipeline":
        pipe.set_pag_applied_layers(["transformer_blocks.1"])  # "0", its default, is the end of most names
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own(pipe, kind, noise, settings, **call):
    """By the class's own call, a prompt at a time, whose draws are the noise, and pictures modes."""
    taken = inspect.signature(type(pipe).__call__).parameters
    given = settings | settings.get("network_inputs", {})
    renamed = {"mask": "mask_image" if "mask_image" in taken else "control_mask"}
    renamed |= {} if "control_image" in taken else {"control_image": "image"}
    given = {renamed.get(key, key): value for key, value in given.items() if key != "network_inputs"}
    found = []
    for prompt, x in zip(PROMPTS, noise, strict=True):
        start = x[None] if x.ndim == 3 else pipe._unpack_latents(x[None], 16, 16, pipe.vae_scale_factor)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
            for module in {type(pipe).__module__, type(pipe.scheduler).__module__}:
                draw = lambda *a, start=start, **k: start  # noqa: E731
                patch.setattr(importlib.import_module(module), "randn_tensor", draw, raising=False)
            found.append(pipe(prompt=[prompt], num_inference_steps=T, output_type="pt", **given | call).images)
    return torch.cat(found)


@pytest.mark.parametrize("kind", CASES)
def test_without_noise_is_the_pipeline_s_own(kind, parts):
    name, settings = CASES[kind]
    pipe = made(kind, parts(name))
    network = getattr(pipe, "unet", getattr(pipe, "transformer", None))
    before = network.attn_processors
    kernel = DiffusersKernel(pipe, num_steps=T, device="cpu", eta=0.0, **settings)
    drawn = kernel.decode(walk(kernel, noises(kernel), cond_of(kernel, PROMPTS)))
    assert all(network.attn_processors[key] is part for key, part in before.items())
    theirs = own(pipe, kind, noises(kernel), settings)
    assert (drawn - theirs).abs().max() < 1e-4
    assert float(theirs.std()) > 0.02
    if "PAG" in kind:
        assert kernel.rows_per_nfe == 3
    if "strength" in settings:
        assert kernel.num_steps == pipe.num_timesteps


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind.endswith("Img2ImgPipeline") and "ControlNet" in kind])
def test_a_window_where_a_chain_begins_at_a_picture_is_the_pipeline_s_own(kind, parts):
    """Of the two steps that are taken, while the proof walks all three."""
    name, settings = CASES[kind]
    settings, window, pipe = settings | {"strength": 2 / 3}, {"control_guidance_end": 0.5}, made(kind, parts(name))
    kernel, always = (
        DiffusersKernel(pipe, num_steps=T, device="cpu", eta=0.0, **settings | given) for given in (window, {})
    )
    drawn = kernel.decode(walk(kernel, noises(kernel), cond_of(kernel, PROMPTS)))
    assert (drawn - own(pipe, kind, noises(kernel), settings | window)).abs().max() < 1e-4
    x = noises(kernel)
    for t in (2, 1):
        one, two = (k.transition(x, torch.full((2,), t), cond_of(k, PROMPTS)).mean for k in (kernel, always))
        assert torch.equal(one, two) == (t == 2)


def test_every_class_of_perturbed_attention_is_tried():
    wanted = {name for name, row in CALLED.items() if "PAG" in name or "Union" in name or row.runs}
    assert wanted <= set(CASES)


def test_perturbation_is_seen(parts):
    """Without its scale another picture, with rows of the network to match."""
    pipe = made("StableDiffusionPAGPipeline", parts("sd"))
    off = DiffusersKernel(pipe, num_steps=T, device="cpu", eta=0.0, network_inputs={"pag_scale": 0.0})
    on = DiffusersKernel(pipe, num_steps=T, device="cpu", eta=0.0)
    assert (off.rows_per_nfe, on.rows_per_nfe) == (2, 3)
    x, t = noises(on), torch.tensor([1, 3])
    one, two = (each.transition(x, t, cond_of(each, PROMPTS)).mean for each in (off, on))
    assert (one - two).abs().max() > 1e-2


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_solvers_with_memory_are_held_by_what_they_ask_the_network(scheduler, parts, monkeypatch):
    """Some ask it more than once for a step of the grid: each time it is what the chain would hear."""
    pipe = made("StableDiffusionPAGPipeline", parts("sd"))
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    assert DiffusersKernel(pipe, num_steps=T, device="cpu").num_steps == T
    guide = type(pipe)._apply_perturbed_attention_guidance

    def counting(self, *args, **more):
        self.asked = getattr(self, "asked", 0) + 1
        out, text = guide(self, *args, **more)
        return out * (1 + 0.1 * (self.asked > 1)), text

    monkeypatch.setattr(type(pipe), "_apply_perturbed_attention_guidance", counting)
    with pytest.raises(ValueError, match=f"step 2 of {T}, and the pipeline's own, differ by"):
        DiffusersKernel(pipe, num_steps=T, device="cpu")


def test_loads_as_real_ones_do(parts, tmp_path):
    made("StableDiffusionPAGPipeline", parts("sd")).save_pretrained(tmp_path)
    kernel = DiffusersKernel.from_pretrained(str(tmp_path), num_steps=2, device="cpu", text_encoders="free")
    cond = cond_of(kernel, PROMPTS)
    assert kernel.pipe.text_encoder is None
    assert kernel.decode(walk(kernel, noises(kernel), cond)).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("StableDiffusionPAGInpaintPipeline", BEGUN, "draws where a mask is white: give it one, mask="),
        ("StableDiffusionPAGImg2ImgPipeline", {}, "works on a picture: give it one, image="),
        ("StableDiffusionPAGPipeline", BEGUN, "StableDiffusionPAGPipeline takes no image"),
        ("StableDiffusionControlNetPAGPipeline", {}, r"needs control_image=\.\.\., a picture that it is told"),
    ],
)
def test_bad_settings(kind, settings, message, parts):
    with pytest.raises(ValueError, match=message):
        DiffusersKernel(made(kind, parts("sd_controlnet")), num_steps=T, device="cpu", **settings)


def test_a_network_of_more_channels_is_refused(parts):
    pipe = made("StableDiffusionPAGInpaintPipeline", parts("sd_inpaint"))
    with pytest.raises(ValueError, match="has a network of 9 channels for latents of 4"):
        DiffusersKernel(pipe, num_steps=T, device="cpu", **MASKED)
