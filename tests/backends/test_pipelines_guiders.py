"""A user's guider in the blocks' loop, beside diffusers' own modular pipeline with the same guider."""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline, guiders
from diffusers.hooks import LayerSkipConfig

from tests.backends.test_pipelines_modular import PROMPTS, SIZE, cond_of, noises, walk
from tests.support import tiny
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.pipelines.blocks import _own_processors
from treesearch.backends.pipelines.kinds import KINDS, modular_form

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
T = 5
SHORT = {"z_image": {"max_sequence_length": 64}}
GUIDERS = {
    "window": ("qwen_image", lambda: guiders.ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.7), 2),
    "apg": ("z_image", lambda: guiders.AdaptiveProjectedGuidance(
        guidance_scale=3.0, eta=0.0, adaptive_projected_guidance_rescale=0.5), 2),
    "tangential": ("z_image", lambda: guiders.TangentialClassifierFreeGuidance(guidance_scale=3.0), 2),
    "zero star": ("z_image", lambda: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=2), 2),
    "pag": ("qwen_image", lambda: guiders.PerturbedAttentionGuidance(
        guidance_scale=3.0, perturbed_guidance_layers=[0], perturbed_guidance_stop=0.5), 3),
    "seg": ("z_image", lambda: guiders.SmoothedEnergyGuidance(
        guidance_scale=3.0, seg_guidance_layers=[0], seg_guidance_stop=0.5), 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tiny_root):
    def of(name):
        if name not in kept:
            kept[name] = DiffusionPipeline.from_pretrained(str(tiny.checkpoint(name, tiny_root)))
        return kept[name]

    kept = {}
    return of


def wrap(pipe, name, **settings):
    return DiffusersKernel(pipe, **{"num_steps": T, "device": "cpu"} | SIZE | SHORT.get(name, {}) | settings)


def their_own(pipe, guider):
    """Diffusers' modular pipeline of a pipeline, with a guider."""
    form, blocks = modular_form(KINDS[type(pipe).__name__], pipe.config)
    found = form(blocks=blocks.get_execution_blocks(prompt=True))
    parts = {name: part for name, part in pipe.components.items() if name in found.component_names}
    parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)
    found.update_components(**parts, guider=guider, **_own_processors(pipe, found))
    found.set_progress_bar_config(disable=True)
    return found


def hooks(network):
    found = (getattr(part, "_diffusers_hook", None) for part in network.modules())
    return [name for each in found if each is not None for name in each.hooks]


@pytest.mark.parametrize("which", GUIDERS)
def test_a_guider_is_diffusers_own(which, pipeline):
    """The whole loop of T steps, windows by step among it; rows at several steps are as each alone."""
    name, make, rows = GUIDERS[which]
    pipe, guider = pipeline(name), make()
    before = dict(vars(guider))
    kernel = wrap(pipe, name, eta=0.0, guider=guider)
    assert kernel.rows_per_nfe == rows
    noise, cond = noises(kernel), cond_of(kernel, PROMPTS)
    drawn = kernel.decode(walk(kernel, noise, cond))
    call = {"num_inference_steps": T, "output_type": "pt", **SIZE, **SHORT.get(name, {})}
    theirs = their_own(pipe, make())(
        prompt=list(PROMPTS), negative_prompt=["", ""], latents=noise, output="images", **call
    )
    assert (drawn - theirs).abs().max() < 1e-4
    plain = wrap(pipe, name, eta=0.0, guidance_scale=3.0)
    if which != "seg":  # whose blurred queries are nearly what they were, of networks as small as these
        assert (walk(plain, noise, cond_of(plain, PROMPTS)) - walk(kernel, noise, cond)).abs().max() > 1e-3
    together = kernel.transition(noise.repeat(2, 1, *[1] * (noise.ndim - 2)), torch.tensor([5, 4, 3, 1]),
                                 {k: v if k.startswith("negative_") else v.repeat(2, *[1] * (v.ndim - 1))
                                  for k, v in cond.items()}).mean  # fmt: skip
    for row, t in enumerate((5, 4, 3, 1)):
        alone = kernel.transition(noise[row % 2 :][:1], torch.tensor([t]), cond_of(kernel, [PROMPTS[row % 2]])).mean
        assert (together[row] - alone[0]).abs().max() < 1e-5 * max(1.0, float(alone.abs().max()))
    assert dict(vars(guider)) == before
    assert hooks(pipe.transformer) == []


def test_hooks_are_off_after_an_exception(pipeline, monkeypatch):
    pipe = pipeline("qwen_image")
    kernel = wrap(pipe, "qwen_image", guider=GUIDERS["pag"][1]())
    cond, x = cond_of(kernel, PROMPTS), noises(kernel)
    first = kernel.transition(x, torch.tensor([T - 1, T - 1]), cond).mean
    forward, calls = type(pipe.transformer).forward, []

    @functools.wraps(forward)  # blocks read the signature
    def failing(self, *args, **kwargs):
        calls.append(hooks(self))
        if len(calls) == 3:
            raise MemoryError("none left")
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.transformer, "forward", failing.__get__(pipe.transformer))
        with pytest.raises(MemoryError):
            kernel.transition(x, torch.tensor([T - 1, T - 1]), cond)
    assert [bool(each) for each in calls] == [False, False, True]
    assert hooks(pipe.transformer) == []
    assert torch.equal(kernel.transition(x, torch.tensor([T - 1, T - 1]), cond).mean, first)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"guider": 7.5}, TypeError, "guider is float, expected one of diffusers.guiders"),
        ({"guider": guiders.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5)}, ValueError,
         r"adaptive_projected_guidance_momentum=-0\.5, a memory .*: set adaptive_projected_guidance_momentum=None"),
        ({"guider": guiders.ClassifierFreeGuidance(), "guidance_scale": 3.0}, ValueError, "leave guidance_scale"),
        ({"guider": guiders.SkipLayerGuidance(skip_layer_config=LayerSkipConfig([0], skip_ff=False))}, ValueError,
         "SkipLayerGuidance does not go with QwenImageTransformer2DModel in diffusers: "),
    ],
)  # fmt: skip
def test_bad_guiders(settings, error, message, pipeline):
    with pytest.raises(error, match=message):
        wrap(pipeline("qwen_image"), "qwen_image", num_steps=100 if "Skip" in message else T, **settings)
    assert hooks(pipeline("qwen_image").transformer) == []


def test_families_by_hand_take_no_guider(tiny_root):
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline takes no guider"):
        DiffusersKernel.from_pretrained(
            str(tiny.checkpoint("sdxl", tiny_root)), num_steps=2, guider=guiders.ClassifierFreeGuidance()
        )
