"""`DiffusersKernel` walks the chain that the pipeline's own `__call__` walks, for rows at any mix of levels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import shutil

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import treesearch as ts
from tests.support import tiny
from tests.support.tolerance import float32_tolerance
from treesearch.backends.guidance import TDS
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.images.image import brightness

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]
T, N = 5, 2
PROMPTS = ["a cat", "two red dogs"]
SIZE = {"flux": {"height": 16, "width": 16}, "schnell": {"height": 16, "width": 16}}
LABELS = {"dit": [1, 3]}
NETWORK = float32_tolerance(1, 64 * 9, 30)
"""Of one call of the tiny networks per unit of what comes out: some 30 sums in a row, the widest over 64 × 9 terms."""
DECODER = float32_tolerance(1, 16 * 9, 20)
"""Of the tiny decoder, whose pixels are in 0..1: some 20 sums in a row, the widest over 16 × 9 terms."""
ENCODER = float32_tolerance(1, 64, 2 * 6 + 2)
"""Of the tiny text encoders: two blocks of six sums, embedding and projection, the widest over 64 terms."""
TEXT = ("sd", "sd_v", "sdxl", "turbo", "lightning", "sd3", "flux", "schnell", "lcm")


@functools.cache
def folder(name, root):
    return str(tiny.checkpoint(name, root))


def load(name, root, num_steps=T, **settings):
    return DiffusersKernel.from_pretrained(
        folder(name, root), num_steps=num_steps, device="cpu", **SIZE.get(name, {}) | settings
    )


def pipeline(name, root, ddim=False):
    pipe = DiffusionPipeline.from_pretrained(folder(name, root))
    pipe.set_progress_bar_config(disable=True)
    if ddim:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def noises(shape, n=N, steps=T):
    """z[0] makes x_T, z[i] belongs to the i-th step."""
    return torch.randn(steps + 1, n, *shape, generator=torch.Generator().manual_seed(3))


def cond_of(kernel, prompts):
    encoded = kernel.encode(prompts)
    return {k: getattr(v, "value", v) for k, v in encoded.items()} | {"task": torch.arange(len(prompts))}


def walk(kernel, z, cond=None):
    x = kernel.prior(z[0], cond)
    for i, t in enumerate(range(kernel.num_steps, 0, -1)):
        x = kernel.transition(x, torch.full((len(x),), t), cond).sample(z[i + 1])
    return x


@contextlib.contextmanager
def drawing(pipe, queue, monkeypatch):
    """The pipeline and its scheduler draw from the queue instead of torch."""
    queue = list(queue)
    with monkeypatch.context() as patch:
        for module in (type(pipe).__module__, type(pipe.scheduler).__module__):
            patch.setattr(
                importlib.import_module(module),
                "randn_tensor",
                lambda *a, **k: queue.pop(0).to(k.get("dtype")),
                raising=False,
            )
        yield


def assert_same_chain(kernel, pipe, z, monkeypatch, prompts=PROMPTS, takes_latents=True, **call):
    """Latents to 1e-4 of their scale, images to 1e-4."""
    x = walk(kernel, z, None if prompts is None else cond_of(kernel, prompts))
    texts = {} if prompts is None else {"prompt": prompts}
    images = []
    for output in ("latent", "pt"):
        given = {"latents": z[0].clone(), "output_type": output} if takes_latents else {"output_type": "pt"}
        with drawing(pipe, z[1:] if takes_latents else z, monkeypatch):
            images.append(pipe(num_inference_steps=T, **texts, **given, **call)[0])
    if takes_latents:
        assert (x - images[0]).abs().max() < 1e-4 * max(1.0, float(images[0].abs().max()))
    assert (kernel.decode(x) - images[1]).abs().max() < 1e-4
    assert float(images[1].std()) > 0.02


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["sd", "sd_v", "sdxl"])
def test_ddim_is_the_pipeline_s_own(name, eta, tiny_root, monkeypatch):
    kernel = load(name, tiny_root, eta=eta)
    assert_same_chain(kernel, pipeline(name, tiny_root, ddim=name != "sdxl" or eta > 0), noises(kernel.state_shape),
                      monkeypatch, eta=eta)  # fmt: skip


@pytest.mark.parametrize("name", ["sdxl", "lightning"])
def test_euler_in_other_coordinates_is_ddim_without_noise(name, tiny_root, monkeypatch):
    kernel = load(name, tiny_root, eta=0.0, guidance_scale=3.0)
    z = noises(kernel.state_shape)
    assert_same_chain(kernel, pipeline(name, tiny_root), z, monkeypatch, guidance_scale=3.0)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_turbo_is_euler_ancestral(scale, tiny_root, monkeypatch):
    kernel = load("turbo", tiny_root, guidance_scale=scale)
    assert kernel.rows_per_nfe == (2 if scale > 1 else 1)
    assert_same_chain(
        kernel, pipeline("turbo", tiny_root), noises(kernel.state_shape), monkeypatch, guidance_scale=scale
    )


@pytest.mark.parametrize(
    ("name", "scale"), [("sd3", 1.0), ("sd3", 4.0), ("flux", 1.0), ("flux", 4.0), ("schnell", 0.0)]
)
def test_flow_without_noise_is_euler(name, scale, tiny_root, monkeypatch):
    kernel = load(name, tiny_root, eta=0.0, guidance_scale=scale)
    z = noises(kernel.state_shape)
    assert_same_chain(kernel, pipeline(name, tiny_root), z, monkeypatch, guidance_scale=scale, **SIZE.get(name, {}))


@pytest.mark.parametrize("name", ["sd3", "flux", "schnell"])
def test_renoising_is_stochastic_flow_sampling(name, tiny_root, monkeypatch):
    pipe = pipeline(name, tiny_root)
    pipe.scheduler.register_to_config(stochastic_sampling=True)
    kernel = load(name, tiny_root, step="renoise")
    z = noises(kernel.state_shape)
    queue = list(z[1:]) * 2
    monkeypatch.setattr(torch, "randn_like", lambda x: queue.pop(0))
    assert_same_chain(kernel, pipe, z, monkeypatch, **SIZE.get(name, {}))
    assert DiffusersKernel(pipe, num_steps=T, device="cpu", **SIZE.get(name, {})).chain.step == "renoise"


def test_lcm_renoises(tiny_root, monkeypatch):
    kernel = load("lcm", tiny_root, guidance_scale=6.0)
    assert kernel.chain.step == "renoise"
    assert kernel.rows_per_nfe == 1  # the scale is an input of the network
    assert_same_chain(kernel, pipeline("lcm", tiny_root), noises(kernel.state_shape), monkeypatch, guidance_scale=6.0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_unconditional_pixels(eta, tiny_root, monkeypatch):
    kernel = load("ddim", tiny_root, eta=eta)
    assert kernel.chain.clip_sample == 1.0
    z = noises(kernel.state_shape)
    assert_same_chain(kernel, pipeline("ddim", tiny_root), z, monkeypatch, None, False, eta=eta, batch_size=N)


def test_ddpm(tiny_root, monkeypatch):
    kernel = load("unconditional", tiny_root)
    assert kernel.chain.step == "ddpm"
    pipe = pipeline("unconditional", tiny_root)
    assert_same_chain(kernel, pipe, noises(kernel.state_shape), monkeypatch, None, False, batch_size=N)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_by_class(scale, tiny_root, monkeypatch):
    pipe, kernel = pipeline("dit", tiny_root, ddim=True), load("dit", tiny_root, eta=0.0, guidance_scale=scale)
    z, x = noises(kernel.state_shape), None
    x = walk(kernel, z, cond_of(kernel, [1, 3]))
    with drawing(pipe, z, monkeypatch):
        theirs = pipe(class_labels=[1, 3], guidance_scale=scale, num_inference_steps=T, output_type="pt").images
    assert (kernel.decode(x) - theirs).abs().max() < 1e-4
    name = next(iter(pipe.labels))
    assert kernel.encode([name])["class_labels"].tolist() == [pipe.labels[name]]


def test_what_a_user_passes_through(tiny_root, monkeypatch, tmp_path):
    """Negative prompts, guidance rescale, CLIP skip, attention arguments and LoRA."""
    lora = str(tiny.lora(tmp_path / "lora"))
    call = {"negative_prompt": "blur", "guidance_rescale": 0.7, "guidance_scale": 5.0}
    kernel = load(
        "sd", tiny_root, eta=0.0, lora=lora, network_inputs={"cross_attention_kwargs": {"scale": 0.5}}, **call
    )
    pipe = pipeline("sd", tiny_root, ddim=True)
    pipe.load_lora_weights(lora)
    call = call | {"negative_prompt": ["blur"] * N, "cross_attention_kwargs": {"scale": 0.5}}
    assert_same_chain(kernel, pipe, noises(kernel.state_shape), monkeypatch, **call)
    plain = load("sd", tiny_root, eta=0.0)
    z = noises(kernel.state_shape)
    assert (walk(plain, z, cond_of(plain, PROMPTS)) - walk(kernel, z, cond_of(kernel, PROMPTS))).abs().max() > 0.1


SDXL_SIZES = {"original_size": (64, 48), "crops_coords_top_left": (3, 5), "target_size": (40, 24)}
SDXL_SIZES |= {"negative_original_size": (20, 20), "negative_target_size": (16, 16)}
CALLS = {
    "sd": {"height": 16, "width": 32, "negative_prompt": "blur"},
    "sdxl": {"height": 32, "width": 16, "negative_prompt": "blur", "clip_skip": 1, **SDXL_SIZES},
    "sd3": {"height": 16, "width": 32, "negative_prompt": "blur", "max_sequence_length": 15},
    "flux": {"height": 16, "width": 32, "max_sequence_length": 15},
}


@pytest.mark.parametrize("name", CALLS)
def test_sizes_negative_prompts_and_lengths(name, tiny_root, monkeypatch):
    """SDXL's own call deals its sizes of ∅ out to the wrong rows of several prompts: one at a time."""
    n = 1 if name == "sdxl" else N
    settings = {k: v for k, v in CALLS[name].items() if k not in SDXL_SIZES}
    settings |= {"sizes": SDXL_SIZES} if name == "sdxl" else {}
    kernel = load(name, tiny_root, eta=0.0, **settings)
    call = {k: [v] * n if k == "negative_prompt" else v for k, v in CALLS[name].items()}
    pipe = pipeline(name, tiny_root, ddim=name == "sd")
    assert_same_chain(kernel, pipe, noises(kernel.state_shape, n), monkeypatch, PROMPTS[:n], **call)


