"""Handlers of signals for as long as something runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def handled(
    handler: Callable[[int, FrameType | None], None], *numbers: int, instead_of: object = None
) -> Iterator[None]:
    """Within: ``handler`` is called for these signals.

    Does nothing in another thread than the main one, to which Python gives no signals, nor with a
    signal that a program around Python handles.

    Args:
        handler: may raise.
        numbers: of the signals.
        instead_of: a handler; a signal that has another one is left to that. Default: none is.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            found = signal.getsignal(number)
            # One of no Python function (None) could not be given back.
            if found is not None and instead_of in (None, found):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def terminated(number: int, frame: FrameType | None) -> None:
    """A handler: leave, and clear up on the way, with the code that a shell gives to this signal.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(128 + number)
