"""Plug-in files: `./mine.py:make` is loaded under a name of its own, with its neighbours.

A file's folder is a package of its own, `treesearch_plugin_<digest of the folder>`, and the file a module in it. So a
file named json.py or numpy.py hides nothing and is hidden by nothing, and two folders may have a neighbour of one name
each. What a file imports is looked up, at any time and in any process that has loaded it, in this order: Python's own
modules, installed packages and this library; then the file's folder; then the rest of the path.

A file is executed once in a process, and again when it or a neighbour that it loaded has changed.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

HOME = "treesearch_plugin_"
OURS = frozenset(("treesearch", "backends", "rewards"))


def load_file(file: Path) -> ModuleType:
    """The module of a file; one that was loaded before is loaded again if it or a neighbour has changed.

    Raises:
        Exception: whatever the file raises.
    """
    home = _home(file.parent)
    name = f"{home}.{file.stem.replace('.', '_')}"
    if name in sys.modules and not _changed(home):
        return sys.modules[name]
    for loaded in [key for key in sys.modules if key.startswith(f"{home}.")]:
        del sys.modules[loaded]
    spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _home(folder: Path) -> str:
    """The package that stands for a folder."""
    name = HOME + hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    if name not in sys.modules:
        package = sys.modules[name] = ModuleType(name, f"Plug-ins in {folder}.")
        package.__path__ = [str(folder)]
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    return name


def _changed(home: str) -> bool:
    modules = [module for key, module in sys.modules.items() if key.startswith(f"{home}.")]
    return any(isinstance(m.__loader__, _Loader) and m.__loader__.changed() for m in modules)


class _Loader(SourceFileLoader):
    """Executes the source as it stands, with imports that look into its folder; writes no bytecode beside it."""

    seen: bytes = b""

    def get_code(self, fullname: str) -> Any:
        self.seen = self.get_data(self.path)
        return self.source_to_code(self.seen, self.path)

    def exec_module(self, module: ModuleType) -> None:
        home = module.__name__.partition(".")[0]
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": _importer(home)}
        super().exec_module(module)

    def changed(self) -> bool:
        """Whether the file is no longer what was executed."""
        try:
            return self.get_data(self.path) != self.seen
        except OSError:
            return True


class _Finder:
    """Finds the neighbours of plug-ins, below the packages that stand for their folders."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(HOME) or path is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


_FINDER = _Finder()


def _importer(home: str) -> Callable[..., ModuleType]:
    """`__import__` for the modules of a folder."""

    def find(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or _elsewhere(top, home) or importlib.util.find_spec(f"{home}.{top}") is None:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        found = importlib.import_module(f"{home}.{name}")
        if not fromlist:
            return sys.modules[f"{home}.{top}"]
        return builtins.__import__(f"{home}.{name}", globals, locals, fromlist) if hasattr(found, "__path__") else found

    return find


def _elsewhere(top: str, home: str) -> bool:
    """Whether a module is Python's, ours or an installed one's, or that very neighbour under its plain name."""
    if top in sys.stdlib_module_names or top in OURS or top.startswith(HOME) or _installed(top):
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is not None and str(Path(file).resolve().parent) in sys.modules[home].__path__


@functools.cache
def _installed(top: str) -> bool:
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return PathFinder.find_spec(top, folders) is not None
