"""Rewards on CLIP and image classifiers, against the formulas computed from transformers, PIL and an own open_clip."""

import itertools
import pickle

import numpy as np
import pytest
import ray.cloudpickle as cloudpickle
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.support import tiny_clip
from tests.support.tolerance import float32_tolerance
from treesearch import rewards
from treesearch.rewards import Aesthetic, CLIPScore, HPSv2, ImageClassifier, PickScore, frames, loading
from treesearch.rewards.base import RewardError
from treesearch.rewards.images import hps, vision

PROMPTS = ["a red cube", "two owls, at night", "x"]
LAYERS = 2 * (1 + 2 * 6 + 2)
"""Sums in a row: patches or tokens, six a block, projection and norm, of both towers."""
COSINE = float32_tolerance(1, 3 * 8 * 8, LAYERS)
"""Of a cosine of the tiny CLIP, whose longest sum is over a patch; CLIPScore is 2.5 times that."""
HPS_COSINE = float32_tolerance(1, 3 * 56 * 56, (1 + 3 * 6 + 2) + (1 + 2 * 6 + 2))
"""Of the open_clip network: patches of 56 × 56, three blocks for images and two for texts."""


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return str(tiny_clip.clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    return str(tiny_clip.classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """Aesthetic heads on 16 features in the four published layouts: a module and its file."""
    folder, widths = tmp_path_factory.mktemp("heads"), (16, 24, 12, 8, 4, 1)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    linear = nn.Sequential(*(m for i, one in enumerate(layers) for m in (one, *[nn.Dropout(0.2)] * (i < 3))))
    relu = nn.Sequential(
        *(m for i, one in enumerate(layers) for m in (one, *[nn.ReLU()] * (i < 4), *[nn.Dropout(0.2)] * (i < 3)))
    )
    found = {}
    for name, head, prefix in (
        ("v1", nn.Linear(16, 1), ""),
        ("predictor", nn.Linear(16, 1), "predictor."),
        ("v2", linear, "layers."),
        ("relu", relu, "layers."),
    ):
        tiny_clip.stirred(head)
        state = {f"{prefix}{key}": value for key, value in head.state_dict().items()}
        if name != "v1":
            state["vision_model.post_layernorm.weight"] = torch.ones(3)
        save_file(state, folder / f"{name}.safetensors")
        found[name] = head, str(folder / f"{name}.safetensors")
    return found


@pytest.fixture(scope="session")
def open_clip(tmp_path_factory, clip):
    """A network in open_clip's layout and its file."""
    network, file = tiny_clip.stirred(tiny_clip.OpenClip(), seed=2), tmp_path_factory.mktemp("hps") / "hps.safetensors"
    state = network.state_dict() | {"attn_mask": torch.zeros(77, 77)}
    save_file({f"model.{key}": value.contiguous() for key, value in state.items()}, file)
    return network, str(file)


@pytest.fixture(scope="session")
def every(clip, classifier, heads, open_clip):
    """Each differentiable reward, by name, given options."""
    return {
        "clip_score": lambda **o: CLIPScore(clip, **o),
        "pickscore": lambda **o: PickScore(clip, processor=clip, **o),
        "aesthetic": lambda **o: Aesthetic(heads["relu"][1], clip=clip, **o),
        "hps": lambda **o: HPSv2(open_clip[1], processor=clip, **o),
        "classifier": lambda **o: ImageClassifier(classifier, "newt", **o),
    }


NAMES = ("clip_score", "pickscore", "aesthetic", "hps", "classifier")


def pictures(n=3, height=32, width=32, seed=0):
    """Images of 8 bits as PIL images and as the tensor that a kernel would decode."""
    array = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(a) for a in array], torch.from_numpy(array).movedim(-1, 1) / 255


def cosines(folder, images, prompts, cut=77):
    """cos and the scale from transformers' own network and processor."""
    network, processor = (
        getattr(transformers, kind).from_pretrained(folder) for kind in ("CLIPModel", "CLIPProcessor")
    )
    inputs = processor(text=prompts, images=images, padding=True, truncation=True, max_length=cut, return_tensors="pt")
    with torch.no_grad():
        out = network.eval()(**inputs)
    return nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).double(), out


# Pixels