def test_resolutions_shift_the_grid(tiny_root, monkeypatch):
    """Dynamic shifting of SD3.5, and what else the network is handed."""
    pipe = pipeline("sd3", tiny_root)
    settings = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)
    inputs = {"joint_attention_kwargs": {"scale": 1.0}}
    kernel = DiffusersKernel(pipe, num_steps=T, eta=0.0, device="cpu", network_inputs=inputs)
    assert (kernel.chain.schedule.sigma - load("sd3", tiny_root).chain.schedule.sigma).abs().max() > 0.01
    seen, forward = [], pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: seen.append(k) or forward(*a, **k))
    assert_same_chain(kernel, pipe, noises(kernel.state_shape), monkeypatch)
    assert seen[0]["joint_attention_kwargs"] == {"scale": 1.0}


def test_lcm_on_another_checkpoint_s_settings(tiny_root, monkeypatch):
    """LCM's last step returns the endpoint, also with set_alpha_to_one=False (LoRA students on SD 1.5)."""
    pipe = pipeline("sd", tiny_root)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    kernel = DiffusersKernel(pipe, num_steps=T, device="cpu")
    assert not kernel.stochastic[1]
    assert_same_chain(kernel, pipe, noises(kernel.state_shape), monkeypatch)


def test_controlnet(tiny_root, monkeypatch):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    kernel = load("sd_controlnet", tiny_root, eta=0.0, control_image=image, control_scale=0.8)
    pipe = pipeline("sd_controlnet", tiny_root, ddim=True)
    z = noises(kernel.state_shape)
    call = {"image": image, "controlnet_conditioning_scale": 0.8}
    assert_same_chain(kernel, pipe, z, monkeypatch, **call)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_controlnet_is_a_component(name, tiny_root, monkeypatch):
    """Beside a checkpoint that has none; two of them are a list."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    unet = pipeline(name, tiny_root).unet
    nets = [tiny.stirred(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))) for _ in "ab"]
    both = {"sd": (nets[0], image, 0.8), "sdxl": (nets, [image, 1 - image], [0.8, 0.3])}[name]
    scale = {"sd": 0.8, "sdxl": [0.8, 0.3]}[name]
    settings = {"control_image": both[1], "control_scale": scale, "components": {"controlnet": both[0]}}
    kernel = load(name, tiny_root, eta=0.0, **settings)
    pipe = kernel.pipe
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config | {"clip_sample": False, "set_alpha_to_one": name == "sdxl"}
    pipe.scheduler = DDIMScheduler.from_config(config)
    call = {"image": both[1], "controlnet_conditioning_scale": both[2]}
    assert_same_chain(kernel, pipe, noises(kernel.state_shape), monkeypatch, **call)


def test_packing_is_the_pipeline_s(tiny_root):
    kernel = load("flux", tiny_root, width=32)
    x = torch.randn(2, *kernel.state_shape)
    assert torch.equal(kernel.family.pack(kernel.family.unpack(x)), x)
    theirs = kernel.pipe._unpack_latents(x, 16, 32, kernel.pipe.vae_scale_factor)
    assert torch.equal(kernel.family.unpack(x), theirs)


def test_formats_and_precision_of_parts(tiny_root):
    kernel = load("sd", tiny_root, dtype="float16", channels_last=True)
    assert kernel.pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert kernel.pipe.vae.dtype == torch.float32  # it says that it overflows in float16
    assert kernel.pipe.unet.dtype == torch.float16


def test_roots_keep_the_chain(tiny_root, tmp_path):
    kernel = load("lcm", tiny_root, preview=str(tiny.tiny_decoder(tmp_path / "taesd")))
    rooted = kernel.from_noise(torch.zeros(kernel.state_shape))
    assert (rooted.chain.step, rooted.num_steps) == ("renoise", T)
    assert rooted.preview is not None
    clipped = load("ddim", tiny_root).from_noise(torch.zeros(3, 16, 16))
    assert clipped.chain.clip_sample == 1.0


def test_an_image_is_a_root(tiny_root, monkeypatch):
    """img2img: the last steps of the chain, from the noised image."""
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    kernel = load("sd", tiny_root, eta=0.0).from_image(image, strength=0.6)
    assert kernel.num_steps == 3
    z = noises(kernel.state_shape, steps=3)
    x = walk(kernel, z, cond_of(kernel, PROMPTS))
    pipe = StableDiffusionImg2ImgPipeline(**pipeline("sd", tiny_root, ddim=True).components)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample", lambda self, g: self.mode()
    )
    with drawing(pipe, z, monkeypatch):
        theirs = pipe(
            prompt=PROMPTS, image=torch.stack([image] * N), strength=0.6, num_inference_steps=T, output_type="pt"
        ).images
    assert (kernel.decode(x) - theirs).abs().max() < 1e-4
    levels = (255 * image).round().byte()
    pil = load("sd", tiny_root).from_image(Image.fromarray(levels.permute(1, 2, 0).numpy()), strength=0.6)
    same = load("sd", tiny_root).from_image(levels / 255, strength=0.6)
    torch.testing.assert_close(pil.prior(z[0]), same.prior(z[0]))
    with pytest.raises(ValueError, match=r"strength is 0.1, expected 0.2\.\.1"):
        load("sd", tiny_root).from_image(image, strength=0.1)
    with pytest.raises(ValueError, match="resize it"):
        load("sd", tiny_root).from_image(torch.rand(3, 32, 32))
    for wrong in (levels, 255 * image, 2 * image - 1):
        with pytest.raises(ValueError, match=r"the image is torch.* expected floats in 0\.\.1: divide bytes by 255"):
            load("sd", tiny_root).from_image(wrong)


def test_pixels_are_a_root(tiny_root):
    kernel = load("unconditional", tiny_root, eta=0.0).from_image(Image.new("RGB", (16, 16), (255, 0, 0)), strength=0.2)
    x = kernel.prior(torch.zeros(1, *kernel.state_shape))
    grey = kernel.decode(x / kernel.chain.schedule.alpha[-1].float()).mean()
    torch.testing.assert_close(grey, torch.tensor(76 / 255), atol=2e-3, rtol=0)


def test_a_given_x_T_is_a_root(tiny_root):
    kernel = load("ddim", tiny_root)
    x_T = torch.randn(kernel.state_shape, generator=torch.Generator().manual_seed(5))
    rooted = kernel.from_noise(x_T)
    assert not rooted.stochastic[0]
    assert rooted.stochastic[1:-1].any()
    assert (rooted.prior(torch.randn(3, *kernel.state_shape)) == x_T).all()
    found = ts.search(rooted, brightness(), ts.BestOfN(), budget=ts.Budget(nfe=4 * T))
    assert len(found.samples.flatten(1).unique(dim=0)) == 4  # they part below the root
    assert rooted.fingerprint != kernel.fingerprint


@pytest.mark.parametrize("name", ["ddim", "sd", "sdxl", "lcm", "dit", "sd3", "flux"])
def test_rows_do_not_depend_on_their_batch(name, tiny_root):
    """Mixed levels and mixed prompts in one batch, and each row alone."""
    kernel = load(name, tiny_root)
    prompts = [1, 3, 1, 0] if name == "dit" else ["a cat", "two red dogs", "a cat", ""]
    cond = cond_of(kernel, prompts)
    rows = {k for k, v in kernel.encode(prompts).items() if not hasattr(v, "value")} | {"task"}
    x = torch.randn(4, *kernel.state_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([5, 1, 3, 3])
    law = kernel.transition(x, t, cond)
    for i in range(4):
        alone = {k: v[i : i + 1] if k in rows else v for k, v in cond.items()}
        one = kernel.transition(x[i : i + 1], t[i : i + 1], alone)
        for part in ("mean", "endpoint"):
            a, b = getattr(law, part)[i], getattr(one, part)[0]
            gain = 1 / max(float(kernel.chain.alpha[t[i]]), 0.01)  # of x̂_0 over the network's output
            assert (a - b).abs().max() < NETWORK * max(gain, float(b.abs().max()))
    if name in TEXT:  # the prompt matters
        other = kernel.transition(x[:1], t[:1], {k: v[1:2] if k in rows else v for k, v in cond.items()})
        assert (other.mean - law.mean[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_nothing_leaks_between_calls(name, tiny_root):
    """Searches and other prompts in between change neither the chain nor the pipeline."""
    pipe = pipeline(name, tiny_root)
    call = {"prompt": PROMPTS, "num_inference_steps": 2, "output_type": "pt", **SIZE.get(name, {})}
    theirs = pipe(generator=torch.Generator().manual_seed(0), **call).images
    kernel = DiffusersKernel(pipe, num_steps=T, device="cpu", **SIZE.get(name, {}))
    z = noises(kernel.state_shape)
    first = walk(kernel, z, cond_of(kernel, PROMPTS))
    walk(kernel, z[:, :1], cond_of(kernel, ["something else"]))
    ts.search(kernel, brightness(), ts.FeynmanKac(num_particles=2), prompts=["a", "b"], budget=ts.Budget(nfe=4 * T))
    assert torch.equal(walk(kernel, z, cond_of(kernel, PROMPTS)), first)
    assert torch.equal(pipe(generator=torch.Generator().manual_seed(0), **call).images, theirs)


@pytest.mark.parametrize("method", [ts.FeynmanKac(num_particles=4), ts.DiffusionTreeSampling(wave=3), ts.BestOfN()])
def test_searches(method, tiny_root):
    """Best-of-N's samples are those of the bare chain with the same noise; every task keeps to its prompt."""
    kernel = load("sd", tiny_root)
    seen = []

    def red(samples, prompts=None):
        seen.extend(prompts)
        return samples[:, 0].flatten(1).mean(1)

    found = ts.search(kernel, as_reward(red), method, prompts=PROMPTS, budget=ts.Budget(nfe=2 * 8 * T), batch_size=3)
    assert found.cost.rows == 2 * found.cost.nfe
    assert set(seen) == set(PROMPTS)
    for task in found.tasks:
        assert task.samples.shape[1:] == (3, 16, 16)
        torch.testing.assert_close(task.rewards, task.samples[:, 0].double().flatten(1).mean(1), atol=DECODER, rtol=0)


