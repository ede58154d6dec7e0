"""Files of a folder that somebody else may have made: no link is followed for writing, no file is left half written.

    replacing    a new file under a name nobody can guess, moved into place when it is whole (a link is replaced itself)
    in_place     a file that grows or changes where it lies, opened without following links
    reading      a regular file of bounded size; what would block or never end (pipes, devices) is refused

Only calls that every platform has are needed; what a platform adds (O_NOFOLLOW, fdatasync) is used where it is there.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_COMMON = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


def reading(path: Path, limit: int | None = None) -> BinaryIO:
    """A regular file, opened for reading, unbuffered.

    Raises:
        OSError: it is none, or longer than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | _COMMON)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        if limit is not None and found.st_size > limit:
            raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, more than the {limit} expected", os.fspath(path))
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def in_place(path: Path, *, new: bool = False) -> BinaryIO:
    """A file of a folder for reading and writing where it lies, unbuffered; made if it is not there.

    Args:
        new: whatever stood there, a link included, gives way to an empty file.

    Raises:
        OSError: it is a link, shared with another name, or no regular file.
    """
    if new:
        path.unlink(missing_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link, which is not written through: remove it", os.fspath(path))
    flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0)
    descriptor = os.open(path, flags | _NOFOLLOW | _COMMON, 0o666)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        if found.st_nlink > 1:
            raise OSError(errno.EMLINK, "another name shares its content (a hard link): copy it", os.fspath(path))
        return os.fdopen(descriptor, "r+b", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def write_at(file: BinaryIO, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at a place of a file."""
    view = memoryview(data)
    file.seek(offset)
    while view:
        view = view[file.write(view) :]


def sync(file: BinaryIO) -> None:
    """Force what was written to the disk; the times of a file may follow later."""
    getattr(os, "fdatasync", os.fsync)(file.fileno())


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch file beside `path`, with its suffix, that takes its place once it is written.

    Raises:
        OSError: the folder is missing or not writable.
    """
    path = Path(path)
    scratch = path.with_name(f".{secrets.token_hex(6)}-{path.name}"[:200] + path.suffix)
    try:
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _COMMON, 0o666))
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file atomically."""
    with replacing(path) as scratch:
        descriptor = os.open(scratch, os.O_WRONLY | _COMMON)
        try:
            view = memoryview(text.encode())
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2))


def subfolder(path: Path) -> Path:
    """A folder within a run folder, made if it is not there.

    Raises:
        OSError: it is a link: what is written into it would land elsewhere.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link, which is not written through: remove it", os.fspath(path))
    path.mkdir(parents=True, exist_ok=True)
    return path


def same(path: Path, file: BinaryIO) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file.fileno()))
    except (OSError, ValueError):
        return False
