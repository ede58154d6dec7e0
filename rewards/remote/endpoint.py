"""A JSON endpoint asked politely: time-outs, retries with growing pauses, credentials from the environment.

    pause after attempt k = max(backoff 2^(k-1) u, Retry-After),  u uniform in [0.5, 1.5], k = 1, 2, ...

Asked again: 408, 425, 429, every 5xx, time-outs and broken connections. Everything else is an error at once.
Credentials are read when a request is sent, on the machine that sends it: an `Endpoint` holds only the name of the
variable, and every error passes through `Endpoint.error`, which strikes their value out of what came, with all of the
URL that may be a key.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from treesearch.rewards.base import RewardError
from treesearch.rewards.numeric import is_number
from treesearch.rewards.redact import secrets_of, struck
from treesearch.rewards.remote.exchange import Answer, Exchange

Ask = Callable[[Any], Any]
"""Posts a JSON value and returns the JSON value that came back."""

Result = TypeVar("Result")

_AGAIN = {408, 425, 429}
_QUOTED = 300
MAX_BYTES = 2**24
SENT = (
    "prompts, texts and images (8-bit PNG) are sent whole, what is cut or shrunk there is not known here; answers up "
    f"to {MAX_BYTES // 2**20} MiB (max_bytes)"
)
"""What rewards behind an endpoint take, `Facts.limits`."""


class _Trouble(NamedTuple):
    """An attempt that brought no answer."""

    what: str
    again: bool
    retry_after: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to post, and how patiently.

    Args:
        url: http or https; what may be a key in its path and query is never shown, see `rewards.redact`.
        token_env: name of the environment variable with the credentials, None to send none.
        token_header: header that carries them, as "Bearer ..." in Authorization and bare in any other.
        timeout: seconds of one request, from the name of the host to the last byte of the answer.
        max_bytes: of one answer, after decompression.
        retries: attempts after the first.
        backoff: seconds before the first retry; each further pause is twice as long.
        max_pause: longest pause in seconds; an endpoint that asks for more is given up.
        concurrency: requests under way at once, in each process that scores.

    Raises:
        ValueError: a URL without host or with a user name, or a number out of range.
    """

    url: str = field(repr=False)
    token_env: str | None = None
    token_header: str = "Authorization"
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 0.5
    max_pause: float = 60.0
    concurrency: int = 4
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            _ = parts.port
        except ValueError as error:  # it repeats what stands there, which may be a password
            wrong = "out of range" if "out of range" in str(error) else "that is no number"
            raise ValueError(f"expected a port of 0 to 65535 in the url, got one {wrong}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected a url such as http://localhost:8000/score, got one without scheme or host")
        if parts.username or parts.password:
            raise ValueError(
                "the url holds a user name or password: put the credentials in an environment variable "
                "and give its name as token_env"
            )
        for name in ("timeout", "max_pause", "concurrency", "max_bytes"):
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a positive number")
        for name in ("retries", "backoff"):
            if not is_number(getattr(self, name), 0):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected 0 or more")

    @property
    def host(self) -> str:
        """Host and port: what errors and names show of the URL."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)

    def map(self, task: Callable[[Ask, Sequence[int]], Result], batches: Sequence[Sequence[int]]) -> list[Result]:
        """[task(ask, rows) for rows in batches], several at a time; the first failure stops the others.

        Raises:
            RewardError: a task failed, with the rows of its batch.
            ImportError: httpx2 is not installed.
        """
        if not batches:
            return []
        stop, exchange = Event(), Exchange(self._headers(), self.timeout, self.max_bytes)
        ask = functools.partial(self._ask, exchange, stop)
        futures = [Future[Result]() for _ in batches]
        waiting: SimpleQueue[tuple[Future[Result], Sequence[int]]] = SimpleQueue()
        try:
            for job in zip(futures, batches, strict=True):
                waiting.put(job)
            for _ in range(min(self.concurrency, len(batches))):
                Thread(target=_work, args=(waiting, lambda rows: task(ask, rows)), daemon=True).start()
            _raise_first(futures, _finished(futures), batches)
            return [future.result() for future in futures]
        finally:
            stop.set()
            for future in futures:
                future.cancel()
            exchange.close()

    def error(self, text: str, rows: Sequence[int] = ()) -> RewardError:
        """An error that names the host and holds no credentials, even where an answer repeated them."""
        return RewardError(self._struck(f"{self.host} {text}"), rows)

    def quote(self, value: Any) -> str:
        """What came, short enough for an error; credentials are struck out first, since a cut could hide their rest."""
        text = self._struck(value if isinstance(value, str) else json.dumps(value))
        return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + " ...")

    def _ask(self, exchange: Exchange, stop: Event, payload: Any) -> Any:
        """The answer to one request, asked for as often as allowed."""
        content, attempt = json.dumps(payload, allow_nan=False).encode(), 1
        while isinstance(answer := self._attempt(exchange, content), _Trouble):
            if not answer.again:
                raise self.error(f"refused a request: {answer.what}")
            if answer.retry_after > self.max_pause:
                asked = f"it asks for a pause of {answer.retry_after:g} s, more than max_pause = {self.max_pause:g}"
                raise self.error(f"is busy: {answer.what}; {asked}")
            if attempt > self.retries or stop.is_set():
                tried = "1 attempt" if attempt == 1 else f"{attempt} attempts"
                raise self.error(f"gave no answer in {tried}, last error: {answer.what}: is the endpoint up?")
            pause(stop, max(self._backoff(attempt), answer.retry_after))
            attempt += 1
        return answer

    def _attempt(self, exchange: Exchange, content: bytes) -> Any:
        """The JSON value that came back, or `_Trouble`."""
        import httpx2

        try:
            answer = exchange.post(self.url, content)
        except TimeoutError:
            return _Trouble(f"no whole answer within timeout = {self.timeout:g} s", again=True)
        except httpx2.RequestError as error:
            return _Trouble(f"{type(error).__name__}: {error}", again=True)
        except ValueError as error:
            return _Trouble(f"it sent {error}", again=False)
        return self._read(answer)

    def _read(self, answer: Answer) -> Any:
        text, status = answer.body.decode("utf-8", "replace"), answer.status
        if status in _AGAIN or status >= 500:
            return _Trouble(f"HTTP {status} {self.quote(text)}", True, _seconds(answer.headers.get("Retry-After")))
        if status != 200:
            return _Trouble(f"HTTP {status} {self.quote(text)}{self._advice(status)}", again=False)
        if not answer.whole:
            return _Trouble(f"its answer has more than max_bytes = {self.max_bytes} bytes", again=False)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return _Trouble(f"expected JSON, got {self.quote(text)}", again=False)

    def _backoff(self, attempt: int) -> float:
        """Seconds before the next attempt; the jitter keeps many workers from coming back together."""
        return min(self.backoff * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5), self.max_pause)

    def _headers(self) -> dict[str, str]:
        """The header with the credentials, where some are asked for.

        Raises:
            RewardError: the variable is not set, or holds what a header cannot carry.
        """
        if self.token_env is None:
            return {}
        token = os.environ.get(self.token_env, "").strip()
        if not token:
            raise self.error(f"needs credentials: set the environment variable {self.token_env}")
        if not (token.isascii() and token.isprintable()):
            raise self.error(f"takes a header, and the value of {self.token_env} has characters that none can carry")
        return {self.token_header: f"Bearer {token}" if self.token_header.lower() == "authorization" else token}

    def _struck(self, text: str) -> str:
        """The text without the credentials and without what may be a key in the URL."""
        token = os.environ.get(self.token_env, "").strip() if self.token_env else ""
        return struck(text, [token, *secrets_of(self.url)])

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            found = f"check the environment variable {self.token_env}" if self.token_env else "give token_env"
            return f": {found}"
        if status == 413:
            return ": send less at once, with a smaller batch_size"
        return ": check the path of the url" if status in (404, 405) or 300 <= status < 400 else ""


def address(url: str | None, url_env: str | None) -> str:
    """A URL that is given, or held by an environment variable.

    Raises:
        ValueError: neither, both, or a variable that is not set.
    """
    if (url is None) == (url_env is None):
        raise ValueError(f"got {'no url' if url is None else 'a url and url_env'}: give one, url or url_env")
    found = url if url_env is None else os.environ.get(url_env, "").strip()
    if not found:
        raise ValueError(f"no url: set the environment variable {url_env}" if url_env else "expected a url, got ''")
    return found


def pause(stop: Event, seconds: float) -> None:
    """Wait, unless another request has failed for good."""
    stop.wait(seconds)


def _work(waiting: SimpleQueue[tuple[Future[Result], Sequence[int]]], task: Callable[[Sequence[int]], Result]) -> None:
    """Do what waits, until nothing does; an interrupted search leaves this thread behind, which ends by itself."""
    while True:
        try:
            future, rows = waiting.get_nowait()
        except Empty:
            return
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(task(rows))
        except (Exception, asyncio.CancelledError) as error:
            future.set_exception(error)


def _finished(futures: Sequence[Future[Any]]) -> set[Future[Any]]:
    """Those that are done once all are, or one of them failed."""
    while True:
        # In short waits: a signal that comes just before a wait begins does not end it.
        done, left = wait(futures, timeout=1.0, return_when=FIRST_EXCEPTION)
        if not left or any(future.exception() is not None for future in done):
            return done


def _raise_first(futures: list[Future[Any]], done: set[Future[Any]], batches: Sequence[Sequence[int]]) -> None:
    for future, rows in zip(futures, batches, strict=True):
        error = future.exception() if future in done else None
        if isinstance(error, RewardError):
            raise RewardError(str(error), rows)
        if error is not None:
            raise error


def _seconds(retry_after: str | None) -> float:
    """Seconds a Retry-After header asks for, given as a number or a date; 0 where there is none."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
