"""What a search leaves in a folder: the best samples as files, sheets, curves and the card, and the memory it takes."""

import io
import json
import resource
import sys
import tracemalloc
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import treesearch as ts
from tests.support import kernels
from tests.support.beds import BEDS
from treesearch.cli.main import main
from treesearch.pictures import media
from treesearch.report import best, outputs, tables, texts, trees
from treesearch.results.result import TaskResult
from treesearch.results.summary import summary

EVIL = "a \x1b[2J cat\nwith \ud800 and 日本"


class Drawn:
    """A bed whose samples are drawn: an image, a video, a text or an array from the state's sum."""

    def __init__(self, kind, side=4):
        self.kernel, self.kind, self.side, self.most = BEDS["gaussian"], kind, side, 0

    def __getattr__(self, name):
        if name.startswith("__") or name in ("kernel", "kind", "side", "most"):
            raise AttributeError(name)
        return getattr(self.kernel, name)

    def decode(self, x0):
        self.most = max(self.most, len(x0))
        level = torch.sigmoid(x0.flatten(1).sum(1))
        if self.kind == "text":
            return [f"{float(v):.3f}" for v in level]
        shape = {
            "image": (3, self.side, self.side),
            "video": (4, 1, self.side, self.side),
            "data": (5,),
            "audio": (2, 9),
        }
        drawn = level.reshape(-1, *[1] * len(shape[self.kind])).expand(-1, *shape[self.kind]).float()
        if self.kind == "audio":
            return drawn * torch.linspace(0.5, 1, 18).reshape(2, 9)
        return drawn * torch.linspace(0.5, 1, 4).reshape(4, 1, 1, 1) if self.kind == "video" else drawn


def reward(samples):
    if isinstance(samples, list):
        return torch.tensor([float(s) for s in samples], dtype=torch.float64)
    return samples.double().flatten(1).mean(1)


def search(kind, n=6, **settings):
    return ts.search(Drawn(kind), reward, ts.BestOfN(n=n), seed=5, **settings)


def index(folder):
    return [json.loads(line) for line in (Path(folder) / "outputs/best/best.jsonl").read_text().splitlines()]


def test_the_best_images_are_files_that_tell_what_made_them(tmp_path):
    result = search("image", prompts=[EVIL, "b"])
    card = outputs.write_outputs(result, tmp_path / "out", best=3)
    folder, lines = tmp_path / "out/outputs/best", index(tmp_path / "out")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["best.jsonl", *(f"task{t}_{r:02}.png" for t in (0, 1) for r in (1, 2, 3))]
    for number, task in enumerate(result.tasks):
        ours = [line for line in lines if line["task"] == number]
        assert [line["reward"] for line in ours] == task.rewards.sort(descending=True).values[:3].tolist()
        for line in ours:
            with Image.open(folder / line["file"]) as image:
                level, text = np.asarray(image)[0, 0, 0] / 255, image.text
            assert level == pytest.approx(line["reward"], abs=1 / 500)
            assert (text["reward"], text["seed"], text["key"]) == (repr(line["reward"]), "5", line["key"])
            assert int(line["key"], 16) == int(task.tree.key[line["node"]])
            assert text["prompt"] == ("b" if number else r"a \x1b[2J cat\nwith \ud800 and 日本")
        assert [line["prompt"] for line in ours] == [task.prompt] * 3
    assert {"best.png", "task0.png", "task1.png", "reward.png"} <= {path.name for path in folder.parent.iterdir()}
    assert all(f"](outputs/{name}.png)" in card.read_text("utf-8") for name in ("best", "task0", "task1", "reward"))


def test_files_of_an_earlier_writing_give_way(tmp_path):
    outputs.write_outputs(search("image"), tmp_path, best=5)
    kept = tmp_path / "outputs/best/mine.png"
    kept.write_bytes(b"mine")
    outputs.write_outputs(search("data"), tmp_path, best=2)
    names = sorted(path.name for path in kept.parent.iterdir())
    assert names == ["best.jsonl", "mine.png", "task0_01.npz", "task0_02.npz"]


def test_every_kind_has_its_file(tmp_path):
    for kind, suffix in {"video": ".png", "data": ".npz", "audio": ".wav"}.items():
        result = search(kind)
        outputs.write_outputs(result, tmp_path / kind, best=1, fps=4, rate=800 if kind == "audio" else None)
        [line] = index(tmp_path / kind)
        path, sample = tmp_path / kind / "outputs/best" / line["file"], result.best(1)[0][0]
        assert path.suffix == suffix
        if kind == "video":
            with Image.open(path) as film:
                film.seek(3)
                assert (film.n_frames, film.info["duration"], film.text["seed"]) == (4, 250, "5")
        elif kind == "data":
            with np.load(path) as data:
                assert (data["sample"] == sample.numpy()).all()
        else:
            with wave.open(str(path)) as sound:
                assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (2, 800, 9)
                heard = np.frombuffer(sound.readframes(9), "<i2").reshape(9, 2).T / 32767
            assert np.allclose(heard, sample.numpy(), atol=1e-4)
    result = search("text")
    outputs.write_outputs(result, tmp_path / "text", best=2)
    assert [line["text"] for line in index(tmp_path / "text")] == result.best(2)[0]
    assert not list((tmp_path / "text/outputs").glob("task*.png"))
    page = (tmp_path / "text/outputs/task0.md").read_text("utf-8")
    assert page.count(f"| {result.best(1)[0][0]} |") >= 2  # among the best, and drawn
    assert "## 16 draws of the read-out" in page
    card = (tmp_path / "text/README.md").read_text("utf-8")
    assert "## The best texts" in card
    assert all(f"| {text} |" in card for text in result.best(3)[0])


