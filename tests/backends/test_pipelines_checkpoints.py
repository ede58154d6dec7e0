"""What is no pipeline is told from its files, in a sentence of its own, before any weight is read or the hub asked."""

from __future__ import annotations

import json
import logging
import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import tiny
from treesearch.backends.pipelines import CheckpointError, DiffusersKernel
from treesearch.backends.pipelines.checkpoint import Checkpoint, find

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_root):
    return tiny.checkpoint("sd", tiny_root)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "sd")


def read(file):
    """Weights in memory of their own, so that the file can be written again."""
    return {name: weight.clone() for name, weight in load_file(file).items()}


def refused(place, message, error=CheckpointError, **options):
    with pytest.raises(error, match=message):
        DiffusersKernel.from_pretrained(place, num_steps=2, device="cpu", **options)


def index_of(folder, **changes):
    (folder / "model_index.json").write_text(
        json.dumps(json.loads((folder / "model_index.json").read_text()) | changes)
    )


def only(folder, *names):
    for each in folder.iterdir():
        if each.name not in names:
            shutil.rmtree(each) if each.is_dir() else each.unlink()


def emptied(folder):
    only(folder)


def nested(folder):
    inside = folder / "snapshot"
    shutil.copytree(folder, inside, ignore=shutil.ignore_patterns("snapshot"))
    only(folder, "snapshot")


def of_transformers(folder):
    only(folder, "text_encoder")
    for each in (folder / "text_encoder").iterdir():
        shutil.move(each, folder)
    (folder / "text_encoder").rmdir()


def one_file(folder):
    shutil.copy(folder / UNET, folder / "dreamy.safetensors")
    only(folder, "dreamy.safetensors")


def a_lora(folder):
    only(folder)
    save_file({"unet.down.lora_A.weight": torch.zeros(2, 2)}, folder / "style.safetensors")


def gguf(folder):
    only(folder)
    (folder / "flux-q4.gguf").touch()


def pickles(folder):
    only(folder)
    (folder / "model.ckpt").touch()


def notes(folder):
    only(folder)
    (folder / "README.md").touch()


def pickled_unet(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")


def gguf_unet(folder):
    (folder / UNET).rename(folder / "unet/unet.gguf")


def half_precision(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")


def missing_shard(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}
    shards |= {"b": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": shards}))


def pointer(folder):
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


LAYOUTS = {
    "empty": (emptied, "the folder is empty"),
    "nested": (nested, "one level down: name '.*sd/snapshot'"),
    "a model of transformers": (of_transformers, r"a model of transformers \(CLIPTextModel\)"),
    "one file": (one_file, r"dreamy\.safetensors is a checkpoint in one file: .*from_single_file"),
    "a LoRA": (a_lora, r"this is a LoRA, not a pipeline: .* lora="),
    "GGUF": (gguf, r"flux-q4\.gguf is a GGUF file.*components="),
    "pickles": (pickles, "it holds pickles alone, .*: convert it"),
    "nothing of a pipeline": (notes, r"nothing of a pipeline, but README\.md"),
    "no index": (
        lambda f: (f / "model_index.json").unlink(),
        r"model_index\.json is missing, though scheduler, .*unet",
    ),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), r"its model_index\.json is not JSON"),
    "index of nothing": (lambda f: (f / "model_index.json").write_text("[]"), "is list, expected named values"),
    "index without a class": (lambda f: index_of(f, _class_name=None), "names no _class_name"),
    "a pipeline's own code": (lambda f: index_of(f, _class_name=["mine", "Mine"]), r"code of its own \(mine\.py\)"),
    "a component's own code": (
        lambda f: (index_of(f, unet=["mine", "Net"]), (f / "unet/mine.py").touch()),
        r"its unet is code of its own \(mine\.Net\)",
    ),
    "an unknown component": (
        lambda f: index_of(f, unet=["diffusers", "NoNet"]),
        "not installed here: update diffusers",
    ),
    "no U-Net": (lambda f: shutil.rmtree(f / "unet"), "its folder unet is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "its folder tokenizer is missing"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), r"unet/config\.json is missing"),
    "no weights": (lambda f: (f / UNET).unlink(), r"the weights of its unet are missing \(unet/\*\.safetensors\)"),
    "pickled weights": (pickled_unet, "the weights of its unet are a pickle, .* convert it to safetensors"),
    "GGUF weights": (gguf_unet, r"is a GGUF file, .*components="),
    "another variant": (half_precision, "its unet are of another variant: say variant='fp16'"),
    "a missing shard": (missing_shard, r"1 of 2 shards of its unet are missing, such as unet/.*-00002-of-00002"),
    "a pointer": (pointer, "is a pointer of git-lfs instead of the weights: run `git lfs pull`"),
    "cut": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-9]), r"unet/.* is cut or broken"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_has_its_own_sentence(name, copy, monkeypatch):
    """Also before any weight is read."""
    change, message = LAYOUTS[name]
    change(copy)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", None)
    refused(str(copy), message)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("unet", r"one component \(UNet2DConditionModel\), not a pipeline: name the folder above it, '.*sd'"),
        ("model_index.json", "it is a file: name its folder, '.*sd'"),
        (UNET, "is a checkpoint in one file: .*from_single_file"),
        ("../sdd", r"there is no such folder: did you mean '.*sd'\?"),
        ("nowhere/at/all", "there is no such folder in '.*sd'"),
    ],
)
def test_each_place_has_its_own_sentence(place, message, copy):
    refused(copy / place, message)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("level", [logging.NOTSET, logging.CRITICAL])
