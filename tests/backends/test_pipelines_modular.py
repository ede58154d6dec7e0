"""Pipelines run by their own modular blocks, beside their own `__call__`."""

import functools

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import treesearch as ts
from tests.support import tiny, tiny_kinds
from treesearch.backends.base.live import LiveBytes
from treesearch.backends.pipelines import CheckpointError, DiffusersKernel, memory
from treesearch.backends.pipelines.families import FAMILIES, family_of
from treesearch.backends.pipelines.kinds import KINDS
from treesearch.rewards.base import as_reward

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
T = 3
PROMPTS = ["a cat", "two red dogs beside a house"]
SIZE = {"height": 16, "width": 32}
NAMES = ["qwen_image", "z_image", "flux2", "flux2_klein", "flux2_klein_base", "krea2", "krea2_turbo", "ernie_image"]
STATES = dict.fromkeys(NAMES, (32, 16)) | {"z_image": (4, 8, 16), "ernie_image": (16, 4, 8)}
SHORT = {"max_sequence_length": 64}
KREA = {"max_sequence_length": 224}  # its template is of bytes here
CALLS = {
    "krea2": KREA,
    "krea2_turbo": KREA,
    "z_image": SHORT,
    "flux2": {"max_sequence_length": 256},
    "flux2_klein": SHORT,
    "flux2_klein_base": SHORT,
}


BUILT = (tiny.BUILDERS, tiny_kinds)  # builders are listed where they are imported


def folder(name, root):
    return str(tiny.checkpoint(name, root))


@pytest.fixture(scope="module")
def pipeline(tiny_root):
    """Pipeline of a checkpoint, loaded once: a kernel leaves it as it was."""

    def of(name):
        if name not in kept:
            kept[name] = DiffusionPipeline.from_pretrained(folder(name, tiny_root))
            kept[name].set_progress_bar_config(disable=True)
        return kept[name]

    kept = {}
    return of


def wrap(pipe, name, **settings):
    return DiffusersKernel(pipe, **{"num_steps": T, "device": "cpu"} | SIZE | CALLS.get(name, {}) | settings)


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


def as_taken(name, noise):
    """Noise as the pipeline takes it: FLUX.2 packs what it is given."""
    return noise.mT.reshape(len(noise), 16, 4, 8) if name.startswith("flux2") else noise


GUIDED = {
    "qwen_image": [({"guidance_scale": 3.0}, {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]}, 2),
                   ({"guidance_scale": 1.0}, {}, 1),
                   ({"negative_prompt": "blur"}, {"true_cfg_scale": 4.0, "negative_prompt": ["blur", "blur"]}, 2)],
    "z_image": [({"guidance_scale": 3.0}, {"guidance_scale": 3.0}, 2),
                ({"guidance_scale": 0.0}, {"guidance_scale": 0.0}, 1),
                ({"negative_prompt": "blur"}, {"negative_prompt": ["blur", "blur"]}, 2)],
    "krea2": [({"guidance_scale": 3.0}, {"guidance_scale": 3.0}, 2)],
    "krea2_turbo": [({}, {"guidance_scale": 0.0}, 1)],
    "ernie_image": [({}, {}, 2), ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}, 1)],
    "flux2": [({}, {}, 1), ({"guidance_scale": 2.5}, {"guidance_scale": 2.5}, 1)],
    "flux2_klein": [({}, {}, 1)],
    "flux2_klein_base": [({}, {}, 2), ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}, 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_is_the_pipeline_s_own(name, pipeline):
    pipe = pipeline(name)
    for settings, call, rows in GUIDED[name]:
        kernel = wrap(pipe, name, eta=0.0, **settings)
        assert (kernel.state_shape, kernel.rows_per_nfe) == (STATES[name], rows)
        noise = noises(kernel)
        drawn = kernel.decode(walk(kernel, noise, cond_of(kernel, PROMPTS)))
        call = {"num_inference_steps": T, **SIZE, **CALLS.get(name, {}), **call}
        call |= {"use_pe": False} if name == "ernie_image" else {}
        theirs = pipe(prompt=list(PROMPTS), latents=as_taken(name, noise), output_type="pt", **call).images
        assert theirs.shape == (2, 3, 16, 32)
        assert (drawn - theirs).abs().max() < 1e-4
        assert float(theirs.std()) > 0.02
        assert (theirs[0] - theirs[1]).abs().max() > 0.01


