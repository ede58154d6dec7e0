"""Chains that begin at an image or at given noise, beside each family's own image-to-image pipeline; and its sizes."""

from __future__ import annotations

import functools
import inspect

import diffusers
import pytest
import torch
from PIL import Image

from tests.backends.test_pipelines import PROMPTS, SIZE, cond_of, drawing, noises, pipeline, walk
from tests.support import tiny
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.pipelines.families import family_of
from treesearch.backends.pipelines.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
T = 5
IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
OWN = {
    "sd": "StableDiffusionImg2ImgPipeline",
    "sd_v": "StableDiffusionImg2ImgPipeline",
    "sd_controlnet": "StableDiffusionControlNetImg2ImgPipeline",
    "lcm": "LatentConsistencyModelImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "lightning": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
    "schnell": "FluxImg2ImgPipeline",
}


@functools.cache
def opened(name, root):
    """A pipeline of its own family, opened once; DDIM where its scheduler is a solver with memory."""
    return pipeline(name, root, ddim=name in ("sd", "sd_controlnet"))


def wrap(pipe, name, **settings):
    return DiffusersKernel(pipe, num_steps=T, device="cpu", **SIZE.get(name, {}) | settings)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("name", OWN)
def test_images_are_roots_as_in_the_family_s_own_pipeline(name, strength, tiny_root, monkeypatch):
    """Range and scale of latents, noise, number of steps and their grid, packing."""
    scale = 1.0 if name == "schnell" else 3.0
    control = {"control_image": IMAGE[None]} if name == "sd_controlnet" else {}
    text = opened(name, tiny_root)
    whole = wrap(text, name, eta=1.0 if name == "lcm" else 0.0, guidance_scale=scale, **control)
    kernel = whole.from_image(IMAGE, strength)
    pipe = getattr(diffusers, OWN[name])(**text.components)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample", lambda self, g: self.mode()
    )
    z = noises(kernel.state_shape, steps=kernel.num_steps)
    x = walk(kernel, z, cond_of(kernel, PROMPTS))
    drawn = kernel.family.unpack(z[0])
    call = {"image": torch.stack([IMAGE] * 2), "strength": strength, "num_inference_steps": T, **SIZE.get(name, {})}
    if control:
        call |= {"control_image": torch.stack([IMAGE] * 2), "controlnet_conditioning_scale": 1.0}
    with drawing(pipe, [drawn, *z[1:]], monkeypatch):
        theirs = pipe(prompt=PROMPTS, guidance_scale=scale, output_type="pt", **call).images
    assert pipe.num_timesteps == kernel.num_steps
    assert (kernel.decode(x) - theirs).abs().max() < 1e-4
    assert float(theirs.std()) > 0.02
    other = kernel.from_image(IMAGE, strength)  # of the whole chain, not of what the first image left
    assert torch.equal(other.chain.timestep, kernel.chain.timestep)


@pytest.mark.parametrize("name", ["unconditional", "ddim", "dit"])
def test_images_are_roots_as_the_scheduler_noises(name, tiny_root):
    """Pixel models and DiT have no image-to-image pipeline."""
    kernel = wrap(opened(name, tiny_root), name, eta=1.0)
    rooted = kernel.from_image(Image.new("RGB", (16, 16), (255, 0, 0)), strength=0.6)
    z = noises(kernel.state_shape)[0]
    clean = kernel.from_image(Image.new("RGB", (16, 16), (255, 0, 0)), strength=0.6)._root.state
    at = rooted.chain.timestep[-1:].long().expand(2)
    theirs = kernel.pipe.scheduler.add_noise(clean.expand_as(z), z, at)
    torch.testing.assert_close(rooted.prior(z), theirs, atol=1e-5, rtol=1e-5)
    grey = 2 * 76 / 255 - 1
    if name != "dit":
        expected = grey if name == "unconditional" else torch.tensor([1.0, -1.0, -1.0])[:, None, None]
        assert (clean - expected).abs().max() < 5e-3


@pytest.mark.parametrize("name", ["sd", "sdxl", "lightning", "sd3", "flux"])
def test_noise_is_a_root_as_in_the_pipeline(name, tiny_root, monkeypatch):
    """`latents=` of the pipeline: schedulers that begin at another variance scale them."""
    pipe = opened(name, tiny_root)
    kernel = wrap(pipe, name, eta=0.0, guidance_scale=3.0)
    z = noises(kernel.state_shape)
    rooted = kernel.from_noise(z[0, 0])
    assert not rooted.stochastic[0]
    x = rooted.prior(z[1], None)
    seen = []
    keep = lambda pipe, step, t, kept: seen.append(kept["latents"]) or {}  # noqa: E731
    for t in range(T, 0, -1):
        x = rooted.transition(x, torch.full((2,), t), cond_of(rooted, PROMPTS)).mean
    latents = torch.stack([z[0, 0]] * 2)
    call = {"num_inference_steps": T, "guidance_scale": 3.0, "output_type": "latent", "callback_on_step_end": keep}
    pipe(prompt=PROMPTS, latents=latents, **call, **SIZE.get(name, {}))
    assert (x - seen[-1]).abs().max() < 1e-4 * max(1.0, float(seen[-1].abs().max()))


