"""Pipelines as people load them: in shards, by parts from one file, with LoRA stacks, with encoders that are gone."""

import os
import subprocess
import sys
from contextlib import nullcontext

import accelerate
import diffusers
import pytest
import torch
from safetensors.torch import save_file

from tests.backends.test_pipelines import PROMPTS, cond_of, folder, load, noises
from tests.support import tiny
from treesearch.backends.pipelines import DiffusersKernel, loading

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def step(kernel):
    x = noises(kernel.state_shape)[0]
    return kernel.transition(x, torch.tensor([1, kernel.num_steps]), cond_of(kernel, PROMPTS)).mean


def test_shards_are_one_network(tiny_root, tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("sd", tiny_root))
    pipe.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    sharded, whole = DiffusersKernel.from_pretrained(str(tmp_path), num_steps=5, device="cpu"), load("sd", tiny_root)
    assert torch.equal(step(sharded), step(whole))
    assert sharded.fingerprint == whole.fingerprint


def test_a_network_of_one_file_is_a_component(tiny_root, tmp_path):
    """What `from_single_file` reads, beside the rest of a checkpoint."""
    place = folder("qwen_image", tiny_root)
    whole = diffusers.DiffusionPipeline.from_pretrained(place)
    weights = {name: 1.1 * weight for name, weight in whole.transformer.state_dict().items()}
    save_file(weights, tmp_path / "tuned.safetensors")
    tuned = diffusers.QwenImageTransformer2DModel.from_single_file(
        str(tmp_path / "tuned.safetensors"), config=place, subfolder="transformer"
    )
    size = {"num_steps": 3, "device": "cpu", "height": 16, "width": 16}
    kernel = DiffusersKernel.from_pretrained(place, components={"transformer": tuned}, **size)
    whole.transformer.load_state_dict(weights)
    assert torch.equal(step(kernel), step(DiffusersKernel(whole, **size)))


def test_loras_in_a_stack_add_up(tiny_root, tmp_path):
    """Twice the same one, with half and a quarter of its weight, is one with three quarters."""
    one, two = (str(tiny.lora(tmp_path / name)) for name in "ab")
    stack = load("sd", tiny_root, lora={one: 0.5, two: 0.25})
    single, whole = load("sd", tiny_root, lora={one: 0.75}), load("sd", tiny_root, lora=one)
    torch.testing.assert_close(step(stack), step(single), atol=1e-4, rtol=1e-4)
    assert (step(stack) - step(whole)).abs().max() > 1e-2
    assert len({kernel.fingerprint for kernel in (stack, single, whole)}) == 3


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        ({}, ValueError, "lora is empty, expected places"),
        ({"a": "b"}, TypeError, "lora 'a' is .*expected a number, its w"),
    ],
)
def test_bad_stacks(lora, error, message, tiny_root):
    with pytest.raises(error, match=message):
        load("sd", tiny_root, lora=lora)


def test_what_is_asked_amiss_is_said_before_anything_is_loaded(tiny_root, monkeypatch):
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", None)
    with pytest.raises(OSError, match=r"^lora: cannot load 'no/where/at': there is no such folder"):
        load("sd", tiny_root, lora="no/where/at")
    with pytest.raises(OSError, match=r"^lora: cannot load 'no/where'"):
        load("sd", tiny_root, lora={"no/where": 0.5})
    with pytest.raises(
        TypeError, match=r"no setting 'guidance_sale': did you mean guidance_scale\? It takes .*clip_skip"
    ):
        load("sd", tiny_root, guidance_sale=3.0)


def test_the_command_line_answers_without_the_noise_of_libraries(tiny_root):
    """Bars, and warnings of what is not installed, go before an answer unless the environment asks for them."""
    spec = f"diffusers('{folder('qwen_image', tiny_root)}', num_steps=2, height=16, width=16)"
    command = [sys.executable, "-m", "treesearch", "run", "best-of-n", "--kernel", spec, "--prompts", "a", "--nfe", "2"]
    command += ["--reward", "compressibility()", "--dry-run"]
    asked = {name: value for name, value in os.environ.items() if "VERBOSITY" not in name and name != "TQDM_DISABLE"}
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, env=asked)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.split()[:2] == ["nfe", "2"]


def test_encoders_that_are_gone_are_asked_for_nothing_else(tiny_root):
    """Two kernels of one pipeline, of which one let them go; a third is not made of what is left."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("sd", tiny_root))
    made = {"num_steps": 2, "device": "cpu", "text_encoders": "free"}
    one, two = DiffusersKernel(pipe, **made), DiffusersKernel(pipe, **made)
    rooted = one.from_noise(torch.zeros(one.state_shape))
    one.encode(PROMPTS)
    assert one.encode(PROMPTS)
    for kernel in (one, two, rooted):
        with pytest.raises(
            ValueError, match="text_encoder was freed after the first prompts: use text_encoders='offload'"
        ):
            kernel.encode(["another"])
    with pytest.raises(OSError, match="StableDiffusionPipeline has no text_encoder: load it with all of"):
        DiffusersKernel(pipe, **made)


def test_networks_that_are_moved_by_others(tiny_root):
    """Under diffusers' group offload they go where that puts them; those of accelerate are refused by name."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("sd", tiny_root))
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    offloaded = DiffusersKernel(pipe, num_steps=5, device="cpu")
    assert torch.equal(step(offloaded), step(load("sd", tiny_root)))
    other = diffusers.DiffusionPipeline.from_pretrained(folder("sd", tiny_root))
    accelerate.cpu_offload_with_hook(other.text_encoder, "cpu")
    with pytest.raises(ValueError, match=r"the text_encoder is moved .* by accelerate .*: pipe\.remove_all_hooks\(\)"):
        DiffusersKernel(other, num_steps=5, device="cpu")
    other.remove_all_hooks()
    assert torch.equal(step(DiffusersKernel(other, num_steps=5, device="cpu")), step(offloaded))


@pytest.mark.parametrize(("version", "old"), [("0.41.3", True), ("0.42.0", False), ("1.0.dev0", False)])
def test_an_older_diffusers_is_named(version, old, monkeypatch):
    monkeypatch.setattr("diffusers.__version__", version)
    with pytest.raises(ImportError, match=r">= 0\.42, installed is 0\.41\.3") if old else nullcontext():
        loading._loader(controlled=False)
