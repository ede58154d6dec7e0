"""LTX-2: a video and its sound are one state, and each is drawn of it."""

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import treesearch as ts
from tests.backends.test_pipelines_called import PROMPTS, cond_of, noises, walk
from tests.support import tiny, tiny_sound  # noqa: F401  the builder
from treesearch.backends.base.pictures import pixels_of
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.pipelines.calls import joined, parted
from treesearch.rewards.base import as_reward

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
T, SHAPES = 2, [(768, 4), (5, 4)]
SIZE = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 32}
LAYER = {"spatio_temporal_guidance_blocks": [1]}


@pytest.fixture(scope="module")
def pipe(tiny_root):
    found = DiffusionPipeline.from_pretrained(tiny.checkpoint("ltx2", tiny_root))
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def kernel(pipe):
    return DiffusersKernel(pipe, num_steps=T, device="cpu", eta=0.0, network_inputs=LAYER, **SIZE)


def test_without_noise_is_the_pipeline_s_own(pipe, kernel):
    """Guidance of three ways, rescaled in x_0, and latents of sound, which the call takes in the decoder's units."""
    assert (kernel.state_shape, kernel.rows_per_nfe, kernel.sound_rate) == ((768 * 4 + 5 * 4,), 4, 16000)
    noise = noises(kernel)
    x = walk(kernel, noise, cond_of(kernel, PROMPTS))
    drawn, sound = kernel.decode(x), kernel.sound(x)
    video, audio = parted(noise, SHAPES)
    audio = audio * pipe.audio_vae.latents_std + pipe.audio_vae.latents_mean
    for i, prompt in enumerate(PROMPTS):
        given = {"latents": video[i : i + 1], "audio_latents": audio[i : i + 1], "output_type": "pt"}
        theirs = pipe(prompt=[prompt], num_inference_steps=T, **given, **SIZE, **LAYER)
        assert (theirs.frames.shape, theirs.audio.shape) == ((1, 5, 3, 32, 32), (1, 2, 68))
        assert (drawn[i : i + 1] - theirs.frames).abs().max() < 1e-4
        assert (sound[i : i + 1] - theirs.audio).abs().max() < 1e-4
        assert min(float(theirs.frames.std()), float(theirs.audio.std())) > 0.02


def test_a_first_frame_stays_and_the_frames_behind_it_are_drawn(tiny_root):
    """States are what the scheduler steps on: the frames behind the first, and the sound."""
    pipe = DiffusionPipeline.from_pretrained(tiny.checkpoint("ltx2_i2v", tiny_root))
    pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray((torch.arange(32 * 32 * 3).reshape(32, 32, 3) % 251).byte().numpy())
    inputs = LAYER | {"image_crf": 0}  # as it is, where a codec would else go over it
    given = {"num_steps": T, "device": "cpu", "eta": 0.0, "network_inputs": inputs, **SIZE}
    kernel = DiffusersKernel(pipe, image=picture, **given)
    noise = noises(kernel)
    drawn = kernel.decode(walk(kernel, noise, cond_of(kernel, PROMPTS)))
    video, audio = parted(noise, [(4, 2, 16, 16), (5, 4)])
    audio = audio * pipe.audio_vae.latents_std + pipe.audio_vae.latents_mean
    pixels = 2 * pixels_of(picture, 3, (32, 32))[None, :, None] - 1
    frame = pipe.vae.encode(pixels).latent_dist.mode()
    mean, std = pipe.vae.latents_mean.view(1, 4, 1, 1, 1), pipe.vae.latents_std.view(1, 4, 1, 1, 1)
    for i, prompt in enumerate(PROMPTS):
        latents = torch.cat([frame, video[i : i + 1] * std + mean], 2)
        call = {"latents": latents, "audio_latents": audio[i : i + 1], "output_type": "pt"}
        theirs = pipe(image=picture, prompt=[prompt], num_inference_steps=T, **call, **SIZE, **inputs)
        assert (drawn[i : i + 1] - theirs.frames).abs().max() < 1e-4
    with pytest.raises(ValueError, match="LTX2ImageToVideoPipeline works on a picture: give it one"):
        DiffusersKernel(pipe, **given)


def test_rows_do_not_depend_on_their_batch(kernel):
    x, t = noises(kernel, 3), torch.tensor([2, 1, 1])
    law = kernel.transition(x, t, cond_of(kernel, [*PROMPTS, ""]))
    for i, prompt in enumerate([*PROMPTS, ""]):
        alone = kernel.transition(x[i : i + 1], t[i : i + 1], cond_of(kernel, [prompt])).mean[0]
        assert (law.mean[i] - alone).abs().max() < 1e-5 * max(1.0, float(alone.abs().max()))


def test_the_scale_of_a_call_s_own_rescale_may_be_none(pipe, kernel):
    """Its own is 0.7; the setting's 0 is the pipeline's own, and 0 itself is an argument of the call."""
    plain = DiffusersKernel(
        pipe,
        num_steps=T,
        device="cpu",
        network_inputs=LAYER | {"guidance_rescale": 0.0, "audio_guidance_rescale": 0.0},
        **SIZE,
    )
    x, t = noises(kernel), torch.tensor([2, 1])
    one, two = (each.transition(x, t, cond_of(each, PROMPTS)).endpoint for each in (kernel, plain))
    assert (one - two).abs().max() > 1e-3


def test_searches_and_loads_as_real_ones_do(pipe, tiny_root):
    given = {"num_steps": T, "device": "cpu", "text_encoders": "free", "network_inputs": LAYER, **SIZE}
    kernel = DiffusersKernel.from_pretrained(str(tiny.checkpoint("ltx2", tiny_root)), **given)
    reward = as_reward(lambda samples: samples.flatten(1).mean(1), "bright")
    found = ts.search(kernel, reward, ts.BestOfN(), prompts=PROMPTS[:1], budget=ts.Budget(nfe=2 * T))
    assert found.samples.shape == (2, 5, 3, 32, 32)
    task = found.tasks[0]
    sound = kernel.sound(task.fetch.raw(task.leaves))
    assert sound.shape == (2, 2, 68)
    assert sound.abs().max() <= 1
    assert kernel.memory_plan(2, prompts=PROMPTS[:1]).network > 0


def test_streams_come_apart_as_they_were_joined():
    parts = [torch.arange(12.0).reshape(2, 3, 2), torch.arange(4.0).reshape(2, 1, 2)]
    for part, found in zip(parts, parted(joined(parts), [(3, 2), (1, 2)]), strict=True):
        assert torch.equal(part, found)


def test_models_without_sound_say_so(tiny_root):
    folder = str(tiny.checkpoint("unconditional", tiny_root))
    kernel = DiffusersKernel.from_pretrained(folder, num_steps=T, device="cpu")
    assert kernel.sound_rate is None
    with pytest.raises(ValueError, match="DDPMPipeline makes no sound: its samples are what decode draws"):
        kernel.sound(torch.zeros(1, *kernel.state_shape))