def test_pixels_reads_what_kernels_decode():
    images, tensor = pictures()
    for samples in (tensor, images, [np.asarray(i) for i in images], list(tensor), (tensor * 255).round().byte()):
        torch.testing.assert_close(vision.pixels(samples), tensor)
    grey = tensor[:, :1]
    assert torch.equal(vision.pixels(grey), grey.repeat(1, 3, 1, 1))
    assert torch.equal(vision.pixels([i.convert("L") for i in images])[:, 0], vision.pixels(images_l(images))[:, 2])


def images_l(images):
    return [np.asarray(i.convert("L")) for i in images]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.rand(2, 4, 3, 8, 8), r"videos \(2, 4, 3, 8, 8\): use frames"),
        (torch.rand(2, 4, 8, 8), r"\(n, 1 or 3, h, w\), got shape \(2, 4, 8, 8\)"),
        (2 * torch.rand(2, 3, 8, 8) - 1.5, r"in \[0, 1\], got values from -1"),
        (torch.full((1, 3, 8, 8), torch.nan), "the decoder overflowed"),
        ([torch.rand(3, 8, 8), torch.rand(3, 8, 9)], "one size, got 2"),
        ([], "empty sequence"),
    ],
)
def test_what_is_no_image_is_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        vision.pixels(samples)
    with pytest.raises(TypeError, match="got texts"):
        vision.pixels(["cat.png"])


@pytest.mark.parametrize("shape", [(64, 64), (45, 60), (61, 40), (20, 27), (32, 32)])
@pytest.mark.parametrize("contrast", [1, 255])
def test_preprocess_is_clip_s_processor(shape, contrast):
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    array = array if contrast == 1 else (array > 127).astype(np.uint8) * 255
    for fit, options in (
        ("crop", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
        ("stretch", {"size": {"height": 32, "width": 32}, "do_center_crop": False}),
    ):
        if fit == "stretch" and shape[0] > shape[1]:
            continue  # PIL 13 resizes columns first here
        theirs = tiny_clip.image_processor(**options)(Image.fromarray(array), return_tensors="pt")["pixel_values"]
        ours = vision.preprocess([array], 32, fit=fit)
        gap = (ours - theirs).abs() * torch.tensor(vision.CLIP_STD).view(3, 1, 1) * 255
        # Without resizing the same floats; else PIL rounds to whole levels after rows and after columns.
        assert gap.max() < (float32_tolerance(255, layers=4) if shape == (32, 32) else 1.2)


@pytest.mark.parametrize("shape", [(50, 81), (81, 50), (64, 64)])
def test_preprocess_pads_with_black(shape):
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = (round(side * 32 / max(shape)) for side in shape)
    canvas = Image.new("RGB", (32, 32))
    resized = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(resized, ((32 - width) // 2, (32 - height) // 2))
    ours = vision.preprocess([array], 32, (0.0,) * 3, (1.0,) * 3, fit="pad")
    assert (255 * ours - torch.from_numpy(np.array(canvas)).movedim(-1, 0)).abs().max() < 1.2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViT", {"size": {"height": 24, "width": 20}}),
        ("DeiT", {"size": {"height": 40, "width": 36}, "crop_size": {"height": 32, "width": 32}}),
        ("ConvNext", {"size": {"shortest_edge": 28}, "crop_pct": 0.875}),
        ("CLIP", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 28}, "do_normalize": False}),
    ],
)
def test_a_preprocessor_is_the_one_it_was_read_from(tmp_path, kind, options):
    processor = tiny_clip.image_processor(kind, **options)
    processor.save_pretrained(tmp_path)
    image = pictures(1, 61, 50)[0]
    theirs, ours = processor(image, return_tensors="pt")["pixel_values"], vision.preprocessor(str(tmp_path))(image)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1.2 / 255 / 0.22


