"""The site holds files where the repository has them, so that a link that works on GitHub works on the site.

mkdocs calls `on_files`; whatever a page links to comes along, a page or a file, and what that links to. Pages of the
API are made from the tables of names, so that none is forgotten. Notebooks are kept without outputs, and run here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = tuple(f"docs/{folder}*.md" for folder in ("", "adr/", "api/"))
START = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES, "docs/notebooks/*.ipynb")
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)")


def reached(root: Path) -> list[str]:
    """Paths from the root of all that the pages of `START` lead to, the pages themselves included."""
    todo = [path for pattern in START for path in sorted(root.glob(pattern))]
    seen = dict.fromkeys(todo)
    while todo:
        page = todo.pop()
        if page.suffix not in (".md", ".ipynb"):
            continue
        for target in LINK.findall(page.read_text("utf-8")):
            linked = (page.parent / target).resolve()
            if linked.is_file() and linked.is_relative_to(root) and linked not in seen:
                seen[linked] = None
                todo.append(linked)
    return [path.relative_to(root).as_posix() for path in seen]


def api() -> dict[str, str]:
    """Pages of the API that are lists of names: their paths, and what they hold for mkdocstrings."""
    sys.path.insert(0, str(ROOT))
    from treesearch.backends import KERNELS
    from treesearch.methods import METHODS
    from treesearch.rewards import REWARDS

    tables = {
        "methods": ("Methods", {name: f"{found.__module__}.{name}" for name, found in METHODS.items()}),
        "kernels": ("Kernels and guides", {name: _home("backends", at) for name, (at, _) in KERNELS.items()}),
        "rewards": ("Rewards", {name: _home("rewards", at) for name, (at, _) in REWARDS.items()}),
    }
    return {f"docs/api/{page}.md": _listed(title, names) for page, (title, names) in tables.items()}


def _home(folder: str, at: str) -> str:
    return f"treesearch.{folder}.{at.replace(':', '.')}"


def _listed(title: str, names: dict[str, str]) -> str:
    entry = "## `{}`\n\n::: {}\n    options: {{show_root_toc_entry: false}}"
    return "\n\n".join([f"# {title}", *(entry.format(name, home) for name, home in names.items())])


class Notebook(File):
    """A notebook, which is a page."""

    def is_documentation_page(self) -> bool:
        return True


def executed(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook that was run in an empty folder, as Markdown, and its pictures by their paths beside it."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    book = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(book, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _lasting(output)]
    names = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    text, made = MarkdownExporter().from_notebook_node(book, names)
    return text, made["outputs"]


def _lasting(output: Any) -> bool:
    """Whether a cell printed it or ends in it: lines of progress do neither."""
    return output.output_type == "execute_result" or output.get("name") == "stdout"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in reached(ROOT):
        if path.endswith(".ipynb"):
            _append_notebook(files, config, path)
        else:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path, content in api().items():
        files.append(File.generated(config, path, content=content))
    return files


def _append_notebook(files: Files, config: MkDocsConfig, path: str) -> None:
    text, pictures = executed(ROOT / path)
    files.append(Notebook.generated(config, path, content=text))
    for name, picture in pictures.items():
        files.append(File.generated(config, f"{Path(path).parent.as_posix()}/{name}", content=picture))
