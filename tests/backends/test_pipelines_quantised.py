"""Networks of few bits: they load, search, tell themselves apart, and stay where their library keeps them."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import treesearch as ts
from tests.support import tiny
from treesearch.backends.pipelines import CheckpointError, DiffusersKernel
from treesearch.rewards.base import as_reward

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that are read here
SIZE = {"num_steps": 2, "device": "cpu", "height": 16, "width": 32}
NET = diffusers.QwenImageTransformer2DModel


@pytest.fixture(scope="module")
def place(tiny_root):
    return str(tiny.checkpoint("qwen_image", tiny_root))


def gguf(place, folder):
    """The transformer as a GGUF file, matrices of its blocks in 8 bits."""
    library = pytest.importorskip("gguf")
    eight = library.GGMLQuantizationType.Q8_0
    weights = load_file(next(Path(place, "transformer").glob("*.safetensors")))
    file = folder / "transformer.gguf"
    writer = library.GGUFWriter(file, "qwen_image")
    for name, weight in weights.items():
        small = weight.ndim == 2 and weight.shape[1] % 32 == 0 and ("attn" in name or "mlp" in name)
        array = library.quants.quantize(weight.numpy(), eight) if small else weight.numpy()
        writer.add_tensor(name, array, raw_dtype=eight if small else None)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    return NET.from_single_file(str(file), quantization_config=config, config=place, subfolder="transformer")


def torchao(place, folder):
    quantization = pytest.importorskip("torchao.quantization")
    config = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return NET.from_pretrained(place, subfolder="transformer", quantization_config=config, torch_dtype=torch.float32)


def step(kernel):
    cond = {k: getattr(v, "value", v) for k, v in kernel.encode(["a cat"]).items()} | {"task": torch.tensor([0])}
    x = torch.randn(1, *kernel.state_shape, generator=torch.Generator().manual_seed(3))
    return kernel.transition(x, torch.tensor([2]), cond).mean


@pytest.mark.parametrize("read", [gguf, torchao])
def test_a_network_of_few_bits_is_a_component(read, place, tmp_path):
    whole = DiffusersKernel.from_pretrained(place, **SIZE)
    kernel, again = (
        DiffusersKernel.from_pretrained(place, components={"transformer": read(place, tmp_path)}, **SIZE)
        for _ in range(2)
    )
    gap = (step(kernel) - step(whole)).norm() / step(whole).norm()
    assert 0 < gap < 0.02  # of 8 bits
    assert kernel.fingerprint == again.fingerprint != whole.fingerprint
    assert kernel.dtype == whole.dtype == torch.float32
    small, large = (k.memory_plan(1, prompts=["a cat"]).weights["transformer"] for k in (kernel, whole))
    assert small < 0.8 * large
    bright = as_reward(lambda samples: samples.flatten(1).mean(1), "bright")
    found = ts.search(kernel, bright, ts.BestOfN(), prompts=["a cat"], budget=ts.Budget(nfe=4))
    assert found.samples.shape == (2, 3, 16, 32)


def test_a_changed_weight_is_another_fingerprint(place, tmp_path):
    network = gguf(place, tmp_path)
    kernel = DiffusersKernel.from_pretrained(place, components={"transformer": network}, **SIZE)
    before = kernel.fingerprint
    weight = next(w for w in network.parameters() if w.dtype == torch.uint8)
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        weight.view(-1)[0] += 1
    assert kernel.fingerprint != before


def test_eight_bits_of_bitsandbytes_stay_where_they_are(place, monkeypatch):
    """Its library refuses to move them, even to where they are."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(place)
    pipe.transformer.is_loaded_in_8bit = True
    monkeypatch.setattr(type(pipe.transformer), "to", None)
    assert DiffusersKernel(pipe, **SIZE).state_shape == (32, 16)
    with pytest.raises(ValueError, match="the transformer is of 8 bits by bitsandbytes and stays on cpu: device='cpu'"):
        DiffusersKernel(pipe, **SIZE | {"device": "meta"})


def test_what_needs_a_gpu_says_so(place, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("No GPU found. A GPU is needed for quantization.")

    monkeypatch.setattr(NET, "from_pretrained", refuse)
    with pytest.raises(CheckpointError, match="its weights are quantised by a library that needs a GPU"):
        DiffusersKernel.from_pretrained(place, **SIZE)
