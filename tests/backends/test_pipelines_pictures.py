"""Pipelines that are given a picture, beside their own `__call__`: begun at one, under a mask, filled in, edited."""

import importlib
import inspect

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests.backends.test_pipelines_modular import PROMPTS, cond_of, noises, walk
from tests.support import tiny, tiny_pictures
from treesearch.backends.base.pictures import pixels_of
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.pipelines.blocks import copied
from treesearch.backends.pipelines.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
T = 5
SIDE = {"height": 16, "width": 16}


def picture(height, width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8).numpy())


def half(height, width):
    pixels = torch.zeros(height, width, dtype=torch.uint8)
    pixels[:, width // 3 :] = 255
    return Image.fromarray(pixels.numpy())


@pytest.fixture(autouse=True)
def means(monkeypatch):
    """Pipelines draw from the encoder's law, and a kernel takes its mode."""
    law = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
    monkeypatch.setattr(law, lambda self, generator=None: self.mode())


@pytest.fixture(scope="module")
def opened(tiny_root):
    """A pipeline of a class, on the checkpoint of a name; DDIM in place of a solver with memory."""

    def of(name, kind):
        if (name, kind) not in kept:
            own = {"processor": tiny_pictures.qwen_processor()} if "edit" in name else {}
            pipe = DiffusionPipeline.from_pretrained(tiny.checkpoint(name, tiny_root), **own)
            if isinstance(pipe.scheduler, diffusers.PNDMScheduler):
                pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
            if kind != type(pipe).__name__:
                pipe = converted(pipe, getattr(diffusers, kind))
            pipe.set_progress_bar_config(disable=True)
            kept[name, kind] = pipe
        return kept[name, kind]

    kept = {}
    return of


def converted(pipe, kind):
    taken = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    return kind(**parts, **({"requires_safety_checker": False} if "requires_safety_checker" in taken else {}))


@pytest.fixture
def small(monkeypatch):
    """Qwen-Image-Edit enlarges every picture to a million pixels; here to a few thousand."""

    def sides(area, ratio):
        area /= 256
        return 32 * max(1, round((area * ratio) ** 0.5 / 32)), 32 * max(1, round((area / ratio) ** 0.5 / 32))

    for module, more in (("pipelines.qwenimage.pipeline_qwenimage_edit", (None,)),
                         ("pipelines.qwenimage.pipeline_qwenimage_edit_inpaint", (None,)),
                         ("pipelines.qwenimage.pipeline_qwenimage_edit_plus", ()),
                         ("modular_pipelines.qwenimage.encoders", (None,))):  # fmt: skip
        part = importlib.import_module(f"diffusers.{module}")
        monkeypatch.setattr(part, "calculate_dimensions", lambda a, r, more=more: (*sides(a, r), *more))


BEGUN = [
    ("sd", "StableDiffusionInpaintPipeline", 0.6, {}),
    ("sd_inpaint", "StableDiffusionInpaintPipeline", 0.6, {}),
    ("sd_inpaint", "StableDiffusionInpaintPipeline", 1.0, {}),
    ("sd_controlnet", "StableDiffusionControlNetInpaintPipeline", 0.6, {}),
    ("sdxl_controlnet", "StableDiffusionXLControlNetInpaintPipeline", 0.6, {}),
    ("sdxl_controlnet", "StableDiffusionXLControlNetImg2ImgPipeline", 0.6, {}),
    ("sdxl", "StableDiffusionXLInpaintPipeline", 0.6, {}),
    ("sdxl_inpaint", "StableDiffusionXLInpaintPipeline", 0.6, {}),
    ("sdxl_refiner", "StableDiffusionXLImg2ImgPipeline", 0.4, {}),
    ("sd3_wide", "StableDiffusion3InpaintPipeline", 1.0, SIDE),
    ("flux", "FluxInpaintPipeline", 0.6, SIDE),
    ("flux_fill", "FluxFillPipeline", 1.0, SIDE),
    ("flux_fill", "FluxFillPipeline", 0.6, SIDE),
    ("flux_control", "FluxControlInpaintPipeline", 0.6, SIDE),
    ("qwen_image", "QwenImageImg2ImgPipeline", 0.6, SIDE),
    ("qwen_image", "QwenImageInpaintPipeline", 0.6, SIDE),
    ("qwen_edit", "QwenImageEditInpaintPipeline", 0.6, {}),
    ("z_image", "ZImageImg2ImgPipeline", 0.6, SIDE),
    ("z_image", "ZImageInpaintPipeline", 1.0, SIDE),
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "kind", "strength", "size"), BEGUN)
def test_a_picture_is_begun_at_as_in_the_pipeline(name, kind, strength, size, opened, monkeypatch):
    """Range and scale of latents, steps and their grid, noise of what a mask keeps, what fills in, packing."""
    pipe, side = opened(name, kind), 64 if "edit" in name else 16
    given = {"image": picture(side, side)}
    if "Img2Img" not in kind:
        given["mask"] = half(side, side)
    if "Control" in kind:
        given["control_image"] = picture(side, side, 1)
    own = {"max_sequence_length": 64} if name == "z_image" else {}
    settings = {"guidance_scale": 3.0, "strength": strength, **given, **size, **own}
    kernel = DiffusersKernel(pipe, num_steps=T, eta=0.0, device="cpu", **settings)
    noise = noises(kernel)
    drawn = kernel.decode(walk(kernel, noise, cond_of(kernel, PROMPTS)))

    call = {"num_inference_steps": T, "output_type": "pt", "strength": strength, **size, **own}
    call |= {"mask_image" if key == "mask" else key: value for key, value in given.items()}
    call |= {"true_cfg_scale": 3.0} if "Qwen" in kind else {"guidance_scale": 3.0}
    absent = {"qwen_image": "", "qwen_edit": " "}.get(name)
    for i, prompt in enumerate(PROMPTS):
        latents = unpacked(kernel, noise)[i : i + 1]
        monkeypatch.setattr(importlib.import_module(type(pipe).__module__), "randn_tensor", always(latents))
        theirs = pipe(prompt=prompt, **call, **({} if absent is None else {"negative_prompt": absent})).images
        assert (drawn[i : i + 1] - theirs).abs().max() < 1e-4
        assert float(theirs.std()) > 0.02
    assert kernel.num_steps == pipe.num_timesteps