def test_text_encoders_run_once_and_go(tiny_root, monkeypatch):
    pipe = pipeline("sd", tiny_root)
    calls = []
    encoder = type(pipe.text_encoder)  # another `forward` of the encoder alone would be another encoder
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    kernel = DiffusersKernel(pipe, num_steps=T, device="cpu", text_encoders="free")
    first = kernel.encode(PROMPTS)
    assert pipe.text_encoder is None
    again = kernel.encode(PROMPTS)
    assert len(calls) == 2  # the prompts, and what they are guided away from
    assert torch.equal(first["prompt_embeds"], again["prompt_embeds"])
    for other in (kernel, DiffusersKernel.from_noise(kernel, torch.zeros(kernel.state_shape))):
        with pytest.raises(
            ValueError, match=r"text_encoder was freed after the first prompts: use text_enc.*'offload'"
        ):
            other.encode(["new"])
    assert kernel.fingerprint == load("sd", tiny_root).fingerprint  # whether they are there or not
    offloaded = load("sd", tiny_root, text_encoders="offload")
    assert not torch.equal(offloaded.encode(["x"])["prompt_embeds"], offloaded.encode(["new"])["prompt_embeds"])


def test_many_prompts_are_encoded_in_parts(tiny_root):
    kernel = load("sdxl", tiny_root)
    prompts = [f"number {i}" for i in range(37)]
    encoded = kernel.encode(prompts)
    assert len(encoded["prompt_embeds"]) == 37
    alone = kernel.encode(prompts[20:21])
    close = ENCODER * float(alone["pooled_embeds"].abs().max())
    torch.testing.assert_close(encoded["pooled_embeds"][20:21], alone["pooled_embeds"], atol=close, rtol=0)


