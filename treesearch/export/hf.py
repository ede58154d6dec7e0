"""A saved result as a dataset of Hugging Face, through their `datasets`: parquet files that say what their columns are,
and a card.

    data/train-00000-of-00001.parquet   a row a sample: prompt, task, node, reward, log_weight, weight, key, sample
    README.md                            the card: how to load it, what was asked, what came out, what it may claim

A sample is an image (PNG, 8 bits a channel) where it can be seen as one, a text, or an array as it is. Files come from
the folder that `result.save` wrote, which may be somebody else's: nothing outside of it is read.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.budget import Cost
from treesearch.errors import StoreError, TreeSearchError, missing
from treesearch.pictures import media
from treesearch.report.tables import COLUMNS, certified, markdown_table, notes, rows
from treesearch.results.saving import read_saved
from treesearch.runs import files
from treesearch.text import code, markdown

if TYPE_CHECKING:
    from datasets import Features

SHARD_BYTES, BATCH_BYTES = 500 * 10**6, 2**25
FRONT = "---\ntags:\n- treesearch\n- synthetic\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n"
COLUMNS_TOLD = (
    "`reward` is what was searched for, higher is better. `weight` is a sample's share of the estimate of "
    "π(x) ∝ p(x) exp(λ reward), one in all for each task: draw with it, or weigh by it. `node` and `key` say where in "
    "the tree it stands and by which noise."
)
LICENCES = "Made by treesearch. The model that drew the samples and what scored them have licences of their own."
_FLOATS = ("reward", "log_weight", "weight")


class _Kind(NamedTuple):
    """What samples are: image, text, file or array, whose type and shape follow."""

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()


def write_hf(saved: str | os.PathLike[str], folder: str | os.PathLike[str], *, task: int | None = None) -> Path:
    """Write what `result.save` wrote as a dataset: `datasets.load_dataset(folder)` reads it.

    Args:
        saved: the folder of `result.save`.
        folder: of the dataset, new or empty.
        task: the samples of one task alone.

    Returns:
        The folder.

    Raises:
        ImportError: `datasets` is not installed.
        StoreError: the first folder holds no saved result or is damaged, the second is not empty.
        TreeSearchError: there are no samples, or some have another shape than the first.
    """
    datasets, source, out = _library(), Path(saved), Path(folder)
    if out.is_dir() and any(out.iterdir()):
        raise StoreError(f"{out} is not empty: name a new folder for the dataset")
    told = read_saved(source)
    first = next(_lines(source, task), None)
    if first is None:
        raise TreeSearchError(f"{source} holds no samples" + ("" if task is None else f" of task {task}"))
    kind = _kind_of(source, first)
    out.mkdir(parents=True, exist_ok=True)
    with _quiet(datasets), tempfile.TemporaryDirectory(dir=out, prefix=".", ignore_cleanup_errors=True) as scratch:
        made = _made(datasets, source, task, kind, scratch)
        _write_shards(made, out / "data")
        files.write_text(out / "README.md", FRONT + _card(told, kind, len(made), task))
        del made  # whose files are in the scratch folder
    return out


def _write_shards(made: Any, folder: Path) -> None:
    folder.mkdir()
    count = math.ceil(made.data.nbytes / SHARD_BYTES)
    for i in range(count):
        shard = made.shard(count, i, contiguous=True)
        shard.to_parquet(folder / f"train-{i:05}-of-{count:05}.parquet")


def _made(datasets: Any, source: Path, task: int | None, kind: _Kind, scratch: str) -> Any:
    """The dataset, written as its rows come."""
    size = max(1, np.dtype(kind.dtype).itemsize * math.prod(kind.shape)) if kind.name == "array" else 1
    try:
        return datasets.Dataset.from_generator(
            _rows,
            features=_features(datasets, kind),
            gen_kwargs={"source": os.fspath(source), "task": task, "kind": tuple(kind)},
            cache_dir=scratch,
            writer_batch_size=max(1, min(64, BATCH_BYTES // size)),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def push(folder: str | os.PathLike[str], name: str, *, public: bool = False) -> str:
    """Send a dataset to the hub, with the token of who is logged in there.

    Args:
        folder: that `write_hf` wrote.
        name: OWNER/NAME; a dataset of that name gets another version.
        public: whether a new one can be seen by everybody.

    Returns:
        Its address.

    Raises:
        TreeSearchError: the hub refused it or cannot be reached; the folder is as it was.
    """
    import huggingface_hub as hub

    api = hub.HfApi()
    try:
        url = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=os.fspath(folder), repo_type="dataset", commit_message="From treesearch"
        )
    except (OSError, ValueError) as error:
        raise TreeSearchError(
            f"{name} was not pushed: {str(error).strip().splitlines()[0]}; the dataset is in {os.fspath(folder)}; "
            "`hf auth login` keeps a token that may write"
        ) from error
    return str(url)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing("datasets", "hf") from error
    return datasets


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without bars of progress."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _lines(source: Path, task: int | None) -> Iterator[dict[str, str]]:
    """Rows of samples.csv."""
    with open(source / "samples.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if task is None or line["task"] == str(task):
                yield line


def _rows(source: str, task: int | None, kind: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Rows of the dataset."""
    folder, asked = Path(source), read_saved(Path(source))["tasks"]
    prompts = [t["prompt"] if isinstance(t["prompt"], str | None) else json.dumps(t["prompt"]) for t in asked]
    for line in _lines(folder, task):
        try:
            number = int(line["task"])
            about = {"prompt": prompts[number], "task": number, "node": int(line["node"])}
            about |= {name: float(line[name]) for name in _FLOATS} | {"key": f"{int(line['key']):#018x}"}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise StoreError(f"{folder / 'samples.csv'} is damaged: {error!r}") from error
        yield about | {"sample": _sample(folder, line, _Kind(*kind))}