def unpacked(kernel, x):
    family = kernel.family
    if family.plain:
        return family.unpack(x)
    return family._program.unpack(copied(family._ready(len(x)), latents=x)).get("latents")


def always(values):
    return lambda shape, **_: values.reshape(shape)


EDITS = [
    ("qwen_edit", "QwenImageEditPipeline", {}, 1),
    ("qwen_edit_plus", "QwenImageEditPlusPipeline", {"height": 32, "width": 48}, 2),
    ("kontext", "FluxKontextPipeline", {"height": 16, "width": 32}, 1),
    ("flux_control", "FluxControlPipeline", {"height": 16, "width": 32}, 1),
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "kind", "size", "count"), EDITS)
def test_a_picture_stands_beside_the_noise(name, kind, size, count, opened):
    """Prompts one by one, since transformers hands one picture to one prompt."""
    pipe = opened(name, kind)
    images = [picture(64, 64), picture(64, 96, 1)][:count]
    given, call = {"image": images if count > 1 else images[0]}, {}
    if "Qwen" in kind:
        call = {"true_cfg_scale": 3.0, "negative_prompt": " "}
    elif name == "kontext":
        given["network_inputs"], call = {"_auto_resize": False}, {"_auto_resize": False, "max_area": 16 * 32}
    else:
        given = {"control_image": picture(16, 32)}
    scale = {"guidance_scale": 3.0} if "Qwen" in kind else {}
    kernel = DiffusersKernel(pipe, num_steps=3, eta=0.0, device="cpu", **given, **size, **scale)
    noise = noises(kernel)
    drawn = kernel.decode(walk(kernel, noise, cond_of(kernel, PROMPTS)))
    pictures = {key: value for key, value in given.items() if key != "network_inputs"}
    for i, prompt in enumerate(PROMPTS):
        theirs = pipe(prompt=prompt, latents=noise[i : i + 1], num_inference_steps=3, output_type="pt", **pictures,
                      **size, **call).images  # fmt: skip
        assert (drawn[i : i + 1] - theirs).abs().max() < 1e-4
        assert float(theirs.std()) > 0.02
    held = given.get("control_image", images)
    turned = [each.rotate(180) for each in held] if isinstance(held, list) else held.rotate(180)
    name = "control_image" if "control_image" in given else "image"
    theirs = pipe(prompt=PROMPTS[1], latents=noise[1:], num_inference_steps=3, output_type="pt",
                  **pictures | {name: turned}, **size, **call).images  # fmt: skip
    assert (drawn[1:] - theirs).abs().max() > 5e-3  # what it is of is seen


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen_edit", "QwenImageEditPipeline"),
        ("kontext", "FluxKontextPipeline"),
        ("sdxl_inpaint", "StableDiffusionXLInpaintPipeline"),
        ("flux_fill", "FluxFillPipeline"),
        ("qwen_image", "QwenImageInpaintPipeline"),
    ],
)
def test_rows_do_not_depend_on_their_batch(name, kind, opened):
    """Eight rows at mixed t, of pictures and masks, and each alone."""
    side, size = (64, {}) if "edit" in name else (16, SIDE)
    given = {"image": picture(side, side)}
    if name in ("sdxl_inpaint", "flux_fill", "qwen_image"):
        given |= {"mask": half(side, side), "strength": 1.0}
    if name == "kontext":
        given["network_inputs"] = {"_auto_resize": False}
    kernel = DiffusersKernel(opened(name, kind), num_steps=3, device="cpu", **given, **size)
    prompts = [*PROMPTS, ""]
    x, t, rows = noises(kernel, 8), torch.tensor([3, 1, 2, 3, 1, 2, 3, 1]), torch.arange(8) % 3
    cond = {k: v.value if hasattr(v, "value") else v[rows] for k, v in kernel.encode(prompts).items()}
    law = kernel.transition(x, t, cond | {"task": rows})
    for i in range(8):
        alone = kernel.transition(x[i : i + 1], t[i : i + 1], cond_of(kernel, [prompts[rows[i]]]))
        assert (law.mean[i] - alone.mean[0]).abs().max() < 1e-5 * max(1.0, float(alone.mean.abs().max()))