def test_decoding_in_parts_with_gradients(tiny_root):
    kernel = load("sd", tiny_root, decode_batch=2)
    x = torch.randn(5, *kernel.state_shape, requires_grad=True)
    images = kernel.decode(x)
    theirs = kernel.pipe.vae.decode(x / 0.18215).sample.div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(images, theirs, atol=DECODER, rtol=0)
    (slope,) = torch.autograd.grad(images.sum(), x)
    (whole,) = torch.autograd.grad((kernel.pipe.vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1).sum(), x)
    there_and_back = 2 * DECODER * float(whole.abs().max())
    torch.testing.assert_close(slope, whole, atol=there_and_back, rtol=0)
    assert not kernel.decode(x.detach()).requires_grad
    t, cond = torch.full((2,), 3), cond_of(kernel, PROMPTS)
    assert kernel.transition(x[:2], t, cond).mean.requires_grad
    assert not kernel.transition(x[:2].detach(), t, cond).mean.requires_grad


def test_gradients_go_through_network_and_decoder(tiny_root):
    """TDS on latents: the shift is the slope of the reward for the row's own prompt; backward passes are counted."""
    kernel = load("sd", tiny_root, decode_batch=1)
    reward = Reward(lambda images, prompts: [10.0, 1.0][prompts[0] == "b"] * images[:, 0].flatten(1).mean(1), "red")
    guided = TDS(kernel, reward, lam=2.0)
    encoded = guided.encode(["a", "b"])
    x, t = torch.randn(2, *kernel.state_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 2])

    def cond(i):
        rows = {k: getattr(v, "value", v[i : i + 1] if not hasattr(v, "value") else v) for k, v in encoded.items()}
        return rows | {"task": torch.tensor([i])}

    for i, prompt in enumerate("ab"):
        law, base = guided.transition(x[[i]], t[[i]], cond(i)), kernel.transition(x[[i]], t[[i]], cond(i))
        along = torch.randn(kernel.state_shape, generator=torch.Generator().manual_seed(1))

        def value(step, i=i, along=along, prompt=prompt):
            endpoint = kernel.transition(x[[i]] + step * along, t[[i]], cond(i)).endpoint
            return float(reward(kernel.decode(endpoint), [prompt]))

        slope = (value(1e-2) - value(-1e-2)) / 2e-2
        moved = float(((law.mean - base.mean) / (2.0 * base.std**2) * along).sum())
        assert moved == pytest.approx(slope, rel=0.05, abs=1e-3)
        # Ten times a mean of pixels, of an endpoint behind 1 / α.
        gain = 10 * max(1.0, float(base.endpoint.abs().max()))
        theirs = reward(kernel.decode(base.endpoint), [prompt])
        torch.testing.assert_close(law.rewards, theirs, atol=gain * (NETWORK + DECODER), rtol=0)
    method, budget = ts.FeynmanKac(num_particles=2, lam=2.0), ts.Budget(nfe=4 * T)
    found = ts.search(guided, reward, method, prompts=["a", "b"], budget=budget, batch_size=3)
    assert found.cost.backward_nfe == found.cost.nfe
    assert all(np.isfinite(task.log_z) for task in found.tasks)


