"""Repositories that hold a modular pipeline's index alone, by name: parts that are here, elsewhere, or nowhere."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny
from treesearch.backends.pipelines import CheckpointError, DiffusersKernel
from treesearch.backends.pipelines.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SIZE = {"num_steps": 2, "device": "cpu", "height": 16, "width": 32}
INDEX = "modular_model_index.json"


def saved(name, kind, root, folder):
    """A modular pipeline of the parts of a checkpoint, written by its own `save_pretrained`."""
    whole = diffusers.DiffusionPipeline.from_pretrained(str(tiny.checkpoint(name, root)))
    found = getattr(diffusers, kind)()
    parts = {name: part for name, part in whole.components.items() if name in found.component_names}
    found.update_components(**parts)
    found.save_pretrained(str(folder), overwrite_modular_index=True)
    return found


@pytest.fixture(scope="module")
def made(tiny_root, tmp_path_factory):
    """A pipeline and its folder, which has another name than it was saved under."""
    place = tmp_path_factory.mktemp("modular")
    pipe = saved("qwen_image", "QwenImageModularPipeline", tiny_root, place / "first")
    return pipe, (place / "first").rename(place / "moved")


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "copy")


def index_of(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def step(kernel):
    cond = {k: getattr(v, "value", v) for k, v in kernel.encode(["a cat"]).items()} | {"task": torch.tensor([0])}
    x = torch.randn(1, *kernel.state_shape, generator=torch.Generator().manual_seed(3))
    return kernel.transition(x, torch.tensor([2]), cond).mean


def test_a_folder_of_a_modular_pipeline_is_that_pipeline(made, copy):
    """Wherever it is now."""
    pipe, folder = made
    kernel, own = DiffusersKernel.from_pretrained(str(folder), **SIZE), DiffusersKernel(pipe, **SIZE)
    assert type(kernel.pipe) is type(pipe)
    assert torch.equal(step(kernel), step(own))
    assert kernel.fingerprint == DiffusersKernel.from_pretrained(copy, **SIZE).fingerprint


def test_a_part_is_where_the_index_says(copy, tmp_path):
    """A folder of another repository, or a repository of its own."""
    (tmp_path / "other").mkdir()
    for name, inside in (("transformer", "other/transformer"), ("vae", "vae")):
        (copy / name).rename(tmp_path / inside)
    before = json.loads((copy / INDEX).read_text())["transformer"][2]["pretrained_model_name_or_path"]

    def change(index):
        index["transformer"][2]["pretrained_model_name_or_path"] = str(tmp_path / "other")
        index["vae"] = [None, None, index["vae"][2] | {"repo": str(tmp_path / "vae"), "subfolder": ""}]
        del index["vae"][2]["pretrained_model_name_or_path"]  # as it was called before

    index_of(copy, change)
    assert not Path(before).exists()
    assert DiffusersKernel.from_pretrained(copy, **SIZE).state_shape == (32, 16)


def test_shards_at_the_top_of_a_repository(copy, tmp_path):
    """Of a part that is a repository of its own."""
    vae = (copy / "vae").rename(tmp_path / "vae")
    weights = load_file(file := next(vae.glob("*.safetensors")))
    file.unlink()
    names = {key: f"{file.stem}-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(weights))}
    for shard in set(names.values()):
        save_file({key: weights[key] for key, at in names.items() if at == shard}, vae / shard)
    (vae / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    index_of(copy, lambda i: i["vae"][2].update(pretrained_model_name_or_path=str(vae), subfolder=""))
    assert DiffusersKernel.from_pretrained(copy, **SIZE).state_shape == (32, 16)
    next(vae.glob("*-of-00002.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards of its network are missing, such as diffusion_pytorch"):
        DiffusersKernel.from_pretrained(copy, **SIZE)


@pytest.mark.parametrize(
    ("folder", "file", "kind"),
    [("text_encoder", "config.json", "AutoModel"), ("tokenizer", "tokenizer_config.json", "AutoTokenizer")],
)
def test_code_beside_a_part_is_not_run_whatever_is_answered(folder, file, kind, copy, monkeypatch, tmp_path):
    said = json.loads((copy / folder / file).read_text())
    said |= {"auto_map": {"AutoConfig": "own.Own", kind: ["own.Own", None] if "Token" in kind else "own.Own"}}
    (copy / folder / file).write_text(json.dumps(said | {"model_type": "own", "tokenizer_class": "Own"}))
    (copy / folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    index_of(copy, lambda i: i[folder][2].update(type_hint=["transformers", kind]))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError, match="it is code of its own, which is not run"):
        DiffusersKernel.from_pretrained(copy, **SIZE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "kind", "whole"),
    [
        ("sdxl", "StableDiffusionXLModularPipeline", "StableDiffusionXLPipeline"),
        ("wan", "WanModularPipeline", "WanPipeline"),
    ],
)
def test_a_family_of_the_whole_pipeline_has_its_parts(name, kind, whole, tiny_root, tmp_path):
    """Those that the index leaves out are none."""
    saved(name, kind, tiny_root, tmp_path)
    index_of(tmp_path, lambda index: index.update(transformer_2=[None, None, {"type_hint": [None, None]}]))
    size = SIZE | ({"height": 32, "num_frames": 5} if name == "wan" else {})
    kernels = [DiffusersKernel.from_pretrained(p, **size) for p in (tmp_path, tiny.checkpoint(name, tiny_root))]
    assert [type(kernel.pipe).__name__ for kernel in kernels] == [whole, whole]
    assert torch.equal(*map(step, kernels))


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda f: (f / "modular_config.json").touch(), {}, CheckpointError, "its blocks are code of its own"),
        (lambda f: shutil.rmtree(f / "vae"), {}, CheckpointError, "its vae is in '.*first', .* not there: bring it"),
        (lambda f: shutil.rmtree(f / "tokenizer"), {}, CheckpointError, "its tokenizer is in '.*first'"),
        (lambda f: next((f / "vae").glob("*.saf*")).unlink(), {}, CheckpointError, "the weights of its vae are miss"),
        (lambda f: index_of(f, lambda i: i["vae"][2].update(type_hint=["mine", "Net"])), {}, CheckpointError,
         r"its vae is code of its own \(mine\.Net\)"),
        *((lambda f, at=at: index_of(f, lambda i: i["vae"][2].update(pretrained_model_name_or_path=at, subfolder="")),
           {}, CheckpointError, "QwenImageModularPipeline has no vae") for at in (None, 5)),
        (lambda f: index_of(f, lambda i: i.update(guider=[None, None, i["vae"][2] | {"type_hint": None}])), {},
         CheckpointError, "its index does not say what its guider is: load it and bring it"),
        (lambda f: index_of(f, lambda i: i.update(_class_name="EchoModularPipeline")), {}, ValueError,
         "^EchoModularPipeline cannot be searched"),
        (lambda f: None, {"components": {"unet": None}}, ValueError, "has no component 'unet': choose"),
        (lambda f: None, {"variant": "fp16"}, CheckpointError, "it has no weights of variant"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused_before_any_weight(change, options, error, message, copy, monkeypatch):
    change(copy)
    monkeypatch.setattr(diffusers.QwenImageTransformer2DModel, "from_pretrained", None)
    with pytest.raises(error, match=message):
        DiffusersKernel.from_pretrained(copy, **SIZE, **options)


def test_parts_on_the_hub_are_fetched_alone(copy, monkeypatch):
    """An index that names another repository for its transformer, whose files are asked for and no others."""
    index_of(copy, lambda i: i["transformer"][2].update(pretrained_model_name_or_path="owner/net", subfolder="deep"))
    weights = [f"deep/diffusion_pytorch_model.{end}" for end in ("safetensors", "fp16.safetensors", "msgpack", "bin")]
    names = ["deep/config.json", *weights, "deep/model.onnx", "vae/config.json"]
    info = type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in names]})
    asked = []

    def fetched(name, revision, allow_patterns):
        asked.append((name, revision, sorted(allow_patterns)))
        (copy / "transformer").rename(copy / "net" / "deep")
        return copy / "net"

    (copy / "net").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, *args, **kwargs: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert DiffusersKernel.from_pretrained(copy, **SIZE).rows_per_nfe == 2
    assert asked == [("owner/net", None, names[:2])]


def test_a_tokenizer_at_the_top_of_a_model_is_fetched_without_the_model():
    names = ["tokenizer.json", "vocab.txt", "chat_template.jinja", "model.safetensors", "tf_model.h5", "onnx/a.json"]
    found = Checkpoint("owner/model", frozenset(names), None)
    assert found.read("", None, weights=False) == ["chat_template.jinja", "tokenizer.json", "vocab.txt"]
