"""PIE-mini: pairs and their masks, the judge, the metrics, the reader of the benchmark's file, the painter's parts."""

import json
import types
from pathlib import Path

import pytest
import torch

from experiments.pie_mini import metrics, pictures
from experiments.pie_mini.mapping import TYPES, read_mapping, unrolled
from experiments.pie_mini.painter import WORDS, Pixels, parts, pipeline, tokenizer
from experiments.pie_mini.train import Args, Table, losses
from treesearch.backends.chains.inversion import invert
from treesearch.backends.pipelines import DiffusersKernel

PAIRS = pictures.pairs(48, seed=0)


def test_pairs_differ_inside_their_masks_alone_and_the_judge_tells_them_apart():
    assert {pair.kind for pair in PAIRS} == set(pictures.KINDS)
    for pair in PAIRS:
        assert (pair.picture != pair.truth).any(0).logical_and(~pair.mask).sum() == 0
        assert 5 < pair.mask.sum() < 100
        assert pair.source != pair.target
    sources, truths = (torch.stack([getattr(p, name) for p in PAIRS]) for name in ("picture", "truth"))
    wanted = [p.target for p in PAIRS]
    assert pictures.judged(truths, wanted).all()
    assert not pictures.judged(sources, wanted).any()


def test_backdrops_are_in_no_prompt_and_differ():
    rng = torch.Generator().manual_seed(0)
    scene = pictures.every_scene()[7]
    one, other = (pictures.painted(scene, b) for b in pictures.backdrops(2, rng))
    assert not torch.equal(one, other)
    assert torch.equal(one[:, pictures.cover(scene)], other[:, pictures.cover(scene)])
    assert [pictures.prompt_of(p.target) for p in PAIRS if p.kind == "delete"] == ["nothing"] * 8


def test_metrics_of_pictures_that_are_equal_shifted_or_recoloured():
    one, mask, words = PAIRS[0].picture[None], PAIRS[0].mask[None], [PAIRS[0].prompts[1]]
    found = {name: measure(one, one, mask, words) for name, measure in metrics.metrics().items()}
    assert {"structure": 0.0, "mse": 0.0, "psnr": torch.inf} == {
        n: found[n].item() for n in ("structure", "mse", "psnr")
    }
    assert found["ssim"].item() == pytest.approx(1, abs=1e-9)
    darker = one * 0.9
    moved = one.roll(3, -1)
    measure = metrics.metrics()["structure"]
    assert measure(one, darker, mask, words) < 0.1 * measure(one, moved, mask, words)
    inside = torch.where(mask[:, None], 1 - one, one)
    assert metrics.psnr(one, inside, mask, words).item() == torch.inf
    assert measure(one, moved, mask, words) == metrics.structure_distance(one, moved, mask, words)


def test_structure_by_features_that_are_given_by_hand():
    def tokens(x):
        return torch.stack([torch.eye(2), torch.ones(2, 2)])[: len(x)] if x.mean() < 1 else torch.ones(1, 2, 2)

    one = torch.zeros(1, 3, 4, 4)
    found = metrics.structure_distance(one, one + 1, one[:, 0] > 0, [""], tokens=tokens)
    assert found.item() == pytest.approx(0.5, abs=1e-12)  # cosines (1, 0, 0, 1) and (1, 1, 1, 1)


def test_lpips_and_clip_see_the_regions_that_they_are_of(monkeypatch):
    seen = []

    class Net:
        def __call__(self, one, other):
            seen.append((one, other))
            return torch.zeros(len(one), 1, 1, 1)

    fake = types.SimpleNamespace(LPIPS=lambda net: Net())
    monkeypatch.setattr(metrics.importlib, "import_module", lambda name: fake)
    one, mask = PAIRS[0].picture[None], PAIRS[0].mask[None]
    assert metrics.lpips(one, 1 - one, mask, [""]).shape == (1,)
    assert (seen[0][1][:, :, mask[0]] == -1).all()
    assert not (seen[0][1] == -1).all()
    monkeypatch.setattr(metrics, "CLIPScore", lambda checkpoint, weight: lambda x, y: weight * x.mean((1, 2, 3)))
    whole, region = (metrics.metrics(clip="a")[n](one, one, mask, ["w"]) for n in ("clip", "clip_edited"))
    assert torch.equal(whole, 100 * one.mean((1, 2, 3)))
    assert torch.equal(region, 100 * (one * mask).mean((1, 2, 3)))