def test_previews_draw_endpoints_only(tiny_root, tmp_path):
    """FK's endpoints above t = 0 go through the tiny decoder, samples through the VAE; the result says so."""
    decoder = str(tiny.tiny_decoder(tmp_path / "taesd"))
    kernel, plain = load("sd", tiny_root, preview=decoder), load("sd", tiny_root)
    x = torch.randn(2, *kernel.state_shape)
    assert (kernel.preview(x) - kernel.decode(x)).abs().max() > 0.01
    assert plain.preview is None
    options = {"prompts": ["a"], "budget": ts.Budget(nfe=4 * T), "seed": 1}
    method = ts.FeynmanKac(num_particles=4, lam=1e-6)
    found, exact = (ts.search(k, brightness(), method, **options) for k in (kernel, plain))
    assert any("preview" in w for w in found.diagnostics["warnings"])
    assert not any("preview" in w for w in exact.diagnostics["warnings"])
    torch.testing.assert_close(found.rewards, brightness()(found.samples), atol=DECODER, rtol=0)
    rewards = [torch.from_numpy(f.tree.reward[f.tree.t > 0]) for f in (found, exact)]
    known = ~rewards[0].isnan()
    assert known.any()
    assert (rewards[0][known] - rewards[1][known]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision(dtype, tiny_root):
    kernel = load("sd", tiny_root, dtype=dtype)
    assert kernel.family.network.dtype == getattr(torch, dtype)
    z = noises(kernel.state_shape)
    x = walk(kernel, z, cond_of(kernel, PROMPTS))
    assert x.dtype == torch.float32
    assert kernel.decode(x).dtype == torch.float32


def test_fingerprints(tiny_root, tmp_path):
    base = load("sd", tiny_root)
    assert base.fingerprint == load("sd", tiny_root).fingerprint
    others = [
        load("sd_v", tiny_root), load("sd", tiny_root, eta=0.5), load("sd", tiny_root, num_steps=4),
        load("sd", tiny_root, guidance_scale=3.0), load("sd", tiny_root, negative_prompt="x"),
        load("sd", tiny_root, height=32), load("sd", tiny_root, tiling=True),
        load("sd", tiny_root, network_inputs={"cross_attention_kwargs": {"x": torch.zeros(9999)}}),
        load("sd", tiny_root, network_inputs={"cross_attention_kwargs": {"x": torch.arange(9999)}}),
    ]  # fmt: skip
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    others += [load("sd_controlnet", tiny_root, control_image=i) for i in (image, 1 - image)]
    adapted = load("sd", tiny_root, lora=str(tiny.lora(tmp_path / "lora")))
    full = adapted.fingerprint
    adapted.pipe.set_adapters(adapted.pipe.get_active_adapters(), 0.5)
    assert len({full, adapted.fingerprint, base.fingerprint}) == 3
    other = load("sd", tiny_root)
    other.pipe.unet.conv_in.weight.data += 1e-3
    prints = {k.fingerprint for k in [base, *others, other]}
    assert len(prints) == len(others) + 2


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("sd", {"height": 18}, ValueError, "height is 18, expected a multiple of 8 for .*: 16 or 24"),
        ("sd", {"num_steps": 0}, ValueError, "num_steps is 0, expected at least 1"),
        ("sd", {"eta": 2.0}, ValueError, r"eta is 2.0, expected 0\.\.1"),
        ("sd", {"step": "dpmsolver++"}, ValueError, "solvers with memory .* have no law"),
        ("sd", {"dtype": "int8"}, ValueError, "unknown dtype 'int8': choose float32"),
        ("sd", {"guidance_rescale": 2.0}, ValueError, r"guidance_rescale is 2.0, expected 0\.\.1"),
        ("sd", {"control_image": 1}, ValueError, "has no ControlNet for a control_image"),
        ("sd_controlnet", {}, ValueError, "needs a control_image"),
        ("flux", {"negative_prompt": "x"}, ValueError, "FluxPipeline takes no negative_prompt"),
        ("ddim", {"guidance_scale": 3.0}, ValueError, "nothing to guide by"),
        ("dit", {"height": 24, "width": 24}, ValueError, "this DiT draws 16 x 16 pixels, got 24 x 24"),
        ("sd", {"guidance": 3.0}, TypeError, "guidance"),
        ("sd", {"guidance_scale": -1}, ValueError, "guidance_scale is -1, expected a number >= 0"),
        ("sd", {"guidance_scale": "7"}, TypeError, r"guidance_scale is '7' \(str\), expected a number"),
        ("sd", {"guidance_scale": 1, "negative_prompt": "x"}, ValueError, "negative_prompt has no effect"),
        ("sd", {"control_scale": 0.5}, ValueError, "has no ControlNet for a control_scale"),
        ("sd", {"sizes": {"original_size": (8, 8)}}, ValueError, "StableDiffusionPipeline takes no sizes"),
        ("sdxl", {"sizes": {"size": (8, 8)}}, ValueError, "sizes has 'size', choose original_size"),
        ("sdxl", {"sizes": {"original_size": 8}}, TypeError, "original_size is 8 .*, expected two numbers of pixels"),
        ("schnell", {"guidance_scale": 3.0}, ValueError, "guidance distilled away"),
        ("flux", {"max_sequence_length": 600}, ValueError, r"max_sequence_length is 600, expected 1\.\.512"),
        ("lcm", {"negative_prompt": "x"}, ValueError, "negative_prompt has no effect"),
        ("sd", {"height": 0}, ValueError, "height is 0, expected a multiple of 8"),
        ("sd", {"components": {"vea": None}}, ValueError, "StableDiffusionPipeline has no component 'vea': choose"),
        ("sd", {"preview": 3}, TypeError, "preview is int, expected a tiny decoder"),
        ("sd", {"decode_batch": 0}, ValueError, "decode_batch is 0"),
        ("sd", {"text_encoders": "drop"}, ValueError, "choose keep, offload or free"),
    ],
)
def test_bad_settings(name, settings, error, message, tiny_root):
    with pytest.raises(error, match=message):
        load(name, tiny_root, **settings)


