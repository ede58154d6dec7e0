"""What a checkpoint is, told from the names of its files before any weight is read.

    a folder                       looked at as it is
    something like owner/name      one request to the hub, or what its cache has
    anything else                  a path that is not there

`Checkpoint.refuse` has one sentence for each way in which files are no pipeline. Pickles are never read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
PLACES = "_places"
"""Of the index of a modular repository: {component: where it is}."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HEAVY = (*PICKLES, ".safetensors", ".gguf", ".msgpack", ".h5", ".onnx", ".onnx_data", ".ot", ".pb", ".tflite")
LORA = "pytorch_lora_weights.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]*\w)?")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+)?(?:\.(?P<late>[^.-]+))?\.safetensors"
)
_POINTER = b"version https://git-lfs"
_MOST_FILES, _DEEPEST = 10_000, 3


class CheckpointError(OSError):
    """A checkpoint that cannot be loaded, or lacks something."""


@dataclass(frozen=True)
class Checkpoint:
    """Files of a checkpoint.

    Args:
        name: as the user wrote it.
        files: their paths in the checkpoint, with slashes.
        folder: where they are, None where they are still on the hub.
        revision: of the hub's repository.
    """

    name: str
    files: frozenset[str]
    folder: Path | None
    revision: str | None = None

    def index(self) -> dict[str, Any]:
        """What `model_index.json` says: the pipeline's class, and [library, class] of every component.

        A repository that has only the index of a modular pipeline says so too, and under `PLACES` where each is.

        Raises:
            CheckpointError: there is none, it is broken, or names code of the checkpoint's own.
        """
        name = next((each for each in (INDEX, MODULAR_INDEX) if each in self.files), None)
        if name is None:
            raise self.error(self._without_index())
        found = self._json(name)
        kind = found.get("_class_name")
        if isinstance(kind, list):
            raise self.error(f"its pipeline is code of its own ({kind[0]}.py), which is not run: load it and wrap it "
                             "if its class is a known one, DiffusersKernel(pipe, ...)")  # fmt: skip
        if not isinstance(kind, str):
            raise self.error(f"its {name} names no _class_name: it is not of a pipeline, or broken; load it again")
        return found if name == INDEX else _placed(found)

    def refuse(self, index: dict[str, Any], given: Collection[str], variant: str | None) -> dict[str, str | None]:
        """Refuse a checkpoint that lacks files, or has them in a form that is not read.

        Args:
            index: of the checkpoint.
            given: components that the user brings.
            variant: of the weights that the user wants.

        Returns:
            The variant of the weights of every component that has some.

        Raises:
            CheckpointError: it does.
        """
        parts = [name for name in components(index) if name not in given]
        for name in parts:
            self.refuse_part(name, index[name])
        found = {name: self.variant_of(name, variant) for name in parts if has_weights(index[name])}
        if variant is not None and variant not in found.values():
            raise self.error(f"it has no weights of variant {variant!r}: leave variant out")
        return found

    def refuse_part(self, name: str, entry: list[str]) -> None:
        """Refuse a component whose folder is not there, or holds code.

        Raises:
            CheckpointError: it is such.
        """
        self._refuse_code(name, *entry)
        if not self.inside(name):
            raise self.error(f"its folder {name} is missing: load it again, or bring it, components={{{name!r}: ...}}")

    def error(self, why: str) -> CheckpointError:
        """The error that says so."""
        return CheckpointError(f"cannot load {self.name!r}: {why}")

    def _refuse_code(self, name: str, library: str, kind: str) -> None:
        if f"{name}/{library}.py" in self.files:
            raise self.error(f"its {name} is code of its own ({library}.{kind}), which is not run: load it and bring "
                             f"it, components={{{name!r}: ...}}")  # fmt: skip

    def inside(self, name: str) -> list[str]:
        """Files of a component's folder."""
        start = _place(name)
        return sorted(file.removeprefix(start) for file in self.files if file.startswith(start))

    def variant_of(self, name: str, wanted: str | None) -> str | None:
        """Which variant of a component's weights to read.

        Raises:
            CheckpointError: they are pickled, cut, missing in part, or all of another.
        """
        inside, place, part = self.inside(name), _place(name), name or "network"
        if "config.json" not in inside:
            raise self.error(f"{place}config.json is missing: load it again")
        variants = {_variant(file) for file in inside if _WEIGHTS.fullmatch(file)}
        if not variants:
            raise self.error(self._no_weights(part, inside))
        found = wanted if wanted in variants else None
        if found not in variants:
            choices = " or ".join(f"variant={v!r}" for v in sorted(map(str, variants)))
            raise self.error(f"the weights of its {part} are of another variant: say {choices}")
        self._refuse_missing_shards(name, inside, found)
        for file in _weights(inside, found):
            self.refuse_broken(place + file)
        return found

    def read(self, name: str, variant: str | None, *, weights: bool) -> list[str]:
        """Files of a component's folder that loading it reads, of all that there are in a repository.

        Args:
            name: of the folder.
            variant: of its weights, by `variant_of`.
            weights: whether it has some; where not, what is beside it may all the same.
        """
        inside = self.inside(name)
        if weights:
            return sorted({*_weights(inside, variant), *(f for f in inside if "/" not in f and f.endswith(".json"))})
        return [file for file in inside if not file.endswith(_HEAVY) and (name or "/" not in file)]

    def _no_weights(self, name: str, inside: list[str]) -> str:
        if any(file.endswith(PICKLES) for file in inside):
            return f"the weights of its {name} are a pickle, and pickles are not loaded: convert it to safetensors"
        if any(file.endswith(".gguf") for file in inside):
            return _gguf(f"{name}/...")
        return f"the weights of its {name} are missing ({name}/*.safetensors): load it again"

    def _refuse_missing_shards(self, name: str, inside: list[str], variant: str | None) -> None:
        ending = f".index.{variant}.json" if variant else ".index.json"
        for file in inside:
            if file.endswith(f".safetensors{ending}") and self.folder is not None:
                shards = set(self._json(_place(name) + file).get("weight_map", {}).values())
                if absent := sorted(shards - set(inside)):
                    raise self.error(f"{len(absent)} of {len(shards)} shards of its {name or 'network'} are missing, "
                                     f"such as {_place(name)}{absent[0]}: load it again")  # fmt: skip

    def refuse_broken(self, file: str) -> list[str]:
        """Names of the weights in a safetensors file; none while it is on the hub.

        Raises:
            CheckpointError: the file is a pointer of git-lfs, or no whole safetensors file.
        """
        if self.folder is None:
            return []
        from safetensors import SafetensorError, safe_open

        with (self.folder / file).open("rb") as start:
            pointer = start.read(len(_POINTER)) == _POINTER
        if pointer:
            raise self.error(f"{file} is a pointer of git-lfs instead of the weights: run `git lfs pull` in the folder")
        try:
            with safe_open(self.folder / file, framework="pt") as weights:
                return list(weights.keys())
        except SafetensorError as error:
            raise self.error(f"{file} is cut or broken, or no safetensors file ({error}): load it again") from error

    def _json(self, file: str) -> dict[str, Any]:
        where = _downloaded(self, file) if self.folder is None else self.folder / file
        try:
            found = json.loads(where.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self.error(f"its {file} is not JSON ({error}): load it again") from error
        if not isinstance(found, dict):
            raise self.error(f"its {file} is {type(found).__name__}, expected named values: load it again")
        return found

    def _without_index(self) -> str:
        """What files without a `model_index.json` are."""
        names = sorted(self.files)
        top = [name for name in names if "/" not in name]
        endings = {PurePosixPath(name).suffix for name in top}
        if not names:
            return "the folder is empty: load the checkpoint into it"
        if below := [name for name in names if name.endswith(f"/{INDEX}")]:
            return f"the pipeline is one level down: name {self._below(below[0].removesuffix(f'/{INDEX}'))}"
        if self._is_lora(top):
            return "this is a LoRA, not a pipeline: name the checkpoint that it was made for, and this as lora=..."
        if known := [name for name in names if name.endswith(("/config.json", "/scheduler_config.json"))]:
            kinds = sorted({name.split("/")[0] for name in known})
            return f"its {INDEX} is missing, though {', '.join(kinds)} are there: load it again"
        if "config.json" in top or "scheduler_config.json" in top or "tokenizer_config.json" in top:
            return self._alone("config.json" if "config.json" in top else "")
        if ".gguf" in endings:
            return _gguf(next(name for name in top if name.endswith(".gguf")))
        if ".safetensors" in endings:
            return _single(next(name for name in top if name.endswith(".safetensors")))
        if any(name.endswith(PICKLES) for name in names):
            return "it holds pickles alone, and pickles are not loaded: convert it to safetensors, as a pipeline"
        return (
            f"it has no {INDEX} and nothing of a pipeline, but {', '.join(names[:3])}: name the pipeline's own folder"
        )

    def _below(self, name: str) -> str:
        return repr(f"{self.name.rstrip('/')}/{name}" if self.folder is not None else name)

    def _is_lora(self, top: list[str]) -> bool:
        if LORA in top or "adapter_config.json" in top:
            return True
        weights = [name for name in top if name.endswith(".safetensors")]
        if len(weights) != 1 or "config.json" in top or self.folder is None:
            return False
        return any("lora" in key for key in self.refuse_broken(weights[0]))

    def _alone(self, config: str) -> str:
        """A component by itself, or a model of transformers."""
        said = self._json(config) if config else {}
        if architectures := said.get("architectures") or said.get("model_type"):
            kind = architectures[0] if isinstance(architectures, list) else architectures
            return f"this is a model of transformers ({kind}), not a pipeline of diffusers"
        what = f"this is one component ({said.get('_class_name', 'a scheduler or a tokenizer')}), not a pipeline"
        if self.folder is not None and (self.folder.resolve().parent / INDEX).exists():
            return f"{what}: name the folder above it, {str(self.folder.resolve().parent)!r}"
        return f"{what}: name the checkpoint, and bring this as one of its components={{...}}"


def _place(folder: str) -> str:
    """What the names of a folder's files begin with."""
    return f"{folder}/" if folder else ""


def _variant(file: str) -> str | None:
    """Of the weights in a file."""
    found = _WEIGHTS.fullmatch(file)
    return (found["variant"] or found["late"]) if found else None


def _weights(inside: Sequence[str], variant: str | None) -> list[str]:
    return [file for file in inside if _WEIGHTS.fullmatch(file) and _variant(file) == variant]


def components(index: dict[str, Any]) -> list[str]:
    """Names of the components that an index says are there."""
    pairs = {name: entry for name, entry in index.items() if name[0] != "_" and isinstance(entry, list)}
    return [name for name, entry in pairs.items() if len(entry) == 2 and all(isinstance(each, str) for each in entry)]


def has_weights(entry: Sequence[str]) -> bool:
    """Whether a component is a network, by its library and class: guiders, schedulers, processors are not."""
    return not any(word in entry[1] for word in ("Guid", "Scheduler", "Tokenizer", "Processor", "Extractor"))


def _placed(index: dict[str, Any]) -> dict[str, Any]:
    """The index of a modular repository as that of a whole pipeline."""
    entries = {k: v[2] for k, v in index.items() if isinstance(v, list) and len(v) == 3 and isinstance(v[2], dict)}
    kinds = {name: place.get("type_hint") or index[name][:2] for name, place in entries.items()}
    where = {name: place.get("pretrained_model_name_or_path", place.get("repo")) for name, place in entries.items()}
    places = {name: entries[name] for name, at in where.items() if at and isinstance(at, str)}
    return index | {name: kinds[name] if name in places else [None, None] for name in entries} | {PLACES: places}


def find(
    name: str | os.PathLike[str], revision: str | None = None, markers: Sequence[str] = (INDEX, MODULAR_INDEX)
) -> Checkpoint:
    """The files of a checkpoint, by a folder or a hub id; at most one request, and none for a path.

    Args:
        name: folder or hub id.
        revision: of a repository.
        markers: files of which the hub's cache has one of every such repository.

    Raises:
        CheckpointError: there is none, or it is one file.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return Checkpoint(name, frozenset(_files(path)), path)
    if path.exists():
        raise CheckpointError(f"cannot load {name!r}: {_one_file(path)}")
    if not is_hub_id(name):
        raise CheckpointError(f"cannot load {name!r}: there is no such folder{_near(path)}")
    return _on_hub(name, revision, markers)


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository: owner/name, and no file."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith((".safetensors", ".gguf", *PICKLES))


def _on_hub(name: str, revision: str | None, markers: Sequence[str]) -> Checkpoint:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    cached = next((each for marker in markers if (each := _cached(name, revision, marker))), None)
    if is_offline_mode():
        if cached is None:
            raise CheckpointError(f"cannot load {name!r}: there is no such folder{_near(Path(name))}, it is not in the "
                                  "hub's cache, and HF_HUB_OFFLINE forbids to ask")  # fmt: skip
        return cached
    try:
        siblings = HfApi().model_info(name, revision=revision, timeout=30).siblings or []
    except Exception as error:  # what a request raises belongs to whichever client the hub's library uses
        if cached is not None:
            return cached
        raise CheckpointError(f"cannot load {name!r}: {_of_hub(name, error)}") from error
    return Checkpoint(name, frozenset(each.rfilename for each in siblings), None, revision)


def _cached(name: str, revision: str | None, marker: str) -> Checkpoint | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, marker, revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parents[marker.count("/")]
    return Checkpoint(name, frozenset(_files(folder)), folder, revision)


def _downloaded(checkpoint: Checkpoint, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(checkpoint.name, file, revision=checkpoint.revision))
    except Exception as error:  # as above
        raise checkpoint.error(_of_hub(checkpoint.name, error)) from error


def _of_hub(name: str, error: Exception) -> str:
    kinds, said = {cls.__name__ for cls in type(error).__mro__}, " ".join(str(error).split())[:200]
    if "GatedRepoError" in kinds or "gated" in said.lower():
        cure = "accept its licence on its page and log in with `hf auth login`, or name a local folder"
    elif "RepositoryNotFoundError" in kinds:
        cure = (
            f"there is no such folder{_near(Path(name))}, and the hub has no such repository: check the name, and log "
            "in if it is private"
        )
    elif "RevisionNotFoundError" in kinds:
        cure = "the repository has no such revision: check it, or leave revision out"
    else:
        cure = (
            f"there is no such folder{_near(Path(name))}, and the hub gave nothing: check the name and the connection"
        )
    return f"{cure} ({type(error).__name__}: {said})"


def _one_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return _gguf(path.name)
    if path.suffix in PICKLES:
        return "it is a pickle, and pickles are not loaded: convert it to safetensors, as a pipeline"
    if path.name == INDEX:
        return f"it is a file: name its folder, {str(path.parent)!r}"
    return _single(path.name) if path.suffix == ".safetensors" else "it is a file, expected a folder or a hub id"


def _single(name: str) -> str:
    return (
        f"{name} is a checkpoint in one file: open it with diffusers, pipe = StableDiffusionPipeline.from_single_file"
        "(...) or its like, and wrap that, DiffusersKernel(pipe, ...)"
    )


def _gguf(name: str) -> str:
    return (
        f"{name} is a GGUF file, the weights of a network alone: open it with diffusers, from_single_file(..., "
        "quantization_config=GGUFQuantizationConfig(...)), and bring it as components={'transformer': ...}"
    )


def _near(path: Path) -> str:
    """The folder that may have been meant."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = [each.name for each in islice(parent.iterdir(), _MOST_FILES)] if os.access(parent, os.R_OK) else []
    near = get_close_matches(path.name, names, n=1)
    return f": did you mean {str(parent / near[0])!r}?" if near else f" in {str(parent.resolve())!r}"


def _files(folder: Path) -> Iterator[str]:
    """Names of files in a folder, not too many and not too deep."""
    return islice(_walk(folder, ""), _MOST_FILES)


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    for each in sorted(folder.iterdir()):
        if each.is_dir() and prefix.count("/") < _DEEPEST - 1 and each.name[0] != ".":
            yield from _walk(each, f"{prefix}{each.name}/")
        elif each.is_file():
            yield prefix + each.name
