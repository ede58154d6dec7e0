"""`treesearch edit`: a picture in, edits, their sheet and their figures out."""

import json

import numpy as np
import pytest
from PIL import Image

from treesearch.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stroke, masks of it, and pictures that are none for the kernel."""
    there = tmp_path_factory.mktemp("pictures")
    stroke, keep = np.zeros((28, 28), np.uint8), np.full((28, 28), 255, np.uint8)
    stroke[5:23, 12:16], keep[14:] = 255, 0
    rgb = np.stack([stroke] * 3, -1)
    for name, pixels in {
        "digit": stroke,
        "keep": keep,
        "none": stroke * 0,
        "all": stroke * 0 + 255,
        "small": keep[:16, :16],
        "deep": stroke.astype(np.uint16) * 200,
        "rgba": np.dstack([rgb, stroke]),
    }.items():
        Image.fromarray(pixels).save(there / f"{name}.png")
    return there


def grey(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("L"))


def edit(folder, *words):
    return main(["edit", str(folder / "digit.png"), "--to", "digit(3)", "--kernel", "mnist(num_steps=5)", *words])


def test_what_is_kept_is_kept_and_all_of_it_is_written(folder, tmp_path, capsys):
    words = ["--keep", str(folder / "keep.png"), "--nfe", "60", "--store", str(tmp_path / "run")]
    assert edit(folder, *words) == 0
    found = json.loads((tmp_path / "run/outputs/edit.json").read_text())
    assert list(found)[:2] == ["reconstruction", "edit 1"]
    assert found["reconstruction"]["reward"] is None
    edits = [each for name, each in found.items() if name.startswith("edit")]
    assert all(each["psnr"] is None and each["ssim"] == pytest.approx(1, abs=1e-9) for each in edits)
    assert [each["reward"] for each in edits] == sorted((each["reward"] for each in edits), reverse=True)
    best, source = grey(tmp_path / "run/outputs/best/task0_01.png"), grey(folder / "digit.png")
    assert (best[:14] == source[:14]).all()
    assert (best[14:] != source[14:]).any()
    assert grey(tmp_path / "run/outputs/edit.png").shape[1] > 400
    assert "kept exactly" in capsys.readouterr().out
    (tmp_path / "run/outputs/edit.json").unlink()
    assert main(["resume", str(tmp_path / "run"), "--nfe", "80"]) == 0
    assert len(json.loads((tmp_path / "run/outputs/edit.json").read_text())) == len(found)


def test_fresh_noise_has_no_reconstruction_and_less_strength_costs_less(folder, tmp_path):
    words = ["--inversion", "noise", "--strength", "0.35", "--method", "best-of-n(n=3)"]
    assert edit(folder, *words, "--json", "--store", str(tmp_path / "run")) == 0
    assert "reconstruction" not in json.loads((tmp_path / "run/outputs/edit.json").read_text())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["cost"]["nfe"] == 3 * 2


@pytest.mark.parametrize(
    ("picture", "words", "told"),
    [
        ("small", [], "16 x 16 pixels, expected 28 x 28"),
        ("rgba", [], "mode RGBA"),
        ("deep", [], "8-bit"),
        ("missing", [], "no such file"),
        ("digit", ["--keep", "none"], "keeps nothing"),
        ("digit", ["--keep", "all"], "keeps everything"),
        ("digit", ["--keep", "small"], "16 x 16 pixels and the picture 28 x 28"),
        ("digit", ["--source", "a cat"], "takes no prompts"),
        ("digit", ["--target", "a cat"], "takes no prompts"),
        ("digit", ["--kernel", "actions(hspace(mnist(num_steps=25), 'hspace.safetensors'), levels=(9,))"], "around"),
        ("digit", ["--kernel", "edited(mnist(), 'PICTURE')"], "already"),
        ("digit", ["--inversion", "ddmi"], "ddim"),
        ("digit", ["--control", "kw"], "kv"),
        ("digit", ["--inversion", "bdia"], "eta=0.0"),
        ("digit", ["--inversion", "null_text"], "∅"),
        ("digit", ["--kernel", "mnist(num_steps=5, solver='2m')", "--inversion", "noise"], "cannot noise"),
        ("digit", ["--inversion", "direct", "--control", "replace"], "cross-attention"),
        ("digit", ["--strength", "0"], "strength is 0"),
        ("digit", ["--kernel", "gaussian()"], "draws no pictures"),
    ],
)
def test_mistakes_are_a_sentence(folder, picture, words, told, capsys):
    words = [str(folder / f"{word}.png") if word in ("none", "all", "small") else word for word in words]
    words = [word.replace("PICTURE", str(folder / "digit.png")) for word in words]
    kernel = [] if "--kernel" in words else ["--kernel", "mnist(num_steps=5)"]
    code = main(["edit", str(folder / f"{picture}.png"), "--to", "digit(3)", *kernel, *words])
    assert code in (1, 2)
    assert told in capsys.readouterr().err


def test_guides_go_inside_and_a_chain_without_noise_has_one_edit(folder, tmp_path, capsys):
    picture = str(folder / "digit.png")
    guided = ["--kernel", "tds(mnist(num_steps=5), digit(3))", "--nfe", "20", "--store", str(tmp_path / "tds")]
    assert main(["edit", picture, "--to", "digit(3)", *guided, "--method", "fk(num_particles=4)"]) == 0
    still = ["--kernel", "mnist(num_steps=5, eta=0.0)", "--store", str(tmp_path / "still")]
    assert main(["edit", picture, "--to", "digit(3)", *still]) == 0
    assert "there is one edit" in capsys.readouterr().out
    noised = ["--kernel", "mnist(num_steps=5, eta=0.0)", "--inversion", "noise", "--nfe", "15"]
    assert main(["edit", picture, "--to", "digit(3)", *noised, "--store", str(tmp_path / "noised")]) == 0
    assert "BestOfN draws roots" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "still/outputs/edit.json").read_text())) == ["reconstruction", "edit 1"]


def test_a_kernel_of_prompts_is_told_what_to_draw(folder, capsys):
    words = ["--kernel", f"{__file__}:asked()"]
    for more, missing in (([], "source="), (["--source", "a cat"], "--target")):
        assert main(["edit", str(folder / "digit.png"), "--to", "digit(3)", *words, *more]) == 2
        assert missing in capsys.readouterr().err


def asked():
    """The MNIST kernel, as one that takes prompts."""
    import torch

    from treesearch.backends import mnist

    kernel = mnist(num_steps=5)
    kernel.encode = lambda prompts: {"said": torch.zeros(len(prompts))}  # type: ignore[method-assign]
    return kernel