def test_a_processor_that_does_more_is_refused(tmp_path):
    tiny_clip.image_processor("CLIP", do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(loading.CheckpointError, match=r"not supported.*no crop"):
        vision.preprocessor(str(tmp_path))


def test_images_of_several_sizes_are_scored_together(clip):
    small, large = pictures(1, 32, 32)[0], pictures(1, 64, 48)[0]
    together = CLIPScore(clip)([*small, *large], PROMPTS[:2])
    alone = torch.cat([CLIPScore(clip)(small, PROMPTS[:1]), CLIPScore(clip)(large, PROMPTS[1:2])])
    torch.testing.assert_close(together, alone, atol=2.5 * COSINE, rtol=0)


# Formulas


@pytest.mark.parametrize(("shape", "tolerance"), [((32, 32), 2.5 * COSINE), ((48, 70), 4e-3)])
def test_clip_score_is_the_paper_s(clip, shape, tolerance):
    images, tensor = pictures(8, *shape)
    prompts = [f"prompt {i}" for i in range(8)]
    cos, _ = cosines(clip, images, prompts)
    assert cos.min() < -0.05, "no negative cosine to cut"
    assert cos.max() > 0.05
    for samples in (tensor, images):
        torch.testing.assert_close(CLIPScore(clip)(samples, prompts), 2.5 * cos.clamp(min=0), atol=tolerance, rtol=0)
    torch.testing.assert_close(
        CLIPScore(clip, weight=100)(tensor, prompts), 100 * cos.clamp(min=0), atol=40 * tolerance, rtol=0
    )


def test_clip_score_puts_the_prefix_before_each_prompt(clip):
    images, tensor = pictures(8, seed=1)
    cos, _ = cosines(clip, images, ["A photo depicts x"] * 8)
    found = CLIPScore(clip, prefix="A photo depicts ")(tensor, ["x"] * 8)
    torch.testing.assert_close(found, 2.5 * cos.clamp(min=0), atol=2.5 * COSINE, rtol=0)
    assert (found - CLIPScore(clip)(tensor, ["x"] * 8)).abs().max() > 1e-3


def test_pickscore_is_the_logit_of_its_checkpoint(clip):
    images, tensor = pictures()
    cos, out = cosines(clip, images, PROMPTS)
    found = PickScore(clip, processor=clip)(tensor, PROMPTS)
    scale = float(torch.tensor(4.6).exp())
    torch.testing.assert_close(found, out.logits_per_image.diagonal().double(), atol=scale * COSINE, rtol=0)
    torch.testing.assert_close(found, scale * cos, atol=scale * COSINE, rtol=0)


@pytest.mark.parametrize("layout", ["v1", "predictor", "v2", "relu"])
def test_aesthetic_is_the_head_on_the_unit_embedding(clip, heads, layout):
    images, tensor = pictures()
    head, file = heads[layout]
    embeds = cosines(clip, images, PROMPTS)[1].image_embeds  # of norm 1
    with torch.no_grad():
        expected = head(embeds)[:, 0].double()
    found = Aesthetic(file, clip=clip)(tensor)
    close = float32_tolerance(max(1.0, float(expected.abs().max())), 3 * 8 * 8, LAYERS // 2 + 5)  # a tower, a head
    torch.testing.assert_close(found, expected, atol=close, rtol=0)
    assert found.std() > 1e-2


def test_hps_is_the_cosine_of_the_open_clip_network(clip, open_clip):
    network, file = open_clip
    _, tensor = pictures(3, 224, 224)
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (vision.CLIP_MEAN, vision.CLIP_STD))
    rows = tiny_clip.tokenizer()(PROMPTS).input_ids
    tokens = torch.tensor([row + [0] * (77 - len(row)) for row in rows])
    with torch.no_grad():
        cos = nn.functional.cosine_similarity(network.visual((tensor - shift) / scale), network.text(tokens))
    for scale, reward in ((100, HPSv2(file, processor=clip)), (1, HPSv2(file, scale=1, processor=clip))):
        torch.testing.assert_close(reward(tensor, PROMPTS), scale * cos.double(), atol=scale * HPS_COSINE, rtol=0)


def test_hps_keeps_the_aspect_of_images(clip, open_clip):
    wide = pictures(1, 56, 112)[1]
    padded = nn.functional.pad(vision.preprocess(wide, (112, 224), (0,) * 3, (1,) * 3), (0, 0, 56, 56))
    reward = HPSv2(open_clip[1], processor=clip)
    close = 100 * HPS_COSINE
    torch.testing.assert_close(reward(wide, PROMPTS[:1]), reward(padded, PROMPTS[:1]), atol=close, rtol=0)


@pytest.mark.parametrize(
    ("label", "combine", "expected"),
    [
        ("newt", "max", lambda p: p[:, 2]),
        (2, "logsumexp", lambda p: p[:, 2]),
        (["cat", 3], "max", lambda p: p[:, [0, 3]].amax(1)),
        (["cat", 3], "logsumexp", lambda p: p[:, [0, 3]].logsumexp(1)),
    ],
)
def test_image_classifier_is_the_log_probability(classifier, label, combine, expected):
    images, tensor = pictures(4)
    network = transformers.ViTForImageClassification.from_pretrained(classifier).eval()
    inputs = transformers.AutoImageProcessor.from_pretrained(classifier)(images, return_tensors="pt")
    with torch.no_grad():
        log_p = network(**inputs).logits.double().log_softmax(1)
    found = ImageClassifier(classifier, label, combine=combine)(tensor)
    torch.testing.assert_close(found, expected(log_p), atol=COSINE * float(log_p.abs().max()), rtol=0)
    assert found.std() > 0.05


# What all of them promise


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch(every, name):
    images, tensor = pictures(5, 40, 36)
    prompts = [*PROMPTS, "x", "y"]
    whole = every[name](batch_size=16)(tensor, prompts)
    sizes = {"clip_score": 2.5, "pickscore": 100, "hps": 100 * HPS_COSINE / COSINE}
    close = COSINE * sizes.get(name, max(1.0, float(whole.abs().max())))
    torch.testing.assert_close(every[name](batch_size=2)(tensor, prompts), whole, atol=close, rtol=0)
    torch.testing.assert_close(every[name](batch_size=2)(images, prompts), whole, atol=close, rtol=0)
    swapped = every[name]()(tensor.flip(0), prompts[::-1])
    torch.testing.assert_close(swapped.flip(0), whole, atol=close, rtol=0)
    assert whole.std() > 10 * close
    assert every[name]()(tensor[:0], []).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(every, name):
    reward = 2.0 * every[name](dtype="float64", batch_size=1) + 1.0
    x = (0.4 + 0.2 * pictures(2, 40, 36)[1]).double().requires_grad_()
    along = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    prompts, step = PROMPTS[:2], 1e-5
    (gradient,) = torch.autograd.grad(reward.attached(x, prompts).sum(), x)
    with torch.no_grad():
        rise = reward(x + step * along, prompts) - reward(x - step * along, prompts)
    slopes = (gradient * along).flatten(1).sum(1)
    assert (rise != 0).any()
    torch.testing.assert_close(slopes, rise / (2 * step), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_rewards_travel_without_their_weights(every, name):
    reward = every[name]() + 0.5 * every[name](dtype="bfloat16")
    _, tensor = pictures()
    before = reward(tensor, PROMPTS)
    sent = cloudpickle.dumps(reward)
    assert len(sent) < 20_000
    loading.release()
    torch.testing.assert_close(pickle.loads(sent)(tensor, PROMPTS), before)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close(every, name):
    _, tensor = pictures()
    exact, rough = every[name]()(tensor, PROMPTS), every[name](dtype="bfloat16")(tensor, PROMPTS)
    assert not torch.equal(exact, rough)
    assert (exact - rough).abs().max() < 0.05 * max(1.0, exact.abs().max().item())


def test_the_scale_of_pickscore_stays_exact_in_bfloat16(clip):
    assert loading.load("CLIPModel", clip, "cpu", torch.bfloat16).logit_scale == torch.tensor(4.6)


def test_gradients_work_after_scores_in_inference_mode(every):
    loading.release()
    _, tensor = pictures()
    with torch.inference_mode():
        every["clip_score"](dtype="float64")(tensor, PROMPTS)
    x = tensor.clone().requires_grad_()
    every["pickscore"](dtype="float64").attached(x, PROMPTS).sum().backward()
    assert x.grad.abs().sum() > 0


def test_each_prompt_is_embedded_once_and_cut_to_what_clip_reads(clip):
    loading.release()
    calls = []
    network = loading.load("CLIPModel", clip, "cpu", torch.float32)
    network.text_model.register_forward_hook(lambda module, args, out: calls.append(out.last_hidden_state.shape[1]))
    images, tensor = pictures(8)
    long = "long " * 40
    found = CLIPScore(clip, batch_size=2)(tensor, ["short", long] * 4)
    assert sorted(calls) == [7, 77]
    cos, _ = cosines(clip, images, ["short", long] * 4)
    torch.testing.assert_close(found, 2.5 * cos.clamp(min=0), atol=2.5 * COSINE, rtol=0)
    loading.release()


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_said_to_be_cut_where_they_are(every, name):
    reward, images = every[name](), pictures(8)[1]
    reads = name in ("clip_score", "pickscore", "hps")
    for length, changes in ((74, reads), (75, False)):
        a, b = (reward(images, [letter * length + end for letter in "aegkouyz"]) for end in "ab")
        assert torch.equal(a, b) != changes
    said = f"{reward.name} reads 75 tokens of a prompt, this one has 76: the last 1 do not count"
    assert reward.remarks_on(["x" * 75, "x" * 76, 3]) == [[], [said] * reads, []]


def test_a_prefix_counts_to_what_is_cut(clip):
    reward = CLIPScore(clip, prefix="x")
    assert [len(said) for said in reward.remarks_on(["x" * 74, "x" * 75])] == [0, 1]


def test_frames_average_over_a_video(clip):
    reward, videos = PickScore(clip, processor=clip), torch.stack([pictures(4, seed=s)[1] for s in range(2)])
    each = torch.stack([reward(v, [p] * 4) for v, p in zip(videos, PROMPTS, strict=False)])
    for which, expected in (("all", each.mean(1)), ("middle", each[:, 2]), ("last", each[:, 3])):
        torch.testing.assert_close(frames(reward, which)(videos, PROMPTS[:2]), expected, atol=100 * COSINE, rtol=0)
    with pytest.raises(ValueError, match="expected one of all, first"):
        frames(reward, "every")


# Bad input


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hps"])
def test_prompts_are_needed_one_to_a_sample(every, name):
    _, tensor = pictures()
    for prompts, message in (
        (None, "compares images with prompts and got none"),
        (PROMPTS[:1], "1 prompts for 3 samples"),
        ([1, 2, 3], "strings, got int"),
    ):
        with pytest.raises(RewardError, match=message):
            every[name]()(tensor, prompts)


def test_pickles_are_refused_unless_allowed(tmp_path, clip, heads, open_clip):
    head, network = heads["v1"][0], open_clip[0]
    torch.save(head.state_dict(), tmp_path / "head.pth")
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "hps.pt")
    _, tensor = pictures()
    for make, safe in (
        (lambda **o: Aesthetic(str(tmp_path / "head.pth"), clip=clip, **o), Aesthetic(heads["v1"][1], clip=clip)),
        (lambda **o: HPSv2(str(tmp_path / "hps.pt"), processor=clip, **o), HPSv2(open_clip[1], processor=clip)),
    ):
        with pytest.raises(loading.CheckpointError, match=r"is a pickle.*allow_pickle=True"):
            make()
        torch.testing.assert_close(make(allow_pickle=True)(tensor, PROMPTS), safe(tensor, PROMPTS))
    with pytest.raises(loading.CheckpointError, match=r"HPS_v2.1_compressed.pt is a pickle"):
        HPSv2(allow_pickle=False)
    with pytest.raises(loading.CheckpointError, match=r"model\.bin is a pickle"):
        loading.weights(str(tmp_path), "model.bin")


def test_a_pickle_with_code_is_never_run(tmp_path, clip):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(RewardError, match="cannot read weights from"):
        Aesthetic(str(tmp_path / "trap.pt"), clip=clip, allow_pickle=True)(pictures()[1])
    assert not (tmp_path / "sprung").exists()


def test_networks_saved_as_pickles_are_refused_unless_allowed(tmp_path, clip):
    folder = tiny_clip.clip(tmp_path)
    state = loading.weights(clip)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    _, tensor = pictures()
    with pytest.raises(RewardError, match="no safetensors weights: convert them, or pass allow_pickle=True"):
        CLIPScore(str(folder))(tensor, PROMPTS)
    allowed = CLIPScore(str(folder), allow_pickle=True)
    torch.testing.assert_close(allowed(tensor, PROMPTS), CLIPScore(clip)(tensor, PROMPTS))


def test_checkpoints_that_are_not_there_say_what_to_do(tmp_path, monkeypatch, clip):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(loading.CheckpointError, match="not a complete checkpoint"):
        CLIPScore(str(tmp_path))
    with pytest.raises(loading.CheckpointError, match=r"there is no file \./head\.safetensors"):
        Aesthetic("./head.safetensors", clip=clip)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RewardError, match="cannot read weights from"):
        Aesthetic(str(tmp_path), clip=clip)(pictures()[1])

    def gated(*args, **options):
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    with pytest.raises(loading.CheckpointError, match=r"some/clip is gated: accept its terms"):
        CLIPScore("some/clip")