@pytest.mark.slow  # of 2,000 tokens of text, however short the prompt
def test_a_video_s_guider_is_its_own(pipeline):
    """HunyuanVideo 1.5 keeps its guider, and its decoder takes one video at a time."""
    pipe, size = pipeline("hunyuan_video_15"), {"height": 32, "width": 32, "num_frames": 5}
    kernel = wrap(pipe, "hunyuan_video_15", eta=0.0, **size)
    assert (kernel.state_shape, kernel.rows_per_nfe, kernel.family.guidance_scale) == ((4, 3, 8, 8), 2, 3.0)
    noise = noises(kernel)
    drawn = kernel.decode(walk(kernel, noise, cond_of(kernel, PROMPTS)))
    for i, prompt in enumerate(PROMPTS):
        call = {"num_inference_steps": T, "output_type": "pt", **size}
        theirs = pipe(prompt=prompt, latents=noise[i : i + 1], **call).frames
        assert theirs.shape == (1, 5, 3, 32, 32)
        assert (drawn[i : i + 1] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["flux2", "flux2_klein_base"])
def test_pictures_are_edited(name, pipeline):
    """Two pictures beside the noise; the first one's size is the result's where none is given."""
    pipe, size = pipeline(name), {"height": None, "width": None}
    draw = torch.Generator().manual_seed(2)
    images = [Image.fromarray(torch.randint(0, 256, (64, 68, 3), generator=draw, dtype=torch.uint8).numpy())]
    images.append(images[0].rotate(90).resize((64, 64)))
    kernel = wrap(pipe, name, eta=0.0, image=images, **size)
    noise = noises(kernel)
    drawn = kernel.decode(walk(kernel, noise, cond_of(kernel, PROMPTS)))
    call = {"num_inference_steps": T, **CALLS[name], "image": images, "output_type": "pt"}
    theirs = pipe(prompt=list(PROMPTS), latents=noise.mT.reshape(2, 16, 16, 17), **call).images
    assert theirs.shape == (2, 3, 64, 68)
    assert (drawn - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", [name for name in NAMES if name != "krea2_turbo"])
def test_rows_do_not_depend_on_their_batch(name, pipeline):
    kernel = wrap(pipeline(name), name)
    prompts = [*PROMPTS, ""]
    x, t = noises(kernel, 8), torch.tensor([3, 1, 2, 3, 1, 2, 3, 1])
    rows = torch.arange(8) % 3
    together = kernel.encode(prompts)
    cond = {k: getattr(v, "value", None) if hasattr(v, "value") else v[rows] for k, v in together.items()}
    law = kernel.transition(x, t, cond | {"task": rows})
    for i in range(8):
        alone = kernel.transition(x[i : i + 1], t[i : i + 1], cond_of(kernel, [prompts[rows[i]]]))
        for part in ("mean", "endpoint"):
            a, b = getattr(law, part)[i], getattr(alone, part)[0]
            assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))
    other = kernel.transition(x[:1], t[:1], cond_of(kernel, [PROMPTS[1]]))
    assert (other.mean - law.mean[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux2_klein"])
def test_nothing_leaks_between_calls(name, pipeline):
    pipe = pipeline(name)
    call = {"prompt": list(PROMPTS), "num_inference_steps": 2, "output_type": "pt", **SIZE, **CALLS.get(name, {})}
    theirs = pipe(generator=torch.Generator().manual_seed(0), **call).images
    before = torch.get_rng_state()
    kernel = wrap(pipe, name)
    noise = noises(kernel)
    first = walk(kernel, noise, cond_of(kernel, PROMPTS))
    walk(kernel, noise[:1], cond_of(kernel, ["something else"]))
    bright = as_reward(lambda samples: samples.mean((1, 2, 3)), "bright")
    ts.search(kernel, bright, ts.FeynmanKac(num_particles=2), prompts=["a", "b"], budget=ts.Budget(nfe=4 * T))
    assert torch.equal(walk(kernel, noise, cond_of(kernel, PROMPTS)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(
        pipe(**call | {"prompt": list(PROMPTS)}, generator=torch.Generator().manual_seed(0)).images, theirs
    )


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux2_klein"])
def test_a_plan_s_peaks_are_measured(name, pipeline):
    """Bytes of a step and of a decoding, by shapes on the meta device and by tensors on this one."""
    kernel = wrap(pipeline(name), name)
    plan, encoded = kernel.memory_plan(2, prompts=PROMPTS[1:]), kernel.encode(PROMPTS[1:])
    for planned, work in ((plan.network, lambda: memory.step(kernel, encoded, 2)),
                          (plan.decode, lambda: memory.decoding(kernel, 2))):  # fmt: skip
        work()
        with LiveBytes("cpu") as live, torch.no_grad():
            work()
        assert 0.8 < planned / live.peak < 1.25


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux2_klein"])
def test_gradients_go_through_blocks(name, pipeline):
    """Along a direction, the gradient of a picture's brightness and a difference of two."""
    kernel = wrap(pipeline(name), name, decode_batch=1)
    cond, t = cond_of(kernel, PROMPTS), torch.tensor([2, 3])
    x = noises(kernel)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

    def value(step):
        return kernel.decode(kernel.transition(x + step * along, t, cond).endpoint).mean((1, 2, 3)).sum()

    step = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(value(step), step)
    h = 1e-2
    difference = (value(torch.tensor(h)) - value(torch.tensor(-h))) / (2 * h)
    assert abs(float(slope)) > 1e-4
    assert abs(float(slope - difference)) < 0.05 * abs(float(slope)) + 1e-4


def test_loads_as_real_ones_do(tiny_root):
    """By a folder's name, text encoders run once and go, and many prompts of unequal lengths are one list."""
    kernel = DiffusersKernel.from_pretrained(
        folder("z_image", tiny_root), num_steps=2, device="cpu", text_encoders="free", **SIZE, **SHORT
    )
    prompts = ["a" * (1 + i % 5) for i in range(18)]
    rows = kernel.encode(prompts)["prompt_embeds"]
    assert len(rows) == 18
    assert kernel.pipe.text_encoder is None
    assert kernel.encode(prompts)["prompt_embeds"].equal(rows)
    with pytest.raises(ValueError, match="freed"):
        kernel.encode(["another"])


def test_every_kind_has_a_family():
    assert set(KINDS) == {name for name, place in FAMILIES.items() if place == "modular:Modular"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HunyuanDiTControlNetPipeline", "what ControlNet adds to a step: wrap diffusers.HunyuanDiTPipeline.from_pre"),
        (
            "GlmImagePipeline",
            "another model writes tokens before its chain begins: wrap its network as a kernel, see docs/networks.md",
        ),
        ("HeliosPyramidPipeline", "chunk after chunk, .*: wrap one chunk as a kernel"),
        ("StableCascadeCombinedPipeline", "its prior and its decoder are two chains"),
        ("FluxModularPipeline", "its blocks run in FluxPipeline: wrap that, DiffusersKernel"),
        ("MyPipeline", "wrap its network as a kernel"),
    ],
)
def test_other_classes_say_what_to_do(name, message):
    with pytest.raises(ValueError, match=message):
        family_of(name)


OBJECTS = {
    "QwenImageModularPipeline": "qwen_image",
    "ZImageModularPipeline": "z_image",
    "Flux2KleinBaseModularPipeline": "flux2_klein_base",
    "Krea2TurboModularPipeline": "krea2_turbo",
}


def object_of(kind, whole):
    found = getattr(diffusers, kind)()
    names = found.component_names
    parts = {name: part for name, part in whole.components.items() if name in names}
    parts |= {name: getattr(whole, name) for name in names if name.endswith("processor") and hasattr(whole, name)}
    found.update_components(**parts)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_modular_pipeline_is_taken_as_it_is(kind, pipeline):
    """With its own blocks, and its own guider with the guider's scale, which is off where it says so (Z-Image)."""
    name = OBJECTS[kind]
    pipe = object_of(kind, pipeline(name))
    kernel = wrap(pipe, name, eta=0.0)
    noise = noises(kernel)
    drawn = kernel.decode(walk(kernel, noise, cond_of(kernel, PROMPTS)))
    call = {"num_inference_steps": T, "output_type": "pt", "output": "images", **SIZE, **CALLS.get(name, {})}
    for i, prompt in enumerate(PROMPTS):
        theirs = pipe(prompt=prompt, latents=as_taken(name, noise)[i : i + 1].clone(), **call)
        assert (drawn[i : i + 1] - theirs).abs().max() < 1e-4
    assert kernel.rows_per_nfe == (1 if name in ("krea2_turbo", "z_image") else 2)


def test_a_modular_pipeline_that_is_not_loaded_is_refused():
    with pytest.raises(CheckpointError, match=r"ZImageModularPipeline has no .*: call its load_components\(\)"):
        DiffusersKernel(diffusers.ZImageModularPipeline(), num_steps=T, device="cpu")


def test_a_guider_of_its_own_with_a_memory_is_refused(pipeline):
    pipe = object_of("ZImageModularPipeline", pipeline("z_image"))
    guider = diffusers.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5)
    pipe.update_components(guider=guider)
    with pytest.raises(ValueError, match="a memory of the steps before"):
        wrap(pipe, "z_image")
    assert wrap(pipe, "z_image", guidance_scale=2.0).rows_per_nfe == 2


def test_a_loop_that_mixes_rows_is_refused(pipeline, monkeypatch):
    pipe = pipeline("qwen_image")
    forward = type(pipe.transformer).forward

    @functools.wraps(forward)
    def mixing(self, hidden_states, **more):
        out = forward(self, hidden_states, **more)
        return (out[0] + 0.1 * hidden_states.roll(1, 0), *out[1:])

    monkeypatch.setattr(type(pipe.transformer), "forward", mixing)
    with pytest.raises(ValueError, match="rows in a batch at mixed timesteps, and alone, differ by"):
        wrap(pipe, "qwen_image")


def test_a_solver_of_another_law_is_refused(pipeline, monkeypatch):
    pipe = pipeline("z_image")
    step = type(pipe.scheduler).step
    longer = functools.wraps(step)(lambda self, model_output, *a, **k: step(self, 1.1 * model_output, *a, **k))
    monkeypatch.setattr(type(pipe.scheduler), "step", longer)
    with pytest.raises(ValueError, match="states after step 1 of 3, and the pipeline's own, differ by"):
        wrap(pipe, "z_image")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen_image", {"height": 15}, "height is 15, expected a multiple of 4 for QwenImagePipeline: 12 or 16"),
        ("flux2_klein", {"width": 18}, "width is 18, expected a multiple of 4"),
        ("qwen_image", {"clip_skip": 1}, "takes no clip_skip"),
        ("qwen_image", {"num_frames": 5}, "takes no num_frames"),
        ("qwen_image", {"guidance_scale": 1.0, "negative_prompt": "x"}, "has no effect"),
        ("qwen_image", {"network_inputs": {"colour": 1}}, "take no 'colour': choose"),
        ("z_image", {"image": Image.new("RGB", (64, 64))}, "the image is 64 x 64 pixels, expected 16 x 32"),
        ("flux2_klein", {"image": Image.new("RGB", (32, 64))}, "Image too small: 32×64"),
        ("qwen_image", {"preview": "x"}, "takes no preview"),
        ("flux2_klein", {"negative_prompt": "x"}, "takes no negative_prompt"),
    ],
)
def test_bad_settings(name, settings, message, pipeline):
    with pytest.raises(ValueError, match=message):
        wrap(pipeline(name), name, **settings)


