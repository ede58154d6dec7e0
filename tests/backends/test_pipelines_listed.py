"""Pipelines of 2025 and 2026 by their own call: each beside that call in one piece, at the smallest size."""

import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from tests.backends.test_pipelines_called import PROMPTS, SMALL, cond_of, noises, walk
from tests.support import tiny, tiny_listed  # noqa: F401  the builders
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.pipelines.families import family_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]
T = 2
PICTURE = Image.fromarray((torch.arange(16 * 32 * 3).reshape(16, 32, 3) % 251).byte().numpy())
MASK = Image.fromarray(255 * (torch.arange(16 * 32).reshape(16, 32) % 32 < 16).byte().numpy())
SHORT = {"max_sequence_length": 64}
PLAIN = {"use_resolution_binning": False, "complex_human_instruction": None}
CASES = {  # settings, the shape of a state and of a sample
    "z_image_controlnet": (SMALL | SHORT | {"control_image": PICTURE}, (4, 8, 16), (3, 16, 32)),
    "z_image_controlnet_inpaint": (
        SMALL | SHORT | {"control_image": PICTURE, "image": PICTURE, "mask": MASK},
        (4, 8, 16),
        (3, 16, 32),
    ),
    "z_image_omni": (SMALL | SHORT, (4, 8, 16), (3, 16, 32)),
    "qwen_controlnet_inpaint": (SMALL | {"control_image": PICTURE, "mask": MASK}, (32, 16), (3, 16, 32)),
    "sana_controlnet": (
        {"height": 32, "width": 64, "control_image": PICTURE, "network_inputs": PLAIN},
        (4, 16, 32),
        (3, 32, 64),
    ),
    "hidream": (SHORT | {"height": 32, "width": 32}, (4, 16, 16), (3, 32, 32)),
    "wan_vace": ({"height": 32, "width": 32, "num_frames": 5}, (4, 3, 8, 8), (5, 3, 32, 32)),
    "animate_diff": ({"height": 16, "width": 16, "num_frames": 4}, (4, 4, 8, 8), (4, 3, 16, 16)),
    "sana_video": (
        {"height": 32, "width": 32, "num_frames": 5, "network_inputs": PLAIN},
        (4, 3, 8, 8),
        (5, 3, 32, 32),
    ),
    "kandinsky3": ({"height": 64, "width": 64}, (4, 8, 8), (3, 64, 64)),
    "longcat_audio": ({"network_inputs": {"audio_duration_s": 0.5}}, (16, 4), (1, 64)),
    "stable_audio": ({}, (4, 8), (2, 32)),
    "stable_audio_3": ({"network_inputs": {"duration": 0.5}}, (4, 4), (2, 32)),
    "ideogram4": (SMALL | {"max_sequence_length": 320, "guidance_scale": 5.0}, (32, 16), (3, 16, 32)),
    "qwen_image_21": ({"height": 64, "width": 64}, (16, 4), (3, 64, 64)),
    "nucleus": (SMALL | {"max_sequence_length": 320}, (32, 16), (3, 16, 32)),
}
UNSAVED = ("qwen_image_21", "nucleus")  # whose processors cannot be read without torchvision
NAMES = {"mask": "mask_image", "control_scale": "controlnet_conditioning_scale"}
OWN = {"qwen_controlnet_inpaint": {"mask": "control_mask"}, "sana_video": {"num_frames": "frames"}}
ALONE = "wan_vace"  # takes a prompt, and no list


def loaded(name, root):
    if name in UNSAVED:
        with tiny.seeded():
            pipe = tiny.UNSAVED[name]()
    else:
        pipe = DiffusionPipeline.from_pretrained(tiny.checkpoint(name, root))
    if name == "hidream":
        pipe.default_sample_size = 16  # of whose area a picture is
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, name, noise, settings):
    """By the call itself, a prompt at a time."""
    names = NAMES | OWN.get(name, {})
    call = {names.get(k, k): v for k, v in settings.items()}
    call = call | call.pop("network_inputs", {}) | ({"guidance_schedule": None} if name == "ideogram4" else {})
    drawn = []
    for i, prompt in enumerate(PROMPTS):
        given = {"prompt": prompt if name == ALONE else [prompt], "latents": noise[i : i + 1].clone(), **call}
        drawn += [next(iter(pipe(num_inference_steps=T, output_type="pt", **given).values()))]
    found = torch.cat(drawn)
    if name == "qwen_image_21":  # with an alpha channel
        found = found[:, :3] * found[:, 3:] + 1 - found[:, 3:]
    return (found / 2 + 0.5).clamp(0, 1) if name == "kandinsky3" else found