ENTRY = {
    "image_path": "1_change_object_80/111000000000.jpg",
    "original_prompt": "a [cat] on a chair",
    "editing_prompt": "a [small dog] on a chair",
    "editing_instruction": "Change the cat to a small dog",
    "editing_type_id": "1",
    "blended_word": "cat dog",
    "mask": [9, 3, 17, 2, 46, 9],
}


def test_the_mapping_file_of_the_benchmark(tmp_path):
    file = tmp_path / "mapping_file.json"
    file.write_text(json.dumps({"111000000000": ENTRY, "2": ENTRY | {"blended_word": "", "editing_type_id": 9}}))
    one, two = read_mapping(file, (6, 8))
    assert (one.source, one.target) == ("a cat on a chair", "a small dog on a chair")
    assert one.changed == (("cat",), ("small dog",))
    assert (one.kind, TYPES[one.kind], one.blended) == (1, "change object", ("cat", "dog"))
    assert (two.name, two.blended, TYPES[two.kind]) == ("2", None, "change style")
    inner = one.mask[1:-1, 1:-1]
    assert inner.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    border = one.mask.clone()
    border[1:-1, 1:-1] = True
    assert border.all()
    assert one.mask[0].all()
    assert one.mask[:, -1].all()
    assert unrolled([]).shape == (512, 512)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask": [1]}, "1 numbers, expected pairs"),
        ({"mask": [-1, 2]}, "expected pairs"),
        ({"mask": [48, 1]}, "begins at 48, expected 0..47"),
        ({"editing_type_id": "10"}, "editing_type_id is 10"),
        ({"blended_word": "cat"}, "a word of the source and one"),
        ({"editing_prompt": None}, "m, 1: prompts are"),
    ],
)
def test_entries_that_are_not_what_they_should_be(tmp_path, change, said):
    file = tmp_path / "m"
    file.write_text(json.dumps({"1": ENTRY | change}))
    with pytest.raises(ValueError, match=said):
        read_mapping(file, (6, 8))
    file.write_text(json.dumps({"1": {k: v for k, v in ENTRY.items() if k not in change}}))
    if "blended_word" not in change:
        with pytest.raises(ValueError, match="it has no"):
            read_mapping(file, (6, 8))


def test_files_that_are_none(tmp_path):
    for text in ("[]", "{", "{}"):
        (tmp_path / "m").write_text(text)
        with pytest.raises(ValueError, match="no mapping file"):
            read_mapping(tmp_path / "m")
    with pytest.raises(ValueError, match="no mapping file"):
        read_mapping(tmp_path / "absent")


def test_every_word_is_a_token_and_no_token_is_shared():
    words = tokenizer()
    ids = [words(word).input_ids[1:-1] for word in WORDS]
    assert all(len(each) == 1 for each in ids)
    assert len({each[0] for each in ids}) == len(WORDS)
    longest = max((pictures.prompt_of(scene) for scene in pictures.every_scene()), key=len)
    assert len(words(longest).input_ids) == 13


@pytest.fixture(scope="module")
def kernel():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiffusersKernel(pipeline(), num_steps=3, guidance_scale=7.5, device="cpu")


def test_the_painter_is_a_kernel_on_pixels(kernel):
    pixels = torch.stack([p.picture for p in PAIRS[:2]])
    assert torch.equal(kernel.decode(2 * pixels - 1), (2 * pixels - 1) / 2 + 0.5)
    assert torch.equal(Pixels().encode(pixels).latents, pixels)
    cond = {name: getattr(each, "value", each) for name, each in kernel.encode(["nothing"] * 2).items()}
    path = invert(kernel, 2 * pixels - 1, cond=cond)
    assert path.shape == (4, 2, 3, 16, 16)
    assert torch.equal(path[0], 2 * pixels - 1)


def test_losses_reach_every_weight():
    pipe = pipeline()
    network, args = parts(pipe), Args(out=Path(), steps=1, batch_size=4)
    loss = next(losses(network, pipe.scheduler.alphas_cumprod, Table(pipe.tokenizer), args, 0))
    loss.backward()
    again = next(losses(network, pipe.scheduler.alphas_cumprod, Table(pipe.tokenizer), args, 0))
    assert torch.equal(loss, again)
    assert 0 < loss < 10
    unseen = {n for n, w in network.named_parameters() if w.grad is None}
    assert not unseen
