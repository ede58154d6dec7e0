"""A run knows the pipeline that it is of: every component that decides samples, or what rewards see of them."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import treesearch as ts
from tests.support import tiny, tiny_called, tiny_kinds  # noqa: F401  the builders
from treesearch.backends.base import fingerprint
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.rewards.base import as_reward

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SMALL = {"height": 32, "width": 32}
SETTINGS = {
    "sd": {},
    "sd_controlnet": {"control_image": torch.zeros(1, 3, 16, 16)},
    "flux": {},
    "qwen_image": SMALL,
    "hunyuan_video_15": SMALL | {"num_frames": 5},
    "sd3_controlnet": SMALL | {"control_image": Image.new("RGB", (32, 32), (200, 90, 30))},
}
READ = {
    "sd": {"unet", "vae", "text_encoder", "tokenizer"},
    "sd_controlnet": {"unet", "vae", "text_encoder", "tokenizer", "controlnet"},
    "flux": {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"},
    "qwen_image": {"transformer", "vae", "text_encoder", "tokenizer"},
    "hunyuan_video_15": {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "guider"},
    "sd3_controlnet": {"transformer", "vae", "controlnet", *(f"{part}{n}" for part in ("text_encoder", "tokenizer")
                                                              for n in ("", "_2", "_3"))},
}  # fmt: skip


def wrap(name, root, **settings):
    pipe = DiffusionPipeline.from_pretrained(str(tiny.checkpoint(name, root)))
    return DiffusersKernel(pipe, num_steps=2, device="cpu", **SETTINGS[name] | settings)


def changed(part):
    """Another one of a component."""
    other = copy.deepcopy(part)
    if isinstance(part, torch.nn.Module):
        weights = [weight for weight in other.parameters() if weight.is_floating_point()]
        weights[-1].data[..., -1] += 1e-3
    elif hasattr(part, "add_tokens"):
        other.add_tokens(["zzz"])
    else:
        other.guidance_scale = 2.0
    return other


@pytest.mark.parametrize("name", SETTINGS)
def test_every_component_counts(name, tiny_root):
    kernel = wrap(name, tiny_root)
    own = kernel.fingerprint
    kernel.encode(["a red cube"])
    assert own is not None
    assert kernel.fingerprint == own  # and none remembers what it was asked
    found = {part: value for part, value in kernel.pipe.components.items() if value is not None and part in READ[name]}
    assert set(found) == READ[name]
    for part, value in found.items():
        setattr(kernel.pipe, part, changed(value))
        assert kernel.fingerprint not in (own, None), part
        setattr(kernel.pipe, part, value)
    assert kernel.fingerprint == own


def test_text_encoders_that_are_gone_still_count(tiny_root):
    kernel, other = (wrap("sd", tiny_root, text_encoders="free") for _ in range(2))
    own = kernel.fingerprint
    other.pipe.text_encoder = changed(other.pipe.text_encoder)
    for each in (kernel, other):
        each.encode(["a red cube"])
        assert each.pipe.text_encoder is None
    assert kernel.fingerprint == own
    assert other.fingerprint not in (own, None)


def test_tokenizers_are_told_apart_by_content():
    one, same = tiny.clip_tokenizer(), tiny.clip_tokenizer()
    one(["a text"], truncation=True, max_length=3, padding="max_length")
    assert fingerprint.of(one) == fingerprint.of(same)
    assert fingerprint.of(one) != fingerprint.of(tiny.clip_tokenizer(pad_token="a"))
    qwen = tiny.qwen_tokenizer()
    before = fingerprint.of(qwen)
    qwen.chat_template += " "
    assert fingerprint.of(qwen) != before


@pytest.mark.parametrize("part", ["text_encoder", "vae", "lora"])
def test_a_run_is_not_resumed_with_other_weights_beside_the_network(part, tiny_root, tmp_path):
    lora = {"lora": str(tiny.lora(tmp_path / "lora"))} if part == "lora" else {}
    folder, reward = str(tiny.checkpoint("sd", tiny_root)), as_reward(mean)
    options = {"num_steps": 2, "device": "cpu"} | lora
    kernel = DiffusersKernel.from_pretrained(folder, **options)
    ts.search(kernel, reward, ts.BestOfN(n=2), prompts=["a red cube"], store=tmp_path / "run")
    other = DiffusersKernel.from_pretrained(folder, **options)
    if part == "lora":
        other.pipe.set_adapters(other.pipe.get_active_adapters(), 0.5)
    else:
        setattr(other.pipe, part, changed(getattr(other.pipe, part)))
    with pytest.raises(ts.StoreError, match="fingerprint"):
        ts.resume(tmp_path / "run", other, reward)
    same = DiffusersKernel.from_pretrained(folder, **options)
    assert len(ts.resume(tmp_path / "run", same, reward).samples) == 2


def mean(images):
    return images.mean((1, 2, 3))