def test_no_weight_is_made_up(part, level, copy):
    """Whatever the logs say."""
    file = next((copy / part).glob("*.safetensors"))
    weights = read(file)
    lost = sorted(weights)[-1]
    weights.pop(lost)
    save_file(weights, file, metadata={"format": "pt"})
    logging.disable(level)
    try:
        refused(str(copy), f"its {part}: it lacks 1 weights, such as {lost}, which would be made up")
    finally:
        logging.disable(logging.NOTSET)


def test_tied_weights_are_not_missing(tiny_root):
    """T5 keeps its table of words once, and it is two of its weights."""
    kernel = DiffusersKernel.from_pretrained(tiny.checkpoint("flux", tiny_root), num_steps=2, height=16, width=16)
    encoder = kernel.pipe.text_encoder_2
    assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()


def test_variants_are_read_where_they_are(copy):
    half_precision(copy)
    kernel = DiffusersKernel.from_pretrained(str(copy), num_steps=2, device="cpu", variant="fp16")
    assert kernel.encode(["a"])["prompt_embeds"].shape == (1, 77, 32)
    refused(str(copy), "no weights of variant 'int8'|say variant='fp16'", variant="int8")


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"_class_name": "GlmImagePipeline"}, {}, ValueError, "^GlmImagePipeline cannot be searched: another m"),
        ({"_class_name": "MyPipeline"}, {}, ValueError, "^MyPipeline cannot be searched: no family and"),
        ({"scheduler": ["diffusers", "EDMEulerScheduler"]}, {}, ValueError, "cannot read a schedule from EDMEuler"),
        ({"text_encoder": [None, None]}, {}, CheckpointError, "StableDiffusionPipeline has no text_encoder"),
        ({}, {"components": {"vae": None}}, CheckpointError, "StableDiffusionPipeline has no vae"),
        ({}, {"num_frames": 5}, ValueError, "StableDiffusionPipeline takes no num_frames"),
        ({}, {"control_image": torch.zeros(1, 3, 8, 8)}, ValueError, "has no ControlNet for a control_image"),
        ({"_class_name": "DDPMPipeline"}, {"guidance_scale": 3.0}, ValueError, "nothing to guide by"),
        ({}, {"guidance_scale": -1}, ValueError, "guidance_scale is -1"),
        ({}, {"eta": 2}, ValueError, "eta is 2"),
    ],
)
def test_what_the_index_says_is_refused_before_any_weight(changes, options, error, message, copy, monkeypatch):
    index_of(copy, **changes)
    (copy / UNET).unlink()  # whoever looks for weights says so
    refused(str(copy), message, error, **options)


