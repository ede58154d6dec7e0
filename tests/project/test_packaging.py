"""One name a module: the wheel holds what a checkout imports, in one top-level package, with weights and types."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.project.test_imports import MODULES, SOURCES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        archive.extractall(folder / "site")
    assert len(names) == len(set(names)), "a file is in the wheel twice"
    return folder / "site"


def test_the_wheel_has_one_package_and_every_module_of_the_checkout(wheel):
    assert {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")} == {"treesearch"}
    files = {path.relative_to(wheel).with_suffix("") for path in wheel.rglob("*.py")}
    assert {".".join(file.parts).removesuffix(".__init__") for file in files} == MODULES
    assert len(SOURCES) == len(MODULES)


def test_the_wheel_brings_weights_and_types(wheel):
    for folder in ("backends", "rewards"):
        weights = {path.name for path in (ROOT / folder / "weights").glob("*.safetensors")}
        assert weights
        assert weights == {path.name for path in (wheel / "treesearch" / folder / "weights").glob("*.safetensors")}
    assert {path.parent.name for path in wheel.rglob("py.typed")} == {"treesearch", "backends", "rewards"}


def test_the_wheel_brings_the_live_page(wheel):
    static = Path("treesearch/page/static")
    files = {path.name for path in (ROOT / static).iterdir()}
    assert {"index.html", "app.js", "style.css"} <= files
    assert files == {path.name for path in (wheel / static).iterdir()}


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    code = (
        "import treesearch as ts, treesearch.backends.exact.gaussian as g, sys; "
        "r = ts.search(g.LinearGaussian(), lambda x: x.sum(1), ts.BestOfN(n=2)); "
        "print(len(r.rewards), g.__file__, 'backends' in sys.modules)"
    )
    env = {
        "PYTHONPATH": str(wheel),
        "PATH": "",
        "HOME": str(tmp_path),
        "NUMBA_DISABLE_JIT": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.stdout.split() == ["2", str(wheel / "treesearch/backends/exact/gaussian.py"), "False"], run.stderr


def test_the_oldest_versions_are_the_floors():
    """What `make test-oldest` installs is what pyproject.toml allows; torch has its pin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    told = [*project["dependencies"], *project["optional-dependencies"]["ray"]]
    floors = {name: _release(low) for name, low in (each.split(">=") for each in told)}
    lines = (ROOT / "constraints-oldest.txt").read_text("utf-8").splitlines()
    oldest = {
        name: _release(version) for name, _, version in (line.partition("==") for line in lines if line[0] != "#")
    }
    assert oldest.keys() == floors.keys()
    assert {name: oldest[name] for name in floors if name != "torch"} == {
        k: v for k, v in floors.items() if k != "torch"
    }
    assert oldest["torch"] >= floors["torch"]


def _release(version):
    """A version as three numbers."""
    return tuple([*map(int, version.split(".")), 0, 0][:3])