def test_weights_of_something_else_are_refused(tmp_path, clip, classifier, heads, open_clip):
    _, tensor = pictures()
    with pytest.raises(loading.CheckpointError, match="is a vit network, expected a CLIP"):
        PickScore(classifier, processor=clip)
    folder = tiny_clip.clip(tmp_path)
    save_file({k: v for k, v in loading.weights(clip).items() if "projection" not in k}, folder / "model.safetensors")
    with pytest.raises(RewardError, match=r"lacks 2 weights of CLIPModel, text_projection\.weight .*wrong model"):
        CLIPScore(str(folder))(tensor, PROMPTS)
    with pytest.raises(RewardError, match="no open_clip state dict: it lacks"):
        HPSv2(heads["v2"][1], processor=clip)(tensor, PROMPTS)
    with pytest.raises(RewardError, match=r"no aesthetic head: expected .* got model\."):
        Aesthetic(open_clip[1], clip=clip)(tensor)


def test_an_open_clip_state_dict_with_a_hole_is_refused(tmp_path, clip, open_clip):
    state = {k: v.contiguous() for k, v in open_clip[0].state_dict().items() if "ln_final" not in k}
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(RewardError, match=r"lacks 2 weights of CLIPModel, text_model.final_layer_norm.bias"):
        HPSv2(str(tmp_path / "hole.safetensors"), processor=clip)(pictures()[1], PROMPTS)


