"""Encodings of a user's own and an ∅ for each prompt, beside the pipeline's own call on one prompt at a time."""

import pytest
import torch
from PIL import Image

from tests.backends import test_pipelines, test_pipelines_called
from tests.backends.test_pipelines import PROMPTS, cond_of, load, noises, pipeline, walk

pytestmark = test_pipelines_called.pytestmark
CALLED = {"pixart_sigma": test_pipelines_called.SETTINGS["pixart_sigma"]}
LONGER = {"sd": 154, "sdxl": 154, "flux": 600, "sd3": 200, "pixart_sigma": 40}
"""Tokens of encodings that the pipeline's tokenizer would cut, or of other lengths."""


def own(name, pipe, length):
    """Encodings of noise for the second prompt, by the names of the pipeline's `encode_prompt`."""
    draw = torch.Generator().manual_seed(7)
    width = {"sdxl": 48, "sd3": 64}.get(name, 32)
    given = {"prompt_embeds": torch.randn(1, length, width, generator=draw)}
    if name in ("sdxl", "flux", "sd3"):
        given["pooled_prompt_embeds"] = torch.randn(1, {"sdxl": 16, "sd3": 48}.get(name, 32), generator=draw)
    if name == "pixart_sigma":
        given["prompt_attention_mask"] = torch.ones(1, length, dtype=torch.int64)
    if name != "flux":
        given |= {f"negative_{key}": value.roll(1, 1) for key, value in given.items()}
    return given


def theirs(name, pipe, z, given, absent=None):
    settings = dict(CALLED.get(name, test_pipelines.SIZE.get(name, {})))
    call = settings.pop("network_inputs", {}) | settings | {"num_inference_steps": test_pipelines.T}
    images = []
    for prompt, x in zip(PROMPTS, z[0].clone(), strict=True):
        texts = given[prompt] | {"negative_prompt": None} if prompt in given else {"prompt": [prompt]}
        texts |= {} if absent is None else {"negative_prompt": [absent.get(prompt, "")]}
        images.append(pipe(**texts, latents=x[None], output_type="pt", **call)[0])
    return torch.cat(images)


@pytest.mark.parametrize("name", LONGER)
def test_encodings_stand_for_text(name, tiny_root):
    """Of lengths that no tokenizer gives, each with an ∅ of its own."""
    pipe = pipeline(name, tiny_root, ddim=name == "sd")
    given = {prompt: own(name, pipe, LONGER[name]) for prompt in PROMPTS}
    given[PROMPTS[0]] = {key: value.flip(-1) if value.is_floating_point() else value
                         for key, value in given[PROMPTS[0]].items()}  # fmt: skip
    kernel = load(name, tiny_root, eta=0.0, prompt_embeds=given, **CALLED.get(name, {}))
    z = noises(kernel.state_shape)
    images = kernel.decode(walk(kernel, z, cond_of(kernel, PROMPTS)))
    assert (images - theirs(name, pipe, z, given)).abs().max() < 1e-4
    assert kernel.fingerprint != load(name, tiny_root, eta=0.0, **CALLED.get(name, {})).fingerprint