def test_what_a_mask_keeps_is_the_picture(opened):
    """Under noise too, whatever the prompt."""
    image, mask = picture(16, 16), half(16, 16)
    kernel = DiffusersKernel(
        opened("z_image", "ZImageInpaintPipeline"), num_steps=3, device="cpu", image=image, mask=mask, **SIDE,
        max_sequence_length=64, strength=1.0,
    )  # fmt: skip
    cond, x = cond_of(kernel, PROMPTS), kernel.prior(noises(kernel))
    for t in (3, 2, 1):
        law = kernel.transition(x, torch.full((2,), t), cond)
        x = law.sample(torch.randn(x.shape, generator=torch.Generator().manual_seed(t)))
    clean = kernel.state_of(image)
    kept = kernel._root.held.free[0] == 0
    assert 0 < int(kept.sum()) < kept.numel()
    assert (x[:, kept] - clean[kept]).abs().max() < 1e-5
    assert (x[:, ~kept] - clean[~kept]).abs().max() > 0.1


@pytest.fixture
def masked(opened):
    """A kernel of Stable Diffusion, whose grid ends above 0, that holds a picture under a mask."""
    pipe = opened("sd", "StableDiffusionInpaintPipeline")
    assert not pipe.scheduler.config.set_alpha_to_one
    return DiffusersKernel(pipe, num_steps=T, device="cpu", image=picture(16, 16), mask=half(16, 16), strength=0.6)


def test_what_a_mask_keeps_ends_without_noise(masked):
    """Where η = 1 draws noise in the last step too; what is drawn has it."""
    assert float(masked.chain.std[1]) > 0
    x, clean, kept = noises(masked), masked._root.held.picture, masked._root.held.free[0] == 0
    law = masked.transition(x, torch.ones(2, dtype=torch.int64), cond_of(masked, PROMPTS))
    drawn = law.sample(torch.ones_like(x))
    assert torch.equal(drawn[:, kept.expand_as(clean)], clean[kept.expand_as(clean)].expand(2, -1))
    assert (law.std.expand_as(x)[:, ~kept.expand_as(clean)] > 0).all()
    assert law.log_prob(drawn).isfinite().all()


