"""IP-Adapters: a picture beside the prompt, as the pipeline's own call has it."""

import diffusers
import pytest
import torch
import transformers
from PIL import Image

import treesearch as ts
from tests.backends.test_pipelines_called import PROMPTS, cond_of, noises, walk
from tests.support import tiny
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.rewards.base import as_reward

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
T, SIZE = 2, {"height": 16, "width": 32}
PICTURE = Image.fromarray((torch.arange(32 * 32 * 3).reshape(32, 32, 3) % 251).byte().numpy())
OTHER = Image.fromarray((torch.arange(32 * 32 * 3).reshape(32, 32, 3) % 83).byte().numpy())


def adapted(name, root):
    """A checkpoint with an adapter of four tokens, and a tiny CLIP that sees pictures."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(tiny.checkpoint(name, root)))
    pipe.set_progress_bar_config(disable=True)
    width, deep = pipe.unet.config.cross_attention_dim, 2
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=deep, num_attention_heads=2, image_size=32,
        patch_size=16, projection_dim=24,
    )  # fmt: skip
    with tiny.seeded():
        encoder = tiny.stirred(transformers.CLIPVisionModelWithProjection(vision)).eval()
        weights = {"proj.weight": torch.randn(4 * width, 24), "proj.bias": torch.zeros(4 * width),
                   "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}  # fmt: skip
        state = {"image_proj": weights, "ip_adapter": {}}
        cross = [n for n in pipe.unet.attn_processors if n.endswith("attn2.processor")]
        for key, processor in enumerate(cross):
            rows = pipe.unet.get_submodule(processor.removesuffix(".processor")).to_k.weight.shape[0]
            for part in ("to_k_ip", "to_v_ip"):
                state["ip_adapter"][f"{2 * key + 1}.{part}.weight"] = torch.randn(rows, width)
        pipe.unet._load_ip_adapter_weights([state])
    crop = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipe.register_modules(image_encoder=encoder, feature_extractor=crop)
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def kernel_of(pipe, **settings):
    return DiffusersKernel(pipe, **{"num_steps": T, "device": "cpu", "eta": 0.0, **SIZE} | settings)


@pytest.mark.parametrize(("name", "scale"), [("sd", 4.0), ("sd", 1.0), ("sdxl", 4.0)])
def test_a_picture_is_told_as_the_pipeline_tells_it(name, scale, tiny_root):
    pipe = adapted(name, tiny_root)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    kernel = kernel_of(pipe, ip_adapter_image=PICTURE, guidance_scale=scale)
    noise, cond = noises(kernel), cond_of(kernel, PROMPTS)
    drawn = kernel.decode(walk(kernel, noise, cond))
    call = {"num_inference_steps": T, "output_type": "pt", "guidance_scale": scale, **SIZE}
    for i, prompt in enumerate(PROMPTS):
        theirs = pipe(prompt=prompt, latents=noise[i : i + 1].clone(), ip_adapter_image=PICTURE, **call).images
        assert (drawn[i : i + 1] - theirs).abs().max() < 1e-4
    law = kernel.transition(noise, torch.tensor([1, T]), cond)
    alone = kernel.transition(noise[1:], torch.tensor([T]), cond_of(kernel, PROMPTS[1:]))
    assert (law.mean[1] - alone.mean[0]).abs().max() < 1e-5 * max(1.0, float(alone.mean.abs().max()))
    another = kernel_of(pipe, ip_adapter_image=OTHER, guidance_scale=scale)
    assert (
        another.transition(noise, torch.tensor([1, T]), cond_of(another, PROMPTS)).mean - law.mean
    ).abs().max() > 1e-3
    assert another.fingerprint != kernel.fingerprint


def test_a_search_is_told_a_picture(tiny_root):
    pipe = adapted("sd", tiny_root)
    kernel = kernel_of(pipe, ip_adapter_image=PICTURE, eta=1.0)
    bright = as_reward(lambda samples: samples.flatten(1).mean(1), "bright")
    found = ts.search(kernel, bright, ts.FeynmanKac(num_particles=2), prompts=PROMPTS, budget=ts.Budget(nfe=4 * T))
    assert [task.samples.shape for task in found.tasks] == 2 * [(2, 3, 16, 32)]
    assert kernel.memory_plan(2, prompts=PROMPTS).shared > 0
    before = kernel.fingerprint
    pipe.set_ip_adapter_scale(0.2)
    assert kernel.fingerprint != before


def test_a_perturbed_pipeline_is_told_one_by_its_call(tiny_root):
    base = adapted("sd", tiny_root)
    parts = {name: part for name, part in base.components.items() if name != "safety_checker"}
    pipe = diffusers.StableDiffusionPAGPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    one, two = (kernel_of(pipe, ip_adapter_image=picture) for picture in (PICTURE, OTHER))
    x, t = noises(one), torch.tensor([1, T])
    gap = one.transition(x, t, cond_of(one, PROMPTS)).mean - two.transition(x, t, cond_of(two, PROMPTS)).mean
    assert gap.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (lambda p: None, [PICTURE, OTHER], "2 pictures for 1 IP-Adapters: give ip_adapter_image one each, in a list"),
        (lambda p: p.register_modules(image_encoder=None), PICTURE, "has no image_encoder to see pictures with"),
        (lambda p: p.unload_ip_adapter(), PICTURE, "no IP-Adapter for an ip_adapter_image: pipe.load_ip_adapter"),
        (lambda p: None, None, "has an IP-Adapter, which needs a picture with every call: give it one"),
    ],
)
def test_what_does_not_go_together(change, given, message, tiny_root):
    pipe = adapted("sd", tiny_root)
    change(pipe)
    with pytest.raises(ValueError, match=message):
        kernel_of(pipe, ip_adapter_image=given)
