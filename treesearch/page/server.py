"""The page's addresses.

/                    the page        /static/...          its script and style
/api/runs            the list        /api/about?run=      what was asked
/api/events?run=     server-sent: a `state` event whenever something changed
/api/nodes?run=&task=&since=     /api/values?run=&task=      columns as bytes
/api/summary?run=&task=          /api/gallery?run=&task=     JSON
/api/leaf?run=&task=&node=       /api/picture?run=&task=&node=
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treesearch.errors import StoreError, missing
from treesearch.page import listing, pictures
from treesearch.page.guard import Guard
from treesearch.page.view import View

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

STATIC = Path(__file__).parent / "static"
POLL, BEAT = 0.25, 15.0  # seconds between two looks at a run, and between two signs of life
OPENED = 8  # runs whose tables stay in memory


class Runs:
    """The runs below a folder, and views of those that were looked at last.

    Args:
        root: the folder, or a run folder itself.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._views: OrderedDict[str, View] = OrderedDict()

    def view(self, name: str) -> View:
        """A run by its name in the list: no other path is opened.

        Raises:
            LookupError: there is none of that name.
        """
        with self._lock:
            found = self._views.pop(name, None)
            if found is None:
                folders = listing.folders(self.root)
                if name not in folders:
                    raise LookupError("there is no such run")
                found = View(folders[name])
            self._views[name] = found
            while len(self._views) > OPENED:
                self._views.popitem(last=False)
            return found

    def state(self, name: str, since: int) -> dict[str, Any]:
        """What changes with every wave of a run; see `View.state`."""
        return self.view(name).state(since)


def make_app(root: str | Path, token: str | None = None) -> ASGIApp:
    """The page over the runs below a folder, as an ASGI application.

    Args:
        root: the folder, or a run folder itself.
        token: see `treesearch.page.guard.Guard`.

    Raises:
        ImportError: starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import FileResponse, Response, StreamingResponse
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles
    except ImportError as error:
        raise missing("starlette", "page") from error
    runs = Runs(Path(root))

    def answering(make: Callable[[Request], Any]) -> Callable[[Request], Response]:
        """An address whose answer is made in a thread."""

        def answer(request: Request) -> Response:
            try:
                found = make(request)
            except LookupError as error:
                return _json({"error": str(error)}, 404)
            except ValueError as error:
                return _json({"error": str(error)}, 400)
            except StoreError as error:
                return _json({"error": str(error)}, 409)
            if isinstance(found, bytes):
                kind = "image/png" if request.url.path.endswith("picture") else "application/octet-stream"
                return Response(found, media_type=kind)
            return Response(status_code=404) if found is None else _json(found)

        return answer

    def _json(value: Any, status: int = 200) -> Response:
        return Response(_text(value), status, media_type="application/json")

    def view(request: Request) -> View:
        return runs.view(request.query_params.get("run", ""))

    def number(request: Request, name: str) -> int:
        return int(request.query_params.get(name, "0"))

    def of_task(ask: Callable[[View, int], Any]) -> Callable[[Request], Any]:
        return lambda request: ask(view(request), number(request, "task"))

    def of_node(ask: Callable[[View, int, int], Any]) -> Callable[[Request], Any]:
        return lambda request: ask(view(request), number(request, "task"), number(request, "node"))

    async def index(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def events(request: Request) -> Response:
        name = request.query_params.get("run", "")
        return StreamingResponse(_events(runs, name), media_type="text/event-stream")

    addresses: dict[str, Callable[[Request], Any]] = {
        "runs": lambda request: {"root": str(runs.root.resolve()), "runs": listing.listed(runs.root)},
        "about": lambda request: view(request).about(),
        "nodes": lambda request: view(request).nodes(number(request, "task"), number(request, "since")),
        "values": of_task(View.values),
        "summary": of_task(View.summary),
        "gallery": of_task(pictures.gallery),
        "leaf": of_node(pictures.leaf),
        "picture": of_node(pictures.picture),
    }
    routes: list[Any] = [
        Route("/", index),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/api/events", events),
    ]
    routes += [Route(f"/api/{name}", answering(make)) for name, make in addresses.items()]
    return Guard(Starlette(routes=routes), token)


async def _events(runs: Runs, name: str) -> AsyncIterator[str]:
    """`state` events of a run whenever something changed; `gone` where it cannot be read, and why."""
    waves, last, quiet = 0, "", 0.0
    while True:
        try:
            found = await asyncio.to_thread(runs.state, name, waves)
        except (LookupError, StoreError) as error:
            yield _event("gone", _text({"error": str(error)}))
            return
        told = _text(found)
        if told != last:
            yield _event("state", told)
            waves, quiet = found["waves"], 0.0
            last = _text(found | {"since": waves, "history": {name: [] for name in found["history"]}})
        elif quiet >= BEAT:
            yield ": \n\n"
            quiet = 0.0
        await asyncio.sleep(POLL)
        quiet += POLL


def _event(kind: str, data: str) -> str:
    return f"event: {kind}\ndata: {data}\n\n"


def _text(value: Any) -> str:
    """JSON of ASCII alone, so that no text of a run breaks out of it; what is not finite is null."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:  # a folder of others may hold what no search writes
        return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