class Asked(RuntimeError):
    pass


@pytest.mark.parametrize("option", ["checkpoint", "lora", "preview"])
@pytest.mark.parametrize(
    ("place", "requests", "message"),
    [
        ("./models/sd15", 0, "there is no such folder"),
        ("models/sd/15", 0, "there is no such folder"),
        ("/models/sd15", 0, "there is no such folder"),
        ("models/sd15.safetensors", 0, "there is no such folder"),
        ("models/sd15", 1, "there is no such folder .*, and the hub gave nothing: check the name and the connection"),
    ],
)
def test_a_mistyped_folder_asks_the_hub_once_at_most(option, place, requests, message, whole, monkeypatch):
    asked = []

    def ask(self, *args, **kwargs):
        asked.append(args)
        raise Asked("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.get_session", lambda: type("Session", (), {"get": ask})())
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda *a, **k: pytest.fail("another"))
    options = {} if option == "checkpoint" else {option: place}
    refused(place if option == "checkpoint" else str(whole), message, **options)
    assert len(asked) == requests


@pytest.mark.parametrize("option", ["checkpoint", "lora", "preview"])
def test_offline_says_so(option, whole):
    options = {} if option == "checkpoint" else {option: "models/sd15"}
    refused("models/sd15" if option == "checkpoint" else str(whole), "HF_HUB_OFFLINE forbids to ask", **options)


def test_files_on_the_hub_are_looked_at_before_they_are_fetched(monkeypatch):
    siblings = [type("File", (), {"rfilename": name}) for name in ("unet/config.json", "vae/config.json")]
    info = type("Info", (), {"siblings": siblings})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, *args, **kwargs: info)
    refused("owner/name", r"model_index\.json is missing, though unet, vae are there")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return tiny.lora(tmp_path_factory.mktemp("lora"))


def two_files(folder):
    shutil.copy(folder / "pytorch_lora_weights.safetensors", folder / "a.safetensors")
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "b.safetensors")


def half_a_lora(folder):
    file = folder / "pytorch_lora_weights.safetensors"
    weights = read(file)
    weights.pop(next(key for key in sorted(weights) if "lora_A" in key or "lora.down" in key))
    save_file(weights, file)


def pickled(ending):
    def change(folder):
        file = folder / "pytorch_lora_weights.safetensors"
        torch.save(read(file), folder / f"pytorch_lora_weights{ending}")
        file.unlink()

    return change


def disguised(folder):
    file = folder / "pytorch_lora_weights.safetensors"
    torch.save(read(file), file)


@pytest.mark.parametrize(
    ("change", "file", "message"),
    [
        *((pickled(e), "", "its weights are a pickle, and pickles are not loaded") for e in (".bin", ".pt")),
        *((pickled(e), f"pytorch_lora_weights{e}", "it is a pickle, and pickles") for e in (".bin", ".pth", ".ckpt")),
        (disguised, "", "is cut or broken, or no safetensors file"),
        (disguised, "pytorch_lora_weights.safetensors", "is cut or broken, or no safetensors file"),
        (two_files, "", "it holds 2 files of weights: name one, such as 'a.safetensors'"),
        (half_a_lora, "", "lacks 1 of .* LoRA weights, which would be made up"),
        (lambda f: None, "", None),
        (lambda f: None, "pytorch_lora_weights.safetensors", None),
    ],
)
def test_loras(change, file, message, whole, adapted, tmp_path, monkeypatch):
    """Pickles are never opened, whatever they are called."""
    folder = shutil.copytree(adapted, tmp_path / "lora")
    change(folder)
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    if message is not None:
        refused(str(whole), message, lora=folder / file)
    else:
        assert DiffusersKernel.from_pretrained(str(whole), num_steps=2, device="cpu", lora=folder / file).fingerprint


def test_a_checkpoint_is_its_files(copy):
    found = find(copy)
    assert isinstance(found, Checkpoint)
    assert found.index()["_class_name"] == "StableDiffusionPipeline"
    assert UNET in found.files
