"""Signals that interrupt, kept out of the inside of locks.

Python runs a signal's handler between any two instructions of the main thread. A handler that
raises while the main thread enters or leaves a lock leaves it taken for ever, and whoever wants it
later waits for ever. GPTQModel's logger has two such places: with each line that it draws it looks
for a module that is not there (the lock of an import), and it hands lines to a thread over a queue.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# Where a lock may be held that nobody would give back.
_MODULES = ("threading", "queue", "concurrent.futures", "importlib._bootstrap", "logging")
_MODULES += ("weakref", "gptqmodel.utils.threadx")
# Waiting for another thread, which may take long, is made for being interrupted.
_WAITING = {"wait", "join", "_wait_for_tstate_lock"}
_PAUSE = 0.001  # seconds

Handler = Callable[[int, "FrameType | None"], None]


class InterruptedBy:
    """Within: ``act`` is called for these signals, once the main thread is outside of locks.

    A second signal is not put off. Does nothing in another thread than the main one, to which
    Python gives no signals, nor with a signal that a program around Python handles.

    Args:
        act: a signal handler, which may raise.
        numbers: of the signals.
        instead_of: a handler; a signal that has another one is left to that. Default: none is.
    """

    def __init__(self, act: Handler, *numbers: int, instead_of: object = None):
        self._act, self._numbers, self._instead_of = act, numbers, instead_of
        self._before: dict[int, object] = {}
        self._due: int | None = None
        self._reminded = False
        self._lock = threading.RLock()

    def __enter__(self) -> InterruptedBy:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                found = signal.getsignal(number)
                # One of no Python function (None) could not be given back.
                if found is not None and self._instead_of in (None, found):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        number = self._settled()
        if number is not None:
            self._act(number, None)

    def restore(self) -> None:
        """Leave the signals to whoever had them before; to a process of ours, none: see
        :func:`of_the_process`.
        """
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if handler is end else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        reminded, self._reminded = self._reminded, False
        if reminded and self._due is None:
            return
        if (reminded or self._due is None) and _may_hold_locks(frame) and self._put_off(number):
            return
        self._settled()
        self._act(number, frame)

    def _put_off(self, number: int) -> bool:
        self._due = number
        try:
            # A Thread would take locks, and the main thread may be inside of just these.
            _thread.start_new_thread(self._remind, ())
        except RuntimeError:  # the system gives no further thread
            return False
        return True

    def _remind(self) -> None:
        time.sleep(_PAUSE)
        with self._lock:
            if self._due is not None:
                self._reminded = True
                _thread.interrupt_main(self._due)

    def _settled(self) -> int | None:
        """What was put off; from now on nobody is reminded of it."""
        with self._lock:
            number, self._due = self._due, None
        return number


@contextlib.contextmanager
def of_the_process() -> Iterator[None]:
    """Within: SIGINT and SIGTERM end the process, until an :class:`InterruptedBy` was left.

    What the process came to is decided then: its last words and its end, which takes a while with
    torch, are not disturbed, and a second Ctrl-C does not take the exit code from a run that is
    committed. Both stay ignored, so this is for a process that does nothing else afterwards.
    """
    _set(end)
    try:
        yield
    finally:
        _set(signal.SIG_IGN)


def _set(handler: object) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)


def end(number: int, frame: FrameType | None) -> None:
    """A handler: leave, and clear up on the way, with the code that a shell gives to this signal.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(128 + number)


def ctrl_c_outside_of_locks() -> InterruptedBy:
    """Within: Ctrl-C raises KeyboardInterrupt as ever, but outside of locks."""
    ever = signal.default_int_handler
    return InterruptedBy(ever, signal.SIGINT, instead_of=ever)


def _may_hold_locks(frame: FrameType | None) -> bool:
    if frame is None:
        return False
    if _is_of(frame, _MODULES):
        return frame.f_code.co_name not in _WAITING
    # Of what is called there no more than one step: the end of a context may be a long work.
    entered_by = {one.f_code.co_name for one in (frame, frame.f_back) if one is not None}
    return bool(entered_by & {"__enter__", "__exit__"}) or _is_freeing(frame)


def _is_freeing(frame: FrameType | None) -> bool:
    """Whether Python calls it because it frees something, and would lose what it raises."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or _is_of(frame, ("weakref",)):
            return True
        frame = frame.f_back
    return False


def _is_of(frame: FrameType, modules: tuple[str, ...]) -> bool:
    module = frame.f_globals.get("__name__") or ""
    return any(module == name or module.startswith(f"{name}.") for name in modules)