def test_texts_are_lines_of_json(tmp_path):
    task = search("text").tasks[0]
    texts.write_lines(task, tmp_path / "texts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text("utf-8").splitlines()]
    assert [line["text"] for line in lines] == task.samples
    assert [line["reward"] for line in lines] == task.rewards.tolist()
    with pytest.raises(ts.TreeSearchError, match="no texts: export npz"):
        texts.write_lines(search("data").tasks[0], tmp_path / "texts.jsonl")


def test_texts_are_shown_and_not_obeyed(tmp_path, capsys):
    def evil(texts):
        return torch.tensor([float(s) for s in texts], dtype=torch.float64)

    kernel = Drawn("text")
    plain_decode = kernel.decode
    result = ts.search(kernel, evil, ts.BestOfN(), budget=ts.Budget(iterations=4), store=tmp_path / "run")
    kernel.decode = lambda x0: [f"{EVIL} | <b> {s}\nsecond" for s in plain_decode(x0)]
    for task in result.tasks:
        task.__dict__.pop("samples", None)
    outputs.write_outputs(result, tmp_path / "run", best=3)
    assert main(["show", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    named = [line for line in said.splitlines() if line.startswith("  best")]
    assert len(named) == 3
    assert all(r"\x1b[2J" in line and line.endswith(r"\nsecond") for line in named)
    assert "\x1b" not in said
    card = (tmp_path / "run/README.md").read_text("utf-8")
    assert "<b>" not in card
    assert "## The best texts" in card


def test_a_video_is_an_mp4_where_the_library_for_it_is_there(tmp_path, monkeypatch):
    written = []

    def write_frames(path, size, **words):
        Path(path).write_bytes(b"film")
        written.append((size, words["fps"], words["output_params"][1]))
        while (frame := (yield)) is not None:
            written.append(len(frame))

    library = SimpleNamespace(write_frames=write_frames, get_ffmpeg_exe=lambda: "ffmpeg")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", library)
    path = media.write(torch.rand(3, 1, 6, 8), tmp_path / "film", "video", {"prompt": EVIL}, rate=None)
    assert path.read_bytes() == b"film"
    assert path.suffix == ".mp4"
    library.get_ffmpeg_exe = lambda: ""  # no program for this machine
    assert media.write(torch.rand(3, 1, 6, 8), tmp_path / "film", "video", {}, rate=None).suffix == ".png"
    assert written == [((8, 6), 8, r"comment=prompt: a \x1b[2J cat\nwith \ud800 and 日本"), *[6 * 8 * 3] * 3]


def test_a_sheet_of_large_images_is_small_and_so_is_its_memory(tmp_path):
    side, rows = 1024, []
    images = torch.rand(1, 3, 32, 32)

    def fetch(nodes):
        rows.append(len(nodes))
        return torch.nn.functional.interpolate(images, size=(side, side)).expand(len(nodes), 3, side, side).clone()

    task = search("image", n=40).tasks[0]
    task = TaskResult(EVIL, task.tree, task.readout, task.lam, task.status, fetch, task.context)
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outputs.contact_sheet(task, tmp_path / "sheet.png") is not None
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert max(sheet.size) <= 2048
        assert min(sheet.size) > 500
    assert set(rows) == {1}
    assert peak < 60
    assert grown < 150
    assert (tmp_path / "sheet.png").stat().st_size < 5 * 2**20


def test_a_sheet_s_cell_shows_the_sample_it_names(tmp_path):
    task = search("image", n=20).tasks[0]
    outputs.contact_sheet(task, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    top = task.rewards.sort(descending=True).values
    assert pixels[40, 60, 0] / 255 == pytest.approx(float(top[0]), abs=1 / 500)
    assert pixels[40, 60 + 116, 0] / 255 == pytest.approx(float(top[1]), abs=1 / 500)


@pytest.mark.parametrize("linked", ["outputs", "outputs/best", "outputs/best/best.jsonl", "outputs/best/task0_01.png"])
def test_nothing_is_shown_through_a_link_that_leads_out_of_the_run(tmp_path, capsys, monkeypatch, linked):
    drawn = []
    monkeypatch.setattr(trees, "draw_tree", lambda *given, pictures, **more: drawn.append(len(pictures)))
    run, other, named = tmp_path / "run", tmp_path / "other", tmp_path / "by another name"
    outputs.write_outputs(search("image", store=str(run)), run)
    named.symlink_to(run)

    def shown():
        assert main(["plot", str(named), "--what", "tree"]) == 0
        capsys.readouterr()
        assert main(["show", str(named), "--json"]) == 0
        out, err = capsys.readouterr()
        return len(json.loads(out)["best"]), drawn.pop(), err

    assert shown() == (best.NAMED, 6, "")
    (run / linked).rename(other)
    (run / linked).symlink_to(other)
    found, thumbnails, said = shown()
    assert (found, thumbnails) == (0, 0)
    assert "leads out of the run folder through a link" in said
    assert said.count("\n") == 1


def test_nothing_is_written_through_a_link(tmp_path):
    result, elsewhere = search("image"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("outputs", "outputs/best"):
        run = tmp_path / name.replace("/", "-")
        (run / name).parent.mkdir(parents=True)
        (run / name).symlink_to(elsewhere)
        with pytest.raises(ts.StoreError, match="symbolic link"):
            outputs.write_outputs(result, run)
    victim = elsewhere / "victim"
    victim.write_text("as it was")
    (tmp_path / "run/outputs/best").mkdir(parents=True)
    for name in (
        "README.md",
        "summary.json",
        "outputs/task0.png",
        "outputs/best/task0_01.png",
        "outputs/best/best.jsonl",
    ):
        (tmp_path / "run" / name).symlink_to(victim)
    outputs.write_outputs(result, tmp_path / "run")
    assert victim.read_text() == "as it was"
    assert sorted(path.name for path in elsewhere.iterdir()) == ["victim"]


def test_a_run_from_python_has_its_card_and_figures(tmp_path):
    result = search("data", store=tmp_path / "run")
    assert outputs.write_outputs(result, tmp_path / "run") == tmp_path / "run/README.md"
    card = (tmp_path / "run/README.md").read_text("utf-8")
    assert card.startswith("# BestOfN run\n\n- kernel: `Drawn`\n- reward: `reward`\n- method: ")
    assert json.loads((tmp_path / "run/summary.json").read_text())["cost"]["nfe"] == result.cost.nfe


def test_thumbnails_are_read_back_and_what_was_forged_is_left_out(tmp_path):
    result = search("image")
    outputs.write_outputs(result, tmp_path, best=4)
    folder = tmp_path / "outputs/best"
    found = best.pictures(folder, 0)
    assert list(found) == [line["node"] for line in index(tmp_path)]
    assert best.pictures(folder, 1) == best.pictures(tmp_path, 0) == {}
    secret = tmp_path / "task0_01.png"
    (folder / "task0_01.png").rename(secret)
    lines = index(tmp_path)
    lines[0]["file"] = "../../task0_01.png"
    (folder / "task0_02.png").write_bytes(b"no picture")
    (folder / "best.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, 3, {"task": 0, "node": 1}]))
    assert list(best.pictures(folder, 0)) == [line["node"] for line in lines[2:]]
    (folder / "best.jsonl").write_bytes(b"\xff")
    assert best.pictures(folder, 0) == {}


@pytest.mark.parametrize(
    ("sample", "rate", "kind"),
    [
        (torch.zeros(3, 4, 4), None, "image"),
        (torch.zeros(1, 4, 4, dtype=torch.bfloat16), None, "image"),
        (torch.zeros(2, 4, 4), None, "data"),
        (torch.zeros(5, 3, 4, 4), None, "video"),
        (torch.zeros(16, 2), None, "data"),
        (torch.zeros(2, 16), 800, "audio"),
        (np.zeros((1, 4, 4), np.uint8), None, "image"),
        (Image.new("L", (4, 4)), None, "image"),
        ("words", None, "text"),
        ({"a": 1}, None, "text"),
    ],
)
def test_a_sample_s_kind(sample, rate, kind):
    assert media.kind_of(sample, rate) == kind


def test_pictures_keep_their_values():
    assert np.asarray(media.image_of(torch.full((1, 2, 2), 0.5))).tolist() == [[128, 128], [128, 128]]
    whole = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    assert (np.asarray(media.image_of(whole)) == whole.transpose(1, 2, 0)).all()
    buffer = io.BytesIO()
    media.image_of(torch.full((3, 2, 2), float("nan"))).save(buffer, "PNG")


def test_a_greedy_search_shows_no_ess():
    """It has no weights towards π, as it has no log Z."""
    cells = {}
    for method in (ts.BestOfN(), ts.BeamSearch(beam_width=2, branching=2)):
        found = ts.search(BEDS["gaussian"], kernels.total, method, budget=ts.Budget(nfe=40))
        (row,) = tables.rows("it", summary(found), found.cost)
        cells[type(method).__name__] = [row[tables.COLUMNS.index(name)] for name in ("log Z", "ESS")]
    assert cells["BeamSearch"] == [tables.DASH, tables.DASH]
    assert float(cells["BestOfN"][1]) > 1