def damaged(whole, copy):
    """A copy of a checkpoint with something wrong."""
    shutil.copytree(whole, copy)
    part = copy / ("unet" if "U-Net" in copy.name else "text_encoder")
    weights = next(part.glob("*.safetensors"))
    if copy.name.startswith("drop"):
        shutil.rmtree(part)
    elif copy.name.startswith("cut"):
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        kept = load_file(weights)
        kept.pop(sorted(kept)[0])
        save_file(kept, weights)
    return copy


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")
def test_bad_checkpoints(tiny_root, tmp_path):
    with pytest.raises(OSError, match=r"cannot load 'no-such/model': there is no such folder"):
        DiffusersKernel.from_pretrained("no-such/model", num_steps=T)
    with pytest.raises(OSError, match="cannot load"):
        DiffusersKernel.from_pretrained(str(tmp_path / "nothing"), num_steps=T)
    pipe = pipeline("sd", tiny_root)
    pipe.text_encoder = None
    with pytest.raises(OSError, match="StableDiffusionPipeline has no text_encoder"):
        DiffusersKernel(pipe, num_steps=T)
    with pytest.raises(OSError, match="holds no LoRA weights for FluxPipeline: is it for another model"):
        load("flux", tiny_root, lora=str(tiny.lora(tmp_path / "lora")))
    for damage, message in (
        ("drop the U-Net", "its folder unet is missing"),
        ("cut the text encoder", r"text_encoder/model\.safetensors is cut or broken"),
        ("empty the U-Net", r"its unet: it lacks 1 weights, such as conv_in\.bias"),
        ("empty the text encoder", r"its text_encoder: it lacks 1 weights, such as"),
    ):
        with pytest.raises(OSError, match=message):
            DiffusersKernel.from_pretrained(str(damaged(folder("sd", tiny_root), tmp_path / damage)), num_steps=T)
    other = pipeline("sd", tiny_root)
    other.__class__ = type("OtherPipeline", (type(other),), {})
    with pytest.raises(
        ValueError,
        match=r"^OtherPipeline cannot be searched: no family and no modular blocks of diffusers have it: wrap its",
    ):
        DiffusersKernel(other, num_steps=T)
    pipe = pipeline("sd", tiny_root)
    pipe.scheduler = __import__("diffusers").EDMEulerScheduler()
    with pytest.raises(ValueError, match="cannot read a schedule from EDMEulerScheduler: expected one of DDIM"):
        DiffusersKernel(pipe, num_steps=T)


