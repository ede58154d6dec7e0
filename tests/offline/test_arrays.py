"""Data files of others: nothing but their own numbers is read, and no more than allowed."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from treesearch.offline import arrays
from treesearch.offline.arrays import ForeignFile, check_hdf5, read_hdf5, read_npz


def npy(header: str, data: bytes) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    ("member", "what"),
    [
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }", b"1234"), "another size"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem"), "Python objects"),
        (npy("{'descr': '|S4', 'fortran_order': False, 'shape': (1,), }", b"1234"), "expected plain numbers"),
        (npy("{'descr': '<f8'" + " " * 60_000 + "}", b""), "no npz file"),
        (b"cposix\nsystem\n", "no npz file"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (40000,), }", b"\0" * 320_000), "at most 100000"),
    ],
)
def test_npz(tmp_path, member, what):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", member)
    with pytest.raises(ForeignFile, match=what):
        read_npz(path, most=100_000)


def test_what_is_in_order_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(6.0).reshape(2, 3), y=np.array([True]))
    assert read_npz(tmp_path / "a.npz")["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert list(read_npz(tmp_path / "a.npz", ["y", "z"])) == ["y"]
    (tmp_path / "b.npz").write_bytes(io.BytesIO(b"no zip").getvalue())
    with pytest.raises(ForeignFile, match="no npz file"):
        read_npz(tmp_path / "b.npz")


@pytest.mark.parametrize("way", ["external", "soft", "link", "virtual", "huge", "text"])
def test_hdf5(tmp_path, way, monkeypatch):
    h5py = pytest.importorskip("h5py")
    secret, path = tmp_path / "secret", tmp_path / "a.hdf5"
    secret.write_bytes(b"12345678")
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["x"] = np.arange(3.0)
    with h5py.File(path, "w") as file:
        if way == "external":
            file.create_dataset("x", (1,), "f8", external=[(str(secret), 0, 8)])
        elif way == "soft":
            file["x"] = h5py.SoftLink("/y")
        elif way == "link":
            file["x"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "x")
        elif way == "virtual":
            layout = h5py.VirtualLayout((3,), "f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "x", (3,))
            file.create_virtual_dataset("x", layout)
        elif way == "huge":
            file.create_dataset("x", (10**15,), "f8", chunks=(1000,))
        else:
            file["x"] = "text"
    with pytest.raises(ForeignFile):
        read_hdf5(path, ["x"])
    if way != "text":
        with pytest.raises(ForeignFile):
            check_hdf5(path)
    monkeypatch.setattr(arrays, "_OBJECTS", 0)
    with pytest.raises(ForeignFile):
        check_hdf5(tmp_path / "other.hdf5")
    assert read_hdf5(tmp_path / "other.hdf5", ["x", "y"])["x"].tolist() == [0, 1, 2]
