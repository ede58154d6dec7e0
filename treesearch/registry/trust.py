"""Whose words a run folder's command is: what was typed by this user may be done again, what others wrote may not.

`command.json` says how to make a run's kernel and reward, which may run code. It is this user's own where it carries a
mark made with a key that only this user can read, and the folder belongs to this user. Anything else (a folder that
was downloaded, unpacked, copied from another machine, or edited) is somebody's: it is followed only as far as it names
what ships with this library; `--trust` follows it further.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from treesearch.errors import StoreError
from treesearch.registry import expressions

# Registered names that read a file, fetch weights or ask a service: what they do is decided by what they are told.
REACHING = frozenset(
    (
        "diffusers",
        "masked_text",
        "small_text",
        "trajectories",
        "policy",
        "restoration",
        "spd",
        "multitask",
        "student",
        "lacon",
        "hspace",
        "memory",
        "clamp",
        "regional",
        "diffeditor",
        "edited",
        "image_reward",
        "clip_score",
        "pickscore",
        "hps",
        "aesthetic",
        "image_classifier",
        "perplexity",
        "ngrams",
        "text_classifier",
        "acceptability",
        "sentiment",
        "toxicity",
        "json_schema",
        "scaffold",
        "vlm_judge",
        "http",
        "critic",
        "policy_likelihood",
        "dynamics_consistency",
        "measurement",
        "masked",
        "frequencies",
        "matrix",
    )
)


def signed(command: Mapping[str, Any]) -> dict[str, Any]:
    """The command with this user's mark; without one where no key can be kept."""
    key = next(_keys(), None)
    return dict(command) | ({} if key is None else {"mark": _mark(command, key)})


def check(path: Path, command: Mapping[str, Any], wanted: Sequence[str]) -> None:
    """See that the parts of a run's command that are to be built may be.

    Raises:
        StoreError: the folder is not this user's own and they reach beyond this library; the message names what.
    """
    if _own(path, command):
        return
    if reaching := [name for part in wanted for name in reaches(command[part])]:
        raise StoreError(
            f"{path} was not made by you on this machine, and to go on it would load {', '.join(reaching)}: "
            "look at what that is, then add --trust, or say with --kernel and --reward what to use instead"
        )


def reaches(spec: str) -> list[str]:
    """Plug-ins and registered names of an expression that reach beyond this library."""
    return expressions.plugins_in(spec) + [name for name in expressions.names_in(spec) if name in REACHING]


def _own(path: Path, command: Mapping[str, Any]) -> bool:
    mark = command.get("mark")
    if hasattr(os, "geteuid") and os.stat(path).st_uid != os.geteuid():
        return False
    return isinstance(mark, str) and any(
        hmac.compare_digest(mark.encode("utf-8", "replace"), _mark(command, key).encode()) for key in _keys()
    )


def _mark(command: Mapping[str, Any], key: bytes) -> str:
    text = json.dumps([command["kernel"], command["reward"]])
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _keys() -> Iterator[bytes]:
    """This user's keys, the one to sign with first; kept in the home folder, else among temporary files."""
    for place in _places():
        try:
            yield _key(place)
        except OSError:
            continue


def _places() -> Iterator[Path]:
    state = os.environ.get("XDG_STATE_HOME")
    with suppress(RuntimeError):  # no home
        yield (Path(state) if state else Path.home() / ".local" / "state") / "treesearch"
    yield Path(tempfile.gettempdir()) / f"treesearch-{getattr(os, 'geteuid', int)()}"


def _key(folder: Path) -> bytes:
    """The key in a folder, made where there is none.

    Raises:
        OSError: it cannot be kept there, or others could have written it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / "key"
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(file)
    with os.fdopen(handle, "wb") as made:
        made.write(secrets.token_bytes(32))
    return _read(file)


def _read(file: Path) -> bytes:
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(handle, "rb") as opened:
        about, key = os.fstat(handle), opened.read(64)
    if len(key) != 32 or (hasattr(os, "geteuid") and (about.st_uid != os.geteuid() or about.st_mode & 0o077)):
        raise OSError(f"{file} is not this user's own key")
    return key