def test_a_head_of_another_clip_is_refused(tmp_path, clip):
    save_file(nn.Linear(12, 1).state_dict(), tmp_path / "b32.safetensors")
    with pytest.raises(RewardError, match=r"reads 12 features.*gives 16: name the CLIP"):
        Aesthetic(str(tmp_path / "b32.safetensors"), clip=clip)(pictures()[1])
    save_file(
        {f"layers.{i}.{n}": v for i in (0, 2) for n, v in nn.Linear(16, 3).state_dict().items()},
        tmp_path / "h.safetensors",
    )
    with pytest.raises(RewardError, match="expected a chain that ends in one number"):
        Aesthetic(str(tmp_path / "h.safetensors"), clip=clip)(pictures()[1])


def test_options_that_make_no_sense_are_refused(clip, classifier):
    with pytest.raises(ValueError, match=r"no label 'doge' among its 4: did you mean 'dog'\?"):
        ImageClassifier(classifier, "doge")
    with pytest.raises(ValueError, match="no label 4"):
        ImageClassifier(classifier, 4)
    with pytest.raises(ValueError, match="got none"):
        ImageClassifier(classifier, [])
    with pytest.raises(ValueError, match="'max' or 'logsumexp'"):
        ImageClassifier(classifier, "cat", combine="mean")
    with pytest.raises(ValueError, match="dtype is 'bf16', expected float32"):
        CLIPScore(clip, dtype="bf16")
    with pytest.raises(RewardError, match="batch_size is 0"):
        CLIPScore(clip, batch_size=0)(pictures()[1], PROMPTS)
    with pytest.raises(ValueError, match="fit is 'cut'"):
        vision.preprocess(pictures()[1], 32, fit="cut")


# The package


def test_every_name_of_the_package_is_there_and_described():
    for name in rewards.__all__:
        assert getattr(rewards, name) is not None
    for name in (
        "Aesthetic",
        "CLIPScore",
        "HPSv2",
        "ImageClassifier",
        "PickScore",
        "digit",
        "ink",
        "compressibility",
    ):
        facts = getattr(rewards, name).facts
        assert facts.range
        assert facts.prompts == (name in ("CLIPScore", "HPSv2", "PickScore"))
    assert CLIPScore.facts.checkpoint == "openai/clip-vit-large-patch14"
    with pytest.raises(AttributeError, match="no attribute 'ClipScore'"):
        rewards.ClipScore  # noqa: B018


def test_open_clip_names_are_all_converted(open_clip):
    state = hps.clip_state(open_clip[0].state_dict())
    assert set(state) == set(transformers.CLIPModel(hps.clip_config(state)).state_dict())