def test_noise_of_one_s_own_under_a_mask(masked):
    """Is where the chain begins, and not what the mask keeps."""
    begun = masked.from_noise(noises(masked)[0])
    law = begun.transition(noises(begun), torch.full((2,), T), cond_of(begun, PROMPTS))
    clean, kept = masked.state_of(picture(16, 16)), masked._root.held.free[0] == 0
    assert torch.equal(law.endpoint[:, kept], clean[kept].expand(2, -1))
    assert begun.fingerprint != masked.from_noise(noises(masked)[1]).fingerprint


def test_another_picture_and_no_mask_leave_nothing_of_the_first(masked, opened):
    again, plain = masked.from_image(picture(16, 16, 1), 0.6, half(16, 16)), masked.from_image(picture(16, 16), 0.6)
    x, t, cond = noises(masked), torch.full((2,), 2), cond_of(masked, PROMPTS)
    kept = masked._root.held.free[0] == 0
    other = masked.state_of(picture(16, 16, 1))
    assert torch.equal(again.transition(x, t, cond).endpoint[:, kept], other[kept].expand(2, -1))
    pipe = opened("sd", "StableDiffusionPipeline")
    bare = DiffusersKernel(pipe, num_steps=T, device="cpu", image=picture(16, 16), strength=0.6)
    assert torch.equal(plain.transition(x, t, cond).mean, bare.transition(x, t, cond).mean)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen_edit", "QwenImageEditPipeline"),
        ("sd_inpaint", "StableDiffusionInpaintPipeline"),
        ("flux_fill", "FluxFillPipeline"),
    ],
)
def test_a_network_that_is_told_a_picture_begins_at_no_other(name, kind, opened):
    side, size = (64, {}) if "edit" in name else (16, SIDE)
    image, mask = picture(side, side), half(side, side)
    given = {"image": image} if "edit" in name else {"image": image, "mask": mask}
    kernel = DiffusersKernel(opened(name, kind), num_steps=3, device="cpu", **given, **size)
    pixels = pixels_of(image, 3, (side, side))
    same = kernel.from_image(pixels, 0.4, pixels_of(mask, 1, (side, side)))  # a mask of a tensor too
    assert same.num_steps < 3
    message = f"the network of {kind} is told the picture that this kernel was made with: make another kernel, image="
    with pytest.raises(ValueError, match=message):
        kernel.from_image(picture(side, side, 1), 0.4, mask)
    if "edit" in name:
        with pytest.raises(ValueError, match=message):
            kernel.state_of(picture(side, side, 1))
        return
    for wrong in (None, mask.rotate(180)):
        with pytest.raises(ValueError, match="is told the mask that this kernel was made with: make another"):
            kernel.from_image(image, 0.4, wrong)


def test_pictures_come_from_files(tiny_root, tmp_path):
    picture(16, 16).save(tmp_path / "a.png")
    half(16, 16).save(tmp_path / "mask.png")
    folder = tiny.checkpoint("sdxl_inpaint", tiny_root)
    kernel = DiffusersKernel.from_pretrained(
        str(folder), image=str(tmp_path / "a.png"), mask=str(tmp_path / "mask.png"), strength=0.4, num_steps=T,
        device="cpu",
    )  # fmt: skip
    same = DiffusersKernel(
        kernel.pipe, image=picture(16, 16), mask=half(16, 16), strength=0.4, num_steps=T, device="cpu"
    )
    assert (kernel.num_steps, kernel.fingerprint) == (2, same.fingerprint)
    other = DiffusersKernel(
        kernel.pipe, image=picture(16, 16, 1), mask=half(16, 16), strength=0.4, num_steps=T, device="cpu"
    )
    assert other.fingerprint != same.fingerprint


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("QwenImageEditPipeline", {}, "QwenImageEditPipeline works on a picture: give it one, image="),
        ("QwenImageImg2ImgPipeline", {}, "works on a picture"),
        ("FluxFillPipeline", {"image": picture(16, 16)}, "draws where a mask is white: give it one, mask="),
        ("FluxPipeline", {"mask": half(16, 16)}, "mask is of a picture, and there is none"),
        ("FluxPipeline", {"strength": 0.5}, "strength is of a picture, and there is none"),
        ("Flux2KleinPipeline", {"image": picture(64, 64), "mask": half(64, 64)}, "takes no mask"),
        ("Flux2KleinPipeline", {"image": picture(64, 64), "strength": 0.5}, "takes no strength"),
        ("FluxPipeline", {"image": "/nowhere/a.png"}, "cannot read '/nowhere/a.png' as a picture"),
    ],
)
def test_bad_pictures(kind, settings, message):
    """Said of a class alone, before anything is loaded."""
    from treesearch.backends.pipelines.families import refuse_index
    from treesearch.backends.pipelines.settings import Settings

    names = ("vae", "text_encoder", "text_encoder_2", "transformer", "scheduler", "processor")
    index = {name: ["diffusers", name] for name in names if name != "scheduler"} | {"_class_name": kind}
    assert kind in FAMILIES
    with pytest.raises(ValueError, match=message):
        refuse_index(index, {"scheduler": object()}, Settings.of(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": picture(16, 24), "mask": half(16, 16)}, "the image is 16 x 24 pixels, expected 16 x 16: resize it"),
        ({"image": picture(16, 16), "mask": half(8, 16)}, "mask: the image is 8 x 16 pixels, expected 16 x 16"),
        ({"image": picture(16, 16), "mask": half(16, 16), "strength": 0.0}, r"strength is 0\.0, expected 0\.2"),
    ],
)
def test_pictures_of_another_size(settings, message, opened):
    with pytest.raises(ValueError, match=message):
        DiffusersKernel(opened("flux", "FluxInpaintPipeline"), num_steps=T, device="cpu", **settings, **SIDE)