def test_encodings_stand_for_text_under_a_mask(tiny_root):
    """A text's own encodings are the text, and another's are not, while what is kept of the picture stays."""
    draw = torch.Generator().manual_seed(1)
    image = Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=draw, dtype=torch.uint8).numpy())
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 4, 16, 12))
    given = {"eta": 0.0, "image": image, "mask": mask, "strength": 0.6}
    plain = load("sd", tiny_root, **given)
    names = ("prompt_embeds", "negative_prompt_embeds")
    texts = {
        prompt: dict(zip(names, plain.pipe.encode_prompt(prompt, "cpu", 1, True), strict=True)) for prompt in PROMPTS
    }
    same, other = (
        load("sd", tiny_root, prompt_embeds=each, **given)
        for each in (texts, {p: own("sd", None, 77) for p in PROMPTS})
    )
    x, t = noises(plain.state_shape)[0], torch.tensor([1, plain.num_steps])
    laws = [kernel.transition(x, t, cond_of(kernel, PROMPTS)) for kernel in (plain, same, other)]
    kept = plain._root.held.free[0] == 0
    torch.testing.assert_close(laws[1].mean, laws[0].mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(laws[2].mean[:, kept], laws[0].mean[:, kept], atol=1e-5, rtol=1e-5)
    assert (laws[2].mean - laws[0].mean)[:, ~kept].abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sd", "pixart_sigma"])
def test_prompts_have_an_absence_each(name, tiny_root):
    absent = {PROMPTS[0]: "", PROMPTS[1]: "blur"}
    kernel = load(name, tiny_root, eta=0.0, negative_prompt=absent, **CALLED.get(name, {}))
    z = noises(kernel.state_shape)
    images = kernel.decode(walk(kernel, z, cond_of(kernel, PROMPTS)))
    pipe = pipeline(name, tiny_root, ddim=name == "sd")
    assert (images - theirs(name, pipe, z, {}, absent)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        (
            "sd",
            {"prompt_embeds": {"a": {"embeds": torch.zeros(1)}}},
            ValueError,
            "has 'embeds', which Stable.*choose pr",
        ),
        ("sd", {"prompt_embeds": {"a": torch.zeros(1)}}, TypeError, "prompt_embeds of 'a' is .*, expected tensors by"),
        ("dit", {"prompt_embeds": {"a": {}}}, ValueError, "DiTPipeline takes no prompt_embeds: give it prompts"),
        ("sd", {"negative_prompt": {"a": 3}}, TypeError, "expected text, one for all prompts, or a mapping"),
        ("sd", {"negative_prompt": {"a": "b"}, "guidance_scale": 1}, ValueError, "has no effect"),
    ],
)
def test_bad_settings(name, settings, error, message, tiny_root):
    with pytest.raises(error, match=message):
        load(name, tiny_root, **settings)


def test_bad_encodings(tiny_root):
    given = {"a": own("sd", None, 154)}
    with pytest.raises(ValueError, match="prompt_embeds of the prompts differ in length: give all of them"):
        load("sd", tiny_root, prompt_embeds=given).encode(["a", "b"])
    given = {"a": {name: value[..., :16] for name, value in own("sd", None, 154).items()}}
    expected = r"prompt_embeds of 'a' makes prompt_embeds \(1, 154, 16\), expected \(1, tokens, 32\): encode it"
    with pytest.raises(ValueError, match=expected):
        load("sd", tiny_root, prompt_embeds=given).encode(["a"])
    given = {"a": own("flux", None, 15) | {"pooled_prompt_embeds": torch.zeros(1, 16)}}
    with pytest.raises(ValueError, match=r"makes pooled_embeds \(1, 16\), expected \(1, 32\)"):
        load("flux", tiny_root, prompt_embeds=given).encode(["a"])
    given = {"a": {"prompt_embeds": torch.zeros(1, 15, 32)}}
    with pytest.raises(ValueError, match="prompt_embeds of 'a' has nothing for pooled_embeds: give that too"):
        load("flux", tiny_root, prompt_embeds=given).encode(["a"])


def test_encodings_of_prompts_that_are_not_asked_for(tiny_root, recwarn):
    """Some prompts as text beside all that are encoded, and some of those encoded, are as meant."""
    kernel = load("sd", tiny_root, prompt_embeds={"a": own("sd", None, 77), "b": own("sd", None, 77)})
    for prompts in (["a"], ["a", "b", "as text"], [""]):
        kernel.encode(prompts)
    assert not [each for each in recwarn if "prompt_embeds" in str(each.message)]
    with pytest.warns(UserWarning, match="prompt 'c' is read as text: prompt_embeds are by prompt, and 'b', which has"):
        kernel.encode(["a", "c"])
