"""Arrays of data files from outside, HDF5 and npz: plain numbers that lie in the file itself, up to a size.

Refused before anything is read: links and storage that lead to other files, arrays of Python objects, shapes that the
file does not hold, and more bytes than MOST, packed or not.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 8 * 2**30
_OBJECTS = 10**6

Array = NDArray[Any]


class ForeignFile(ValueError):
    """A data file that may not be read; the message says what it holds."""


def read_npz(path: str | os.PathLike[str], names: Iterable[str] | None = None, most: int = MOST) -> dict[str, Array]:
    """The arrays of an npz file, those of `names` that it has or all.

    Raises:
        ForeignFile: no such file, or arrays that are no plain numbers, of a wrong size or too large.
        OSError: it cannot be opened.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = members if names is None else {name: members[name] for name in names if name in members}
            _limit(path, sum(info.file_size for info in wanted.values()), most)
            for name, info in wanted.items():
                _check_member(path, name, archive, info)
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in wanted}
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise error if isinstance(error, ForeignFile) else ForeignFile(f"{path}: no npz file: {error}") from error


def _check_member(path: Any, name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        _check_numbers(path, name, dtype)
        if file.tell() + _bytes(shape, dtype) != info.file_size:
            raise ForeignFile(f"{path}: {name} says shape {shape} of {dtype}, its data have another size")


def read_hdf5(path: str | os.PathLike[str], names: Iterable[str], most: int = MOST) -> dict[str, Array]:
    """The data sets `names` at the top of an HDF5 file, those that it has.

    Raises:
        ForeignFile: links or storage that lead elsewhere, no plain numbers, or too large.
        OSError: it cannot be opened, or is no HDF5.
        ImportError: h5py is not installed.
    """
    import h5py

    with h5py.File(path, "r") as file:
        found = {name: _own(path, file, name) for name in names if name in file.keys()}  # noqa: SIM118
        for name, data in found.items():
            _check_data(path, name, data)
        _limit(path, sum(_bytes(data.shape, data.dtype) for data in found.values()), most)
        return {name: np.asarray(data) for name, data in found.items()}


def check_hdf5(path: str | os.PathLike[str], most: int = MOST) -> None:
    """See that a whole HDF5 file, which a library is to read, leads nowhere else and is not too large.

    Raises:
        ForeignFile, OSError, ImportError: as `read_hdf5`.
    """
    import h5py

    with h5py.File(path, "r") as file:
        size = 0
        for name, data in _walk(path, file):
            size += 0 if data.shape is None else _bytes(data.shape, data.dtype)
            _check_storage(path, name, data)
            _limit(path, size, most)


def _walk(path: Any, top: Any) -> Iterator[tuple[str, Any]]:
    waiting, seen = [("", top)], 0
    while waiting:
        where, group = waiting.pop()
        for name in group.keys():  # noqa: SIM118
            seen += 1
            if seen > _OBJECTS:
                raise ForeignFile(f"{path} holds more than {_OBJECTS} objects")
            item = _own(path, group, name)
            if hasattr(item, "keys"):
                waiting.append((f"{where}/{name}", item))
            elif hasattr(item, "shape"):
                yield f"{where}/{name}", item


def _own(path: Any, group: Any, name: str) -> Any:
    import h5py

    if type(group.get(name, getlink=True)) is not h5py.HardLink:
        raise ForeignFile(f"{path}: {name} is a link, which may lead to another file: copy the data into one file")
    return group[name]


def _check_data(path: Any, name: str, data: Any) -> None:
    if not hasattr(data, "shape") or data.shape is None:
        raise ForeignFile(f"{path}: {name} is no array")
    _check_storage(path, name, data)
    _check_numbers(path, name, data.dtype)


def _check_storage(path: Any, name: str, data: Any) -> None:
    if data.external or data.is_virtual:
        raise ForeignFile(f"{path}: the data of {name} lie in another file: copy them into one file")


def _check_numbers(path: Any, name: str, dtype: np.dtype[Any]) -> None:
    if dtype.hasobject or dtype.kind not in "biuf":
        hint = "; episodes of different lengths belong one after the other in flat arrays" if dtype.hasobject else ""
        what = "Python objects, which only a pickle can hold" if dtype.hasobject else f"{dtype}"
        raise ForeignFile(f"{path}: {name} holds {what}, expected plain numbers{hint}")


def _bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    size = dtype.itemsize
    for side in shape:
        size *= int(side)
    return size


def _limit(path: Any, size: int, most: int) -> None:
    if size > most:
        raise ForeignFile(f"{path} holds {size} bytes of arrays, expected at most {most}")