@pytest.mark.parametrize("image", [1.0, [], torch.rand(3, 64, 64), [Image.new("RGB", (64, 64)), 1]])
def test_what_is_no_picture(image, pipeline):
    with pytest.raises(TypeError, match=r"image is .*, expected a PIL image or its file, or a list of them"):
        wrap(pipeline("flux2_klein"), "flux2_klein", image=image)


def test_pictures_are_roots_where_blocks_begin_at_one(pipeline):
    kernel = wrap(pipeline("flux2_klein"), "flux2_klein")
    with pytest.raises(ValueError, match="no blocks that begin at a picture: begin from latents with from_noise"):
        kernel.from_image(torch.rand(3, 16, 32), 0.5)
    with pytest.raises(ValueError, match="needs prompts"):
        kernel.transition(noises(kernel), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("name", "call"), [("z_image", {"guidance_scale": 3.0}), ("qwen_image", {"true_cfg_scale": 3.0})]
)
def test_each_prompt_has_its_own_negative_and_the_grid_is_the_user_s(name, call, pipeline):
    pipe, absent, sigmas = pipeline(name), ["grey", "many small things"], [1.0, 0.8, 0.3]
    said = dict(zip(PROMPTS, absent, strict=True))
    kernel = wrap(pipe, name, eta=0.0, guidance_scale=3.0, negative_prompt=said, sigmas=sigmas)
    noise, cond = noises(kernel), cond_of(kernel, PROMPTS)
    drawn = kernel.decode(walk(kernel, noise, cond))
    call = {"num_inference_steps": T, "sigmas": sigmas, "output_type": "pt", **SIZE, **CALLS.get(name, {}), **call}
    theirs = pipe(prompt=list(PROMPTS), negative_prompt=absent, latents=noise, **call).images
    assert (drawn - theirs).abs().max() < 1e-4
    alone = kernel.transition(noise[1:], torch.tensor([2]), cond_of(kernel, PROMPTS[1:]))
    law = kernel.transition(noise, torch.tensor([3, 2]), cond)
    assert (law.mean[1] - alone.mean[0]).abs().max() < 1e-5 * max(1.0, float(alone.mean.abs().max()))
    with pytest.raises(ValueError, match="negative_prompt has nothing for 'a dog': give a text for each prompt"):
        kernel.encode(["a dog"])
    with pytest.raises(ValueError, match="3 sigmas for num_steps=4"):
        wrap(pipe, name, num_steps=4, sigmas=sigmas)
    with pytest.raises(ValueError, match="expected numbers that fall"):
        wrap(pipe, name, sigmas=[0.3, 0.8, 1.0])