@pytest.mark.parametrize(
    ("image", "strength", "error", "message"),
    [
        (IMAGE, 0.0, ValueError, r"strength is 0\.0, expected 0\.2\.\.1"),
        (IMAGE, 0.1, ValueError, r"strength is 0\.1, expected 0\.2\.\.1"),
        (IMAGE, 1.2, ValueError, r"strength is 1\.2, expected 0\.\.1"),
        (IMAGE, float("nan"), ValueError, "strength is nan"),
        (IMAGE, True, TypeError, "strength is True"),
        (IMAGE.numpy(), 0.6, TypeError, "the image is ndarray, expected a tensor"),
        (IMAGE[:2], 0.6, ValueError, r"the image has shape \(2, 16, 16\), expected \(3, h, w\)"),
        (IMAGE[None], 0.6, ValueError, "the image has shape"),
        (IMAGE * torch.nan, 0.6, ValueError, "expected floats in 0"),
    ],
)
def test_roots_that_are_none(image, strength, error, message, tiny_root):
    with pytest.raises(error, match=message):
        wrap(opened("sd", tiny_root), "sd").from_image(image, strength)


@pytest.mark.parametrize("noise", [[0.0], torch.zeros(4, 8, 8).long(), torch.full((4, 8, 8), torch.nan)])
def test_noise_that_is_none(noise, tiny_root):
    with pytest.raises((TypeError, ValueError), match="x_T is"):
        wrap(opened("sd", tiny_root), "sd").from_noise(noise)


def test_videos_have_no_image_root(tiny_root):
    pipe = opened("ltx", tiny_root)
    kernel = DiffusersKernel(pipe, num_steps=T, device="cpu", height=32, width=32, num_frames=5)
    with pytest.raises(ValueError, match=r"LTXPipeline draws videos, of which an image is no state: .* from_noise"):
        kernel.from_image(IMAGE)


CHECKED = ("sd", "sdxl", "lcm", "sd3", "wan_euler", "ltx")


@pytest.mark.parametrize("name", CHECKED)
def test_sizes_are_those_that_the_pipeline_takes(name, tiny_root):
    """Each side against `check_inputs`; what a pipeline rounds to patches is refused and not rounded."""
    pipe, video = opened(name, tiny_root), name in ("wan_euler", "ltx")
    sizes, given = (8, 12, 16, 20, 24, 30, 32, 36, 40, 48, 64), {"num_frames": 5} if video else {}
    patch = {"wan_euler": 8, "ltx": 4}.get(name, 1)
    kind = family_of(type(pipe).__name__)
    for size in sizes:
        try:
            theirs = pipe.check_inputs(**_checked(pipe, size)) is None
        except ValueError:
            theirs = False
        try:
            ours = kind(pipe, Settings(height=size, width=size, **given)).state_shape is not None
        except ValueError:
            ours = False
        assert ours == (theirs and size % patch == 0), size


def _checked(pipe, size):
    taken = inspect.signature(pipe.check_inputs).parameters
    texts = {name: "a" for name in ("prompt",) if name in taken}
    absent = {name: None for name, each in taken.items() if each.default is inspect.Parameter.empty}
    return absent | texts | {"height": size, "width": size}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_odd_latents(name, tiny_root, monkeypatch):
    """Sides that the U-Net cannot halve as often as it has blocks."""
    pipe = opened(name, tiny_root)
    kernel = wrap(pipe, name, eta=0.0, height=24, width=40)
    z = noises(kernel.state_shape)
    x = walk(kernel, z, cond_of(kernel, PROMPTS))
    theirs = pipe(PROMPTS, height=24, width=40, latents=z[0].clone(), num_inference_steps=T, output_type="pt").images
    assert (kernel.decode(x) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("sd3", {"height": 96, "width": 16}, "96 x 16 pixels are more than StableDiffusion3Pipeline has positions for"),
        ("wan_euler", {"height": 272, "width": 16, "num_frames": 1}, r"\[1, 34, 2\] tokens .* positions for 32"),
    ],
)
def test_sizes_beyond_the_positions_of_a_network(name, size, message, tiny_root):
    with pytest.raises(ValueError, match=message):
        DiffusersKernel(opened(name, tiny_root), num_steps=T, device="cpu", **size)


def test_sides_of_a_network_may_differ():
    pipe = diffusers.StableDiffusionPipeline(**tiny.sd_parts())
    pipe.unet.register_to_config(sample_size=[8, 16])
    assert DiffusersKernel(pipe, num_steps=2, device="cpu").state_shape == (4, 8, 16)