@pytest.mark.parametrize("name", CASES)
def test_without_noise_is_the_pipeline_s_own_row_by_row(name, tiny_root, monkeypatch):
    settings, state, sample = CASES[name]
    pipe = loaded(name, tiny_root)
    kernel = DiffusersKernel(pipe, num_steps=T, device="cpu", eta=0.0, **settings)
    assert kernel.state_shape == state
    noise, cond = noises(kernel), cond_of(kernel, PROMPTS)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    ours, other = kernel.decode(walk(kernel, noise, cond)), theirs(pipe, name, noise, settings)
    assert tuple(ours.shape[1:]) == sample
    assert (kernel.sound_rate, kernel.sample_range) == ((64, None) if "audio" in name else (None, (0.0, 1.0)))
    assert (ours - other).abs().max() < 1e-4 * max(1.0, float(other.abs().max()))
    assert float(other.std()) > 0.02
    law = kernel.transition(noise, torch.tensor([1, T]), cond)
    for i, t in enumerate((1, T)):
        alone = kernel.transition(noise[i : i + 1], torch.tensor([t]), cond_of(kernel, PROMPTS[i : i + 1])).mean[0]
        assert (law.mean[i] - alone).abs().max() < 1e-5 * max(1.0, float(alone.abs().max()))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("longcat_audio", {}, "needs network_inputs={'audio_duration_s': ...}: else the prompt says how long"),
        ("ideogram4", SMALL, "needs guidance_scale=...: its own is a schedule that counts steps"),
        ("z_image_controlnet", SMALL, "needs control_image=..., a picture that it is told"),
        ("wan_vace", {"mask": MASK}, "WanVACEPipeline takes no mask"),
        ("qwen_image_21", {"guidance_scale": 4.0, "height": 64, "width": 64}, "guides away from a negative_prompt alo"),
    ],
)
def test_what_a_class_needs_is_said(name, settings, message, tiny_root):
    with pytest.raises(ValueError, match=message):
        DiffusersKernel(loaded(name, tiny_root), num_steps=T, device="cpu", **settings)


def test_grids_of_edm_are_of_v_with_unit_variance():
    """There x / √(1 + σ²) is a state of α² + σ² = 1; other preconditioners are refused."""
    own = EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0)
    own.set_timesteps(4)
    found = Schedule.of(own, 4)
    x, v = (torch.randn(3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    for t, sigma in enumerate(own.sigmas.double().flip(0)[1:], 1):
        endpoint = own.precondition_outputs(x, v, sigma)
        assert found.alpha[t] * (found.alpha[t] * x) - found.sigma[t] * v == pytest.approx(endpoint, abs=1e-6)
    for settings in ({}, {"prediction_type": "v_prediction", "sigma_data": 0.5}):
        with pytest.raises(ValueError, match="its network is one of v where they are 'v_prediction' and 1"):
            Schedule.of(EDMDPMSolverMultistepScheduler(**settings), 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Cosmos3OmniPipeline", "it encodes prompts in its network"),
        ("OmniGenPipeline", "it encodes prompts in its network"),
        ("QwenImageLayeredPipeline", "a sample of it is several pictures"),
        ("WanVideoToVideoPipeline", "it begins at a video"),
        ("AudioLDM2Pipeline", "joins its prompt and no text"),
        ("KolorsPipeline", "sentencepiece"),
        ("Cosmos2TextToImagePipeline", "guardrail"),
    ],
)
def test_what_does_not_run_says_why(name, message):
    with pytest.raises(ValueError, match=message):
        family_of(name)
