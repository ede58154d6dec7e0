"""HTTP requests that can be given up at any moment: a limit on seconds, a limit on bytes, and an end at once.

Requests run in the event loop of a thread of their own: there, unlike in a thread that waits for a socket, every wait
(for a name, a connection, headers, a body that drips) can be cancelled. The end of a process waits for no thread.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread, current_thread
from typing import Any, NamedTuple

_NAME = "treesearch.rewards.remote.exchange"


def _of_others(record: logging.LogRecord) -> bool:
    """httpx2 logs the URL of each request, which may hold a key: not of ours."""
    return current_thread().name != _NAME


logging.getLogger("httpx2").addFilter(_of_others)


class Answer(NamedTuple):
    """What came: `whole` is False where the body went over the limit and was cut there."""

    status: int
    headers: Any
    body: bytes
    whole: bool


class Exchange:
    """Posts from several threads, until it is closed.

    Args:
        headers: of every request.
        seconds: of a request, from the name of the host to the last byte of the answer.
        most: bytes of an answer, after decompression.

    Raises:
        ImportError: httpx2 is not installed.
    """

    def __init__(self, headers: dict[str, str], seconds: float, most: int) -> None:
        self._headers = headers | {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._client, self._seconds, self._most = _client(), seconds, most
        self._loop, self._lock, self._open = asyncio.new_event_loop(), Lock(), True
        self._asked: set[Future[Answer]] = set()
        self._thread = Thread(target=self._run, name=_NAME, daemon=True)
        self._thread.start()

    def post(self, url: str, content: bytes) -> Answer:
        """The answer to one request, whatever its status.

        Raises:
            TimeoutError: it took too long.
            httpx2.RequestError: no connection, or one that broke.
            ValueError: a body that cannot be decompressed.
            CancelledError: the exchange was closed.
        """
        with self._lock:
            if not self._open:
                raise asyncio.CancelledError
            asked = asyncio.run_coroutine_threadsafe(self._post(url, content), self._loop)
            self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)
        return asked.result()

    def close(self) -> None:
        """Give up what is under way."""
        with self._lock:
            self._open = False
            for asked in list(self._asked):
                asked.cancel()
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1.0)

    async def _post(self, url: str, content: bytes) -> Answer:
        async with (
            asyncio.timeout(self._seconds),
            self._client.stream("POST", url, content=content, headers=self._headers) as response,
        ):
            unpack, body = _unpacker(response.headers.get("Content-Encoding", "")), bytearray()
            async for part in response.aiter_raw():
                body += unpack(part, self._most + 1 - len(body))
                if len(body) > self._most:
                    return Answer(response.status_code, response.headers, bytes(body[: self._most]), whole=False)
            return Answer(response.status_code, response.headers, bytes(body), whole=True)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _end(self) -> None:
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)  # cancelled ones
        await self._client.aclose()


def _unpacker(encoding: str) -> Callable[[bytes, int], bytes]:
    """(part of a body, most bytes wanted) -> bytes; compression was not asked for, but some send it all the same.

    Raises:
        ValueError: a way to compress that is not gzip or deflate.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return lambda part, most: part
    if name not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"Content-Encoding {encoding[:40]!r}, which was not asked for")
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either header

    def more(part: bytes, most: int) -> bytes:
        try:
            return unpack.decompress(part, most)
        except zlib.error as error:
            raise ValueError(f"a body that is no {name}: {error}") from None

    return more


def _client() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise ImportError("rewards behind an endpoint need httpx2: pip install httpx2") from error
    return httpx2.AsyncClient(timeout=None, verify=_certificates(), limits=httpx2.Limits(max_connections=None))


@functools.cache
def _certificates() -> Any:
    """Reading the trusted certificates takes longer than most requests: once per process."""
    import httpx2

    return httpx2.create_ssl_context()