def _sample(folder: Path, line: dict[str, str], kind: _Kind) -> Any:
    if (found := _kind_of(folder, line)) != kind and (found.name, kind.name) != ("image", "image"):
        raise TreeSearchError(
            f"sample {line['node']} of task {line['task']} is {_told(found)}, the first one {_told(kind)}: those of a "
            "dataset are alike; --task exports one task alone"
        )
    if kind.name == "text":
        return line["text"]
    path = _inside(folder, line["file"])
    if path.suffix not in (".npy", ".npz"):
        data = path.read_bytes()
        return {"bytes": data, "path": None} if kind.name == "image" else data
    array = _array(path, line["row"])
    if kind.name == "array":
        return array
    out = io.BytesIO()
    media.image_of(array).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def _kind_of(folder: Path, line: dict[str, str]) -> _Kind:
    if not line["file"]:
        return _Kind("text")
    path = _inside(folder, line["file"])
    if path.suffix == ".png":
        return _Kind("image")
    if path.suffix not in (".npy", ".npz"):
        return _Kind("file")
    array = _array(path, line["row"])
    if media.kind_of(array) == "image":
        return _Kind("image")
    return _Kind("array", str(array.dtype), array.shape)


def _told(kind: _Kind) -> str:
    return f"an array {kind.shape} of {kind.dtype}" if kind.name == "array" else f"a sample of kind {kind.name}"


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder.

    Raises:
        StoreError: it lies elsewhere.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise StoreError(f"{folder / 'samples.csv'} names {name}, which is not in its folder: nothing else is exported")
    return path


def _array(path: Path, row: str) -> NDArray[Any]:
    opened = _opened(path, path.stat().st_mtime_ns)
    return np.asarray(opened[int(row)]) if path.suffix == ".npy" else opened


@lru_cache(maxsize=2)
def _opened(path: Path, _written: int) -> Any:
    """The samples of a file, which stay on the disk where there are many."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    with np.load(path, allow_pickle=False) as found:
        return found["sample"]


def _features(datasets: Any, kind: _Kind) -> Features:
    """What the columns are."""
    value = datasets.Value
    known = {"prompt": value("string"), "task": value("int64"), "node": value("int64")}
    known |= {name: value("float64") for name in _FLOATS} | {"key": value("string")}
    return datasets.Features(known | {"sample": _feature(datasets, kind)})


def _feature(datasets: Any, kind: _Kind) -> Any:
    if kind.name != "array":
        return {
            "text": datasets.Value("string"), "image": datasets.Image(), "file": datasets.Value("large_binary"),
        }[kind.name]  # fmt: skip
    if len(kind.shape) > 1:
        try:
            return getattr(datasets, f"Array{len(kind.shape)}D")(kind.shape, kind.dtype)
        except AttributeError:
            raise TreeSearchError(
                f"the samples are {_told(kind)}, of more axes than a dataset has: export npz"
            ) from None
    plain = datasets.Value(kind.dtype)
    return datasets.Sequence(plain, length=kind.shape[0]) if kind.shape else plain


def _card(told: dict[str, Any], kind: _Kind, count: int, task: int | None) -> str:
    """The card's Markdown; what others wrote is escaped."""
    asked, cost = told["asked"], Cost(**told["cost"])
    tasks = told["tasks"] if task is None else [told["tasks"][task]]
    name = asked["method"]["name"]
    head, *body = ([markdown(cell) for cell in line] for line in [COLUMNS, *rows(name, tasks, cost)])
    known = [f"- {markdown(note)}" for note in notes(tasks, cost)] or ["- none"]
    claimed = [
        "\n".join([f"{markdown(of)}:", "", *(f"- {markdown(line)}" for line in lines)])
        for of, lines in certified(name, tasks).items()
    ]
    parts = [
        f"# {count:,} samples of {markdown(name)}",
        '```python\nfrom datasets import load_dataset\n\nsamples = load_dataset(PATH_OR_NAME)["train"]\n```',
        "\n".join(f"- {markdown(key)}: {code(value)}" for key, value in asked.items()),
        f"`sample` is {_told(kind)}. {COLUMNS_TOLD}",
        markdown_table(body, head),
        "## To know before using the numbers",
        "\n".join(known),
        "## Certificate",
        *claimed,
        LICENCES,
    ]
    return "\n\n".join(parts) + "\n"