VIDEOS = [
    ("wan_image", {}, {}),
    ("wan_two", {"guidance_scale_2": 2.0}, {"guidance_scale_2": 2.0}),
    ("wan_two", {"image": [picture(48, 32), picture(32, 32, 1)]}, {"last_image": picture(32, 32, 1)}),
    ("wan_by_token", {}, {}),
    ("ltx_image", {"num_steps": 2}, {"num_inference_steps": 2}),
]
FRAMES = {"height": 32, "width": 32, "num_frames": 5}


@pytest.mark.parametrize(("name", "settings", "own"), VIDEOS)
def test_videos_begin_with_a_picture(name, settings, own, opened):
    """And one row at two levels, alone and in a batch, is the same."""
    kind = "LTXImageToVideoPipeline" if name == "ltx_image" else "WanImageToVideoPipeline"
    pipe, given = opened(name, kind), {"image": picture(48, 32), "guidance_scale": 3.0, **FRAMES}
    kernel = DiffusersKernel(pipe, eta=0.0, device="cpu", **{"num_steps": 3} | given | settings)
    noise, cond = noises(kernel), cond_of(kernel, PROMPTS)
    drawn = kernel.decode(walk(kernel, noise, cond))
    call = {"num_inference_steps": 3, "output_type": "pt", **given, **own}
    for i, prompt in enumerate(PROMPTS):
        begun = kernel.family.with_frame(noise) if name == "ltx_image" else noise
        theirs = pipe(prompt=prompt, latents=begun[i : i + 1], **call).frames
        assert theirs.shape == (1, 5, 3, 32, 32)
        assert (drawn[i : i + 1] - theirs).abs().max() < 1e-4
        assert float(theirs.std()) > 0.02
    together = kernel.transition(noise, torch.tensor([2, 1]), cond).mean
    for i, t in enumerate((2, 1)):
        alone = kernel.transition(noise[i : i + 1], torch.tensor([t]), cond_of(kernel, [PROMPTS[i]])).mean
        assert (together[i] - alone[0]).abs().max() < 1e-5 * max(1.0, float(alone.abs().max()))


def test_a_video_s_plan_knows_its_picture(opened):
    """On the meta device there is nothing to look at: what was seen is carried there."""
    kernel = DiffusersKernel(
        opened("wan_by_token", "WanImageToVideoPipeline"), num_steps=2, device="cpu", image=picture(32, 32), **FRAMES
    )
    assert kernel.memory_plan(2, prompts=PROMPTS).network > 0
    with pytest.raises(ValueError, match="3 pictures, expected one picture, the first frame"):
        DiffusersKernel(kernel.pipe, num_steps=2, device="cpu", image=[picture(32, 32)] * 3, **FRAMES)