def test_bad_prompts(tiny_root):
    kernel = load("sd", tiny_root)
    with pytest.raises(TypeError, match="prompt 3 is int, expected text"):
        kernel.encode([3])
    with pytest.warns(UserWarning, match=r"has 92 tokens, the text encoder reads 77: .* is lost"):
        kernel.encode(["x" * 90])
    with pytest.raises(ValueError, match=r"needs prompts: prompts=\[...\], or prompts=\[''\] for no text"):
        ts.search(kernel, brightness(), ts.BestOfN(), budget=ts.Budget(nfe=T))
    with pytest.raises(ValueError, match=r"'cta' is no class of this model, expected a name or 0\.\.999"):
        load("dit", tiny_root).encode(["cta"])


def test_a_safety_checker_is_left_out(tiny_root):
    kernel = load("sd_safe", tiny_root)
    assert kernel.pipe.safety_checker is None


def test_nan_names_the_step(tiny_root):
    kernel = load("sd", tiny_root, dtype="float16")
    options = {"prompts": PROMPTS, "budget": ts.Budget(nfe=4 * T)}
    kernel.pipe.unet.conv_out.bias.data *= 1e9  # beyond float16
    message = (
        r"4 of 4 states are NaN or infinite after the step from t = \[5\]: timesteps \[801\] in float16; .*bfloat16"
    )
    with pytest.raises(ts.KernelError, match=message):
        ts.search(kernel, brightness(), ts.BestOfN(), **options)
    whole = load("sd", tiny_root)
    whole.pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ts.KernelError, match=r"in float32; are the weights.* whole"):
        ts.search(whole, brightness(), ts.BestOfN(), **options)
    with pytest.raises(ValueError, match="the decoder returned NaN or infinity in float32: are the weights whole"):
        whole.decode(torch.full((1, *kernel.state_shape), torch.nan))
