"""A JSON endpoint asked politely: time-outs, retries with growing pauses, credentials from the environment.

    pause after attempt k = max(backoff 2^(k-1) u, Retry-After),  u uniform in [0.5, 1.5], k = 1, 2, ...

Asked again: 408, 425, 429, every 5xx, time-outs and broken connections. Everything else is an error at once.
Credentials are read when a request is sent, on the machine that sends it: an `Endpoint` holds only the name of the
variable, and every error passes through `Endpoint.error`, which strikes their value out of what came.
"""

from __future__ import annotations

import email.utils
import functools
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from rewards.base import RewardError

Ask = Callable[[Any], Any]
"""Posts a JSON value and returns the JSON value that came back."""

Result = TypeVar("Result")

_AGAIN = {408, 425, 429}
_QUOTED = 300


class _Trouble(NamedTuple):
    """An attempt that brought no answer."""

    what: str
    again: bool
    retry_after: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to post, and how patiently.

    Args:
        url: http or https; its path and query are never shown, but secrets belong in `token_env`.
        token_env: name of the environment variable with the credentials, None to send none.
        token_header: header that carries them, as "Bearer ..." in Authorization and bare in any other.
        timeout: seconds to connect, and between two bytes of an answer.
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

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        _ = parts.port  # raises where it is no port
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected a url such as http://localhost:8000/score, got one without scheme or host")
        if parts.username or parts.password:
            raise ValueError(
                "the url holds a user name or password: put the credentials in an environment variable "
                "and give its name as token_env"
            )
        for name in ("timeout", "max_pause", "concurrency"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("retries", "backoff"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")

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
        stop = Event()
        with _client(self._headers(), self.timeout) as client, ThreadPoolExecutor(self.concurrency) as pool:
            ask = functools.partial(self._ask, client, stop)
            futures = [pool.submit(task, ask, rows) for rows in batches]
            try:
                done = wait(futures, return_when=FIRST_EXCEPTION).done
                _raise_first(futures, done, batches)
                return [future.result() for future in futures]
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def error(self, text: str, rows: Sequence[int] = ()) -> RewardError:
        """An error that names the host and holds no credentials, even where an answer repeated them."""
        return RewardError(self._struck(f"{self.host} {text}"), rows)

    def quote(self, value: Any) -> str:
        """What came, short enough for an error; credentials are struck out first, since a cut could hide their rest."""
        text = self._struck(value if isinstance(value, str) else json.dumps(value))
        return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + " ...")

    def _ask(self, client: Any, stop: Event, payload: Any) -> Any:
        """The answer to one request, asked for as often as allowed."""
        attempt = 1
        while isinstance(answer := self._attempt(client, payload), _Trouble):
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

    def _attempt(self, client: Any, payload: Any) -> Any:
        """The JSON value that came back, or `_Trouble`."""
        import httpx2

        try:
            response = client.post(self.url, json=payload)
        except httpx2.TimeoutException as error:
            return _Trouble(f"{type(error).__name__}, nothing came for {self.timeout:g} s", again=True)
        except httpx2.RequestError as error:
            return _Trouble(f"{type(error).__name__}: {error}", again=True)
        text, status = response.text, response.status_code
        if status in _AGAIN or status >= 500:
            return _Trouble(f"HTTP {status} {self.quote(text)}", True, _seconds(response.headers.get("Retry-After")))
        if status != 200:
            return _Trouble(f"HTTP {status} {self.quote(text)}{self._advice(status)}", again=False)
        try:
            return json.loads(text)
        except ValueError:
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
        """The text without the credentials, plain or as JSON writes them."""
        token = os.environ.get(self.token_env, "").strip() if self.token_env else ""
        for form in filter(None, (token, json.dumps(token)[1:-1])):
            text = text.replace(form, "***")
        return text

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            found = f"check the environment variable {self.token_env}" if self.token_env else "give token_env"
            return f": {found}"
        if status == 413:
            return ": send less at once, with a smaller batch_size"
        return ": check the path of the url" if status in (404, 405) or 300 <= status < 400 else ""


def pause(stop: Event, seconds: float) -> None:
    """Wait, unless another request has failed for good."""
    stop.wait(seconds)


def _client(headers: dict[str, str], timeout: float) -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise ImportError("rewards behind an endpoint need httpx2: pip install httpx2") from error
    return httpx2.Client(headers=headers, timeout=timeout, verify=_certificates())


@functools.cache
def _certificates() -> Any:
    """Reading the trusted certificates takes longer than most requests: once per process."""
    import httpx2

    return httpx2.create_ssl_context()


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
