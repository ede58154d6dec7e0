"""Ctrl-C, and whatever else a signal handler raises, at places where nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect at the end: a tree is never left half grown, a lease never half entered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def first_interrupt(stop: Callable[[], None], *, raises: bool = True) -> Iterator[None]:
    """Has a first Ctrl-C call `stop`, and a second one raise KeyboardInterrupt at once.

    Args:
        raises: whether the first raises it too, at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _First(stop, signal.getsignal(signal.SIGINT))
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        handler.over = True
        if signal.getsignal(signal.SIGINT) is handler:
            signal.signal(signal.SIGINT, handler.outside())
    if handler.came and raises:
        raise KeyboardInterrupt


class _First:
    """A handler that calls `stop` once. Of two streams read in turn the one that began first may end first."""

    def __init__(self, stop: Callable[[], None], before: Any) -> None:
        self.stop, self.before, self.came, self.over = stop, before, False, False

    def __call__(self, number: int, frame: Any) -> None:
        if self.came or self.over:
            raise KeyboardInterrupt
        self.came = True
        self.stop()

    def outside(self) -> Any:
        """The handler of before, past those that are over."""
        before = self.before
        while isinstance(before, _First) and before.over:
            before = before.before
        return signal.SIG_DFL if before is None else before


def interrupts_are_ours() -> bool:
    """Whether Ctrl-C comes to this thread and nobody has said what it does: it raises KeyboardInterrupt."""
    here = threading.current_thread() is threading.main_thread()
    return here and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextmanager
def interrupts_unwrapped() -> Iterator[None]:
    """Has what a signal handler raises inside compiled code come out as itself.

    A compiled function knows nothing of Python's exceptions: it returns its result, and Python, which finds an
    exception set beside it, reports a SystemError whose cause is that exception.
    """
    try:
        yield
    except Exception as error:
        if (found := _within(error)) is None:
            raise
        raise found from None


def _within(error: BaseException | None) -> BaseException | None:
    """The cause of a SystemError in a chain of causes."""
    while error is not None:
        if isinstance(error, SystemError) and error.__cause__ is not None:
            return error.__cause__
        error = error.__cause__
    return None
