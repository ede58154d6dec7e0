"""ImageReward at tiny size, against a second implementation that reads the published layout."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

import treesearch as ts
from tests.support import tiny, tiny_clip
from tests.support.tolerance import float32_tolerance
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.cli.main import main
from treesearch.rewards import CLIPScore, loading
from treesearch.rewards.base import RewardError
from treesearch.rewards.images import image_reward, vision
from treesearch.rewards.images.image_reward import ImageReward

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cube", "blue", "sphere", "##s", "on"]
PROMPTS = ["a red cube", "blue spheres on a red cube", "a Sphere", ""]
IMAGE, TEXT, PATCH, SIDE, DEPTH = 128, 192, 16, 3, 2
LAYERS = 1 + DEPTH * 6 + DEPTH * 12 + 5
"""Sums in a row: of patches; q·k, values and four linear maps a block; twice that with cross-attention; the head."""
CLOSE = float32_tolerance(2, 1024, LAYERS)
"""Of rewards below 2 in size, whose longest sum has 1024 terms."""


def published_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names and with the shapes of the published file, at tiny size."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, IMAGE),
        "blip.visual_encoder.pos_embed": (1, SIDE**2 + 1, IMAGE),
        "blip.visual_encoder.patch_embed.proj": (IMAGE, 3, PATCH, PATCH),
        "blip.visual_encoder.norm": (IMAGE,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS) + 2, TEXT),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, TEXT),
        "blip.text_encoder.embeddings.LayerNorm": (TEXT,),
        "blip.vision_proj": (8, IMAGE),
        "blip.text_proj": (8, TEXT),
    }
    for i in range(DEPTH):
        block = f"blip.visual_encoder.blocks.{i}."
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        shapes |= {block + name: (out * IMAGE, into * IMAGE) for name, (out, into) in linears.items()}
        shapes |= {block + "norm1": (IMAGE,), block + "norm2": (IMAGE,)}
        layer = f"blip.text_encoder.encoder.layer.{i}."
        for part, width in {"attention": TEXT, "crossattention": IMAGE}.items():
            shapes[layer + part + ".self.query"] = (TEXT, TEXT)
            shapes |= {layer + part + f".self.{name}": (TEXT, width) for name in ("key", "value")}
            shapes |= {layer + part + ".output.dense": (TEXT, TEXT), layer + part + ".output.LayerNorm": (TEXT,)}
        shapes |= {layer + "intermediate.dense": (2 * TEXT, TEXT), layer + "output.dense": (TEXT, 2 * TEXT)}
        shapes |= {layer + "output.LayerNorm": (TEXT,)}
    sizes = {0: (TEXT, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    shapes |= {f"mlp.layers.{i}": (out, into) for i, (into, out) in sizes.items()}

    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        value = torch.randn(shape, generator=generator) / (math.sqrt(fan_in) if len(shape) > 1 else 5)
        if len(shape) == 3 or name.endswith("embeddings.weight"):
            state[name] = torch.randn(shape, generator=generator) / 40  # small, so that eps of the norms matters
            continue
        state[name + ".weight"] = value + 1 if len(shape) == 1 else 1.5 * value
        state[name + ".bias"] = torch.randn(shape[:1], generator=generator) / 5
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return state


class Published:
    """The forward pass of the authors' code, written down again from its equations."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.state[name + ".weight"], self.state[name + ".bias"])

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.state[name + ".weight"], self.state[name + ".bias"], eps)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / 8
        scores = scores if mask is None else scores - 10_000.0 * (1 - mask[:, None, None].float())
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def image(self, pixels: Tensor) -> Tensor:
        root = "blip.visual_encoder."
        kernel, bias = (self.state[f"{root}patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        patches = conv2d(pixels, kernel, bias, stride=PATCH).flatten(2).transpose(1, 2)
        first = self.state[root + "cls_token"].expand(len(pixels), -1, -1)
        x = torch.cat([first, patches], 1) + self.state[root + "pos_embed"]
        for i in range(DEPTH):
            block = f"{root}blocks.{i}."
            qkv = self.linear(self.norm(x, block + "norm1", 1e-6), block + "attn.qkv")
            x = x + self.linear(self.attend(*qkv.chunk(3, -1)), block + "attn.proj")
            hidden = self.linear(self.norm(x, block + "norm2", 1e-6), block + "mlp.fc1")
            x = x + self.linear(gelu(hidden), block + "mlp.fc2")
        return self.norm(x, root + "norm", 1e-6)

    def text(self, tokens: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        root = "blip.text_encoder."
        words, places = (self.state[f"{root}embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        x = self.norm(words[tokens] + places[: tokens.shape[1]], root + "embeddings.LayerNorm", 1e-12)
        for i in range(DEPTH):
            layer = f"{root}encoder.layer.{i}."
            for part, source, seen in (("attention", None, mask), ("crossattention", image, None)):
                inputs = (x, x, x) if source is None else (x, source, source)
                names = ("query", "key", "value")
                qkv = [self.linear(v, f"{layer}{part}.self.{n}") for v, n in zip(inputs, names, strict=True)]
                out = self.linear(self.attend(*qkv, seen), f"{layer}{part}.output.dense")
                x = self.norm(out + x, f"{layer}{part}.output.LayerNorm", 1e-12)
            hidden = gelu(self.linear(x, layer + "intermediate.dense"))
            x = self.norm(self.linear(hidden, layer + "output.dense") + x, layer + "output.LayerNorm", 1e-12)
        return x

    def reward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.text(tokens, mask, self.image(pixels))[:, 0]
        for i in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{i}")
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def tokens_of(texts: list[str]) -> tuple[Tensor, Tensor]:
    """What BERT's tokenizer does on the words of these tests: [CLS] words [SEP], padded to 35."""
    index = {word: i for i, word in enumerate(WORDS)}
    rows = []
    for text in texts:
        words = [p for w in text.lower().split() for p in (("sphere", "##s") if w == "spheres" else (w,))]
        rows.append([index["[CLS]"], *(index[w] for w in words[:33]), index["[SEP]"]])
    tokens = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    return tokens, torch.tensor([[1] * len(row) + [0] * (35 - len(row)) for row in rows])


def normalised(images: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    return (images - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def reference(images: Tensor, texts: list[str], seed: int = 0) -> Tensor:
    return Published(published_state(seed)).reward(normalised(images), *tokens_of(texts)).double()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pickle, a safetensors file and a tokenizer's folder."""
    folder, state = tmp_path_factory.mktemp("image_reward"), published_state()
    torch.save(state, folder / "ImageReward.pt")
    safetensors.save_file(state, folder / "model.safetensors")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture
def reward(files: Path):
    return ImageReward(str(files / "model.safetensors"), tokenizer=str(files / "bert"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))


def test_it_is_the_published_network(reward, images) -> None:
    expected = reference(images, PROMPTS)
    assert expected.std() > 0.05, "the reference must tell samples apart"
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("source", ["ImageReward.pt", "model.safetensors", ""])
def test_every_kind_of_checkpoint_gives_the_same_rewards(files: Path, images: Tensor, source: str) -> None:
    reward = ImageReward(str(files / source), tokenizer=str(files / "bert"), allow_pickle=source.endswith(".pt"))
    torch.testing.assert_close(reward(images, PROMPTS), reference(images, PROMPTS), atol=CLOSE, rtol=0)


def test_each_image_meets_its_own_prompt(reward, images) -> None:
    pairs = [(0, 1), (0, 0), (2, 1)]
    chosen, texts = images[[i for i, _ in pairs]], [PROMPTS[j] for _, j in pairs]
    together = reward(chosen, texts)
    alone = [reward(images[i : i + 1], [PROMPTS[j]]) for i, j in pairs]
    torch.testing.assert_close(together, torch.cat(alone), atol=CLOSE, rtol=0)
    assert (together[:, None] - together).abs().triu(1).max() > 1e-3
    torch.testing.assert_close(reward(chosen.flip(0), texts[::-1]).flip(0), together, atol=CLOSE, rtol=0)


def test_micro_batches_change_nothing(files: Path, reward, images) -> None:
    small = ImageReward(str(files), tokenizer=str(files / "bert"), batch_size=3)
    torch.testing.assert_close(small(images, PROMPTS), reward(images, PROMPTS), atol=CLOSE, rtol=0)


def test_prompts_are_cut_after_35_tokens(reward, images) -> None:
    long = "red cube " * 30
    torch.testing.assert_close(reward(images[:1], [long]), reference(images[:1], [long]), atol=CLOSE, rtol=0)
    torch.testing.assert_close(reward(images[:1], [long]), reward(images[:1], [long + "on a sphere"]))
    said = "ImageReward reads 33 tokens of a prompt, this one has 34: the last 1 do not count"
    assert reward.remarks_on(["red " * 33, "red " * 34]) == [[], [said]]


def test_the_middle_of_a_wide_image_is_scored(reward, images) -> None:
    margins = torch.rand(4, 3, 48, 20), torch.rand(4, 3, 48, 20)
    wide = torch.cat([margins[0], images, margins[1]], 3)
    torch.testing.assert_close(reward(wide, PROMPTS), reference(images, PROMPTS), atol=CLOSE, rtol=0)


def test_images_are_resized_to_the_network_s_size(reward, images) -> None:
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    small = vision.preprocess(large, 48, (0, 0, 0), (1, 1, 1))
    torch.testing.assert_close(reward(large, PROMPTS), reference(small, PROMPTS), atol=CLOSE, rtol=0)


def test_gradients_reach_the_image(reward, images) -> None:
    leaf = images[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.attached(leaf, PROMPTS[:1]).sum(), leaf)
    copy = images[:1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference(copy, PROMPTS[:1]).sum(), copy)
    assert expected.abs().max() > 1e-4
    backward = float32_tolerance(float(expected.abs().max()), 1024, 2 * LAYERS)  # there and back
    torch.testing.assert_close(gradient, expected, atol=backward, rtol=0)
    assert not reward(leaf, PROMPTS[:1]).requires_grad


def test_half_precision_is_near(files: Path, images: Tensor) -> None:
    half = ImageReward(str(files), tokenizer=str(files / "bert"), dtype="bfloat16")
    difference = half(images, PROMPTS) - reference(images, PROMPTS)
    assert 0 < difference.abs().max() < 0.3
    network, _ = image_reward._load(str(files), str(files / "bert"), "cpu", torch.bfloat16, False)
    assert {p.dtype for p in network.head.parameters()} == {torch.float32}  # as in the published code
    assert not any(p.requires_grad for p in network.parameters())


def test_it_travels_light(reward, images) -> None:
    data = pickle.dumps(reward)
    assert len(data) < 2_000
    torch.testing.assert_close(pickle.loads(data)(images, PROMPTS), reward(images, PROMPTS))


def test_pickles_are_refused_before_anything_is_read(files: Path) -> None:
    for checkpoint, allow in ((str(files / "ImageReward.pt"), None), (image_reward.PUBLISHED, False)):
        with pytest.raises(loading.CheckpointError, match=r"ImageReward.pt is a pickle.*allow_pickle=True"):
            ImageReward(checkpoint, allow_pickle=allow)


def test_the_published_pickle_is_read_as_tensors_only(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(loading, "weights", lambda name, **o: asked.append((name, o)) or {})
    with pytest.raises(RewardError, match="not the weights of ImageReward"):
        ImageReward()(torch.rand(1, 3, 8, 8), ["a"])
    assert asked == [(image_reward.PUBLISHED, {"allow_pickle": True})]


def test_a_pickle_that_runs_code_does_not(files: Path, tmp_path: Path, images: Tensor) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"mlp.layers.0.weight": Evil()}, tmp_path / "evil.pt")
    reward = ImageReward(str(tmp_path / "evil.pt"), tokenizer=str(files / "bert"), allow_pickle=True)
    with pytest.raises(RewardError, match="cannot read weights"):
        reward(images, PROMPTS)
    assert not (tmp_path / "ran").exists()


def test_convert_writes_the_same_network(files: Path, tmp_path: Path, images: Tensor) -> None:
    target = tmp_path / "converted.safetensors"
    image_reward.main(["convert", str(files / "ImageReward.pt"), str(target)])
    names = set(safetensors.load_file(target))
    assert names == {n for n in published_state() if "_proj." not in n and "position_ids" not in n}
    reward = ImageReward(str(target), tokenizer=str(files / "bert"))
    torch.testing.assert_close(reward(images, PROMPTS), reference(images, PROMPTS), atol=CLOSE, rtol=0)


def test_the_command_says_how_it_is_used(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"usage: python -m treesearch\.rewards\.images\.image_reward convert"):
        image_reward.main(["convert", "one"])


def test_full_size_is_the_published_file() -> None:
    """ViT-L/16 at 224 px and BERT-base of 30524 tokens: read off the shapes, and as many bytes as the file has."""
    sizes = {IMAGE: 1024, 3 * IMAGE: 3072, 4 * IMAGE: 4096, TEXT: 768, 2 * TEXT: 3072, 40: 512}
    tables = {"visual_encoder.pos_embed": (1, 197, 1024), "word_embeddings.weight": (30524, 768)}

    def grown(name: str, shape: torch.Size) -> tuple[int, ...]:
        fixed = [full for end, full in tables.items() if name.endswith(end)]
        known = {TEXT: 768} if name.startswith("mlp.") else sizes
        return fixed[0] if fixed else tuple(known.get(s, s) for s in shape)

    names = {name: tuple(value.shape) for name, value in published_state().items()}
    depths = {"visual_encoder.blocks": 24, "text_encoder.encoder.layer": 12}
    for prefix, depth in depths.items():
        first = f"blip.{prefix}.0."
        own = {name.removeprefix(first): shape for name, shape in names.items() if name.startswith(first)}
        names |= {f"blip.{prefix}.{i}.{name}": shape for i in range(depth) for name, shape in own.items()}
    state = {n: torch.empty(grown(n, torch.Size(s)), device="meta") for n, s in names.items()}

    image, text = image_reward._configs(image_reward.renamed(state))
    assert (image.image_size, image.num_attention_heads, image.intermediate_size) == (224, 16, 4096)
    assert (text.num_attention_heads, text.encoder_hidden_size, text.vocab_size) == (12, 1024, 30524)
    with torch.device("meta"):
        network = image_reward._Network(image, text)
    network.load_state_dict(image_reward.renamed(state), assign=True)
    projections = 256 * (1024 + 1) + 256 * (768 + 1)
    assert 4 * (sum(p.numel() for p in network.parameters()) + projections) == pytest.approx(1_786_880_927, rel=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mlp.layers.7.bias"), "not the weights of ImageReward.*head.7.bias"),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), "not the weights of ImageReward.*position_embedding"),
        (lambda s: s.update(logit_scale=torch.ones(1)), "'logit_scale' is no weight of ImageReward"),
        (lambda s: s.update({"mlp.layers.7.bias": torch.ones(2)}), "not the weights of ImageReward.*head.7.bias"),
    ],
)
def test_other_weights_are_refused(files: Path, tmp_path: Path, images: Tensor, change, message: str) -> None:
    state = published_state()
    change(state)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match=message):
        ImageReward(str(tmp_path), tokenizer=str(files / "bert"))(images, PROMPTS)


def test_a_tokenizer_of_another_vocabulary_is_refused(files: Path, tmp_path: Path, images: Tensor) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(RewardError, match=r"has 13 tokens, the checkpoint 14: use google-bert/bert-base-uncased"):
        ImageReward(str(files), tokenizer=str(tmp_path))(images, PROMPTS)


def test_bad_arguments(reward, images) -> None:
    with pytest.raises(RewardError, match="compares images with prompts and got none"):
        reward(images)
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        ImageReward("x.safetensors", batch_size=0)
    with pytest.raises(loading.CheckpointError, match=r"there is no file x.safetensors"):
        ImageReward("x.safetensors")


def test_facts() -> None:
    known = ImageReward.facts
    assert (known.differentiable, known.prompts, known.licence) == (True, True, "Apache-2.0")
    assert known.checkpoint == image_reward.PUBLISHED


def test_a_stock_pipeline_is_searched_for_it(files: Path, tiny_root: Path, tmp_path: Path, capsys) -> None:
    """The README's lines at tiny size, in Python and on the command line."""
    model, clip = str(tiny.checkpoint("sd", tiny_root)), str(tiny_clip.clip(tmp_path / "clip"))
    weights, words, prompts = str(files / "model.safetensors"), str(files / "bert"), ["a red cube", "two spheres"]
    kernel = DiffusersKernel.from_pretrained(model, num_steps=5, eta=1.0, guidance_scale=7.5)
    reward = ImageReward(weights, tokenizer=words) + 0.1 * CLIPScore(clip)
    found = ts.search(kernel, reward, ts.DiffusionTreeSearch(), prompts=prompts, budget=ts.Budget(nfe=100))
    for task in found.tasks:
        samples, rewards = task.best(3)
        torch.testing.assert_close(reward(samples, [task.prompt] * 3), rewards, atol=1e-4, rtol=0)
        assert rewards.std() > 0
    line = f'run dts-star --kernel diffusers("{model}",num_steps=5,eta=1.0,guidance_scale=7.5)'
    words_ = f'image_reward("{weights}",tokenizer="{words}")+0.1*clip_score("{clip}")'
    command = [*line.split(), "--reward", words_, "--prompts", *prompts, "--nfe", "100", "--json"]
    assert main([*command, "--store", str(tmp_path / "run")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [t["best"] for t in told["tasks"]] == pytest.approx([float(t.best(1)[1]) for t in found.tasks], abs=1e-4)
    assert main([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 100
