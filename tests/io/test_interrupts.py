"""An interrupt leaves no lock taken, is not lost, and does not wait for what takes long."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest
from logbar.buffer import QueueingStdout

from epmq_gptq.io.console import HostOutput
from epmq_gptq.io.interrupts import InterruptedBy, ctrl_c_outside_of_locks, of_the_process


class Told(BaseException):
    pass


def tell(*_) -> None:
    raise Told


def told() -> InterruptedBy:
    return InterruptedBy(tell, signal.SIGTERM)


def pause() -> None:
    """Long enough for what was put off."""
    for _ in range(200):
        time.sleep(0.005)


class Lock:
    """A lock during whose ``moment`` the signal comes."""

    def __init__(self, moment: str, times: int = 1, number: int = signal.SIGTERM):
        self.moment, self.times, self.number = moment, times, number
        self.real = threading.Lock()

    def __enter__(self):
        self.real.acquire()
        for _ in range(self.times if self.moment == "__enter__" else 0):
            signal.raise_signal(self.number)

    def __exit__(self, *_):
        for _ in range(self.times if self.moment == "__exit__" else 0):
            signal.raise_signal(self.number)
        self.real.release()


@pytest.mark.parametrize("moment", ["__enter__", "__exit__"])
def test_a_lock_that_is_entered_or_left(moment):
    lock = Lock(moment)
    with pytest.raises(Told), told():
        with lock:
            pass
        assert not lock.real.locked()
        pause()
        raise AssertionError("it was lost")
    assert not lock.real.locked()


@pytest.mark.parametrize("moment", ["beginning", "end"])
def test_a_lock_within_a_generator(moment):
    lock = threading.Lock()

    @contextlib.contextmanager
    def held():
        lock.acquire()
        if moment == "beginning":
            signal.raise_signal(signal.SIGTERM)
        try:
            yield
        finally:
            if moment == "end":
                signal.raise_signal(signal.SIGTERM)
            lock.release()

    with pytest.raises(Told), told():
        with held():
            pass
        assert not lock.locked()
        pause()
        raise AssertionError("it was lost")


def test_the_end_of_a_context_that_takes_long():
    """A save flushes and moves its files there."""

    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it was put off")

    @contextlib.contextmanager
    def saved():
        yield
        work()

    with pytest.raises(Told), told(), saved():
        pass


def in_module(name: str, function: str):
    """A function of that name and module, in which the signal comes."""
    space = {"__name__": name, "raise_signal": signal.raise_signal, "done": []}
    exec(f"def {function}():\n raise_signal({int(signal.SIGTERM)})\n done.append(1)", space)
    return space[function], space["done"]


@pytest.mark.parametrize(
    "module",
    ["threading", "queue", "concurrent.futures.thread", "importlib._bootstrap", "logging"],
)
def test_modules_that_hold_locks(module):
    function, done = in_module(module, "acquire")
    with pytest.raises(Told), told():
        function()
        pause()
    assert done
    function, done = in_module(module, "wait")
    with pytest.raises(Told), told():
        function()
    assert not done
    function, done = in_module(f"my.{module}", "acquire")
    with pytest.raises(Told), told():
        function()
    assert not done


def test_where_it_was_raised_at_once():
    """What this is for: without it the lock stays taken."""
    lock = Lock("__enter__")
    before = signal.signal(signal.SIGTERM, tell)
    try:
        with pytest.raises(Told), lock:
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert lock.real.locked()


def test_a_queue():
    """The signal comes while the queue's lock is taken, in frames of its own."""
    lines: queue.Queue[str] = queue.Queue()
    lock = Lock("__exit__")
    lines.not_full._lock = lock
    with pytest.raises(Told), told():
        lines.put("a line")
        pause()
    assert not lock.real.locked()
    assert lines.unfinished_tasks == 1


def test_lines_for_gptqmodels_logger():
    """The logger's own queue, at moments that nobody chooses."""
    interrupted = 0
    for round_ in range(120):
        output = HostOutput()  # the queue has a weak reference only
        lines = QueueingStdout(output)
        with InterruptedBy(tell, signal.SIGALRM):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 3e-6 * round_)
                while True:
                    lines.write("a line\n")
                    sum(range(1000))
            except Told:
                interrupted += 1
        free = lines._queue.mutex.acquire(timeout=10)
        assert free
        lines._queue.mutex.release()
        lines.close()
    assert interrupted == 120


def test_looking_for_a_module():
    """The lock of an import, which GPTQModel's logger takes with each line that it draws."""

    def look() -> None:
        with contextlib.suppress(ImportError):
            import a_module_that_is_not_there  # noqa: F401

    interrupted = 0
    for round_ in range(60):
        with InterruptedBy(tell, signal.SIGALRM):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 5e-6 * round_)
                while True:
                    look()
            except Told:
                interrupted += 1
        other = threading.Thread(target=look, daemon=True)
        other.start()
        other.join(20)
        assert not other.is_alive()
    assert interrupted == 60


def test_a_second_one_is_not_put_off():
    lock = Lock("__enter__", times=2)
    with pytest.raises(Told) as caught, told(), lock:
        raise AssertionError("not reached")
    assert "__enter__" in [entry.name for entry in caught.traceback]


def test_where_no_thread_can_be_started(monkeypatch):
    def refuse(*_) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    with pytest.raises(Told), told(), Lock("__enter__"):
        raise AssertionError("it was lost")


def test_waiting_is_broken_off():
    """Whoever waits for another thread may wait for ever."""
    end = threading.Event()
    sender = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    sender.start()
    with pytest.raises(Told), told():
        end.wait(60)
        raise AssertionError("it waited to the end")
    sender.join()


def test_a_thread_that_is_waited_for_is_broken_off():
    end = threading.Event()
    worker = threading.Thread(target=end.wait, args=(60,))
    worker.start()
    sender = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    sender.start()
    with pytest.raises(Told), told():
        worker.join()
        raise AssertionError("it waited to the end")
    end.set()
    worker.join()
    sender.join()


def test_what_python_would_swallow():
    """An exception in a destructor is printed and forgotten."""

    class Last:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Told), told():
        Last()
        pause()


def test_at_the_end_nothing_is_left():
    """Put off until the handler goes: it comes then, once, and never later."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    calls = []
    with InterruptedBy(lambda *_: calls.append(1), signal.SIGINT, signal.SIGTERM):
        with Lock("__exit__"):
            pass
        assert not calls
    assert calls == [1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    pause()
    assert calls == [1]


def test_one_call_for_one_signal():
    calls = []
    with InterruptedBy(lambda *_: calls.append(1), signal.SIGTERM):
        with Lock("__enter__"):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)
        pause()
    assert calls == [1, 1]


def test_a_handler_that_hands_over():
    """As a run with a checkpoint does: the first finishes the layer, the second is another's."""
    calls = []

    def first(*_) -> None:
        calls.append("first")
        inner.restore()

    with (
        InterruptedBy(lambda *_: calls.append("second"), signal.SIGTERM),
        InterruptedBy(first, signal.SIGTERM) as inner,
    ):
        with Lock("__exit__"):
            pass
        pause()
        assert calls == ["first"]
        signal.raise_signal(signal.SIGTERM)
        assert calls == ["first", "second"]


@pytest.mark.parametrize("within", [told, of_the_process])
def test_only_on_the_main_thread(within):
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with within():
            seen.append(signal.getsignal(signal.SIGTERM))

    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    assert seen == [before] and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_of_a_program_around_python(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as around:
        around.setattr(signal, "getsignal", lambda number: None)
        within = told().__enter__()
    assert signal.getsignal(signal.SIGTERM) is before
    within.__exit__()
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c():
    lock = Lock("__exit__", number=signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ctrl_c_outside_of_locks():
        with lock:
            pass
        pause()
    assert not lock.real.locked()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_of_somebody_else():
    def other(*_) -> None:
        pass

    before = signal.signal(signal.SIGINT, other)
    try:
        with ctrl_c_outside_of_locks():
            assert signal.getsignal(signal.SIGINT) is other
    finally:
        signal.signal(signal.SIGINT, before)


# Both signals at each of these moments of a command: its parsing, its last words, and
# the two halves of the end of Python, of which the second has no handler of Python's any more.
_PROGRAM = """
import atexit, os, signal, sys
from epmq_gptq import cli, console

def come(kill=os.kill, me=os.getpid(), numbers=(signal.SIGTERM, signal.SIGINT)):
    for number in numbers:
        kill(me, number)

class Freed:
    __del__ = lambda self, come=come: come()

moment = sys.argv.pop(1)
if moment == "parsed":
    cli.Group.parse_args = lambda *_: come()
if moment == "said":
    console.Reporter.error = lambda *_, **__: come()
if moment == "exit":
    atexit.register(come)
if moment == "freed":
    kept = Freed()
cli.main()
"""


def explained(code: str, moment: str) -> subprocess.CompletedProcess[str]:
    """`epmq-gptq explain CODE` with the signals at this moment."""
    command = [sys.executable, "-c", _PROGRAM, moment, "explain", code]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "moment, code",
    [("parsed", 143), ("said", 2), ("exit", 2), ("freed", 2)],
)
def test_what_a_command_came_to_stands(moment, code):
    done = explained("EPMQ-X99", moment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert ("EPMQ-X99" in done.stderr) is (moment in ("exit", "freed"))


@pytest.mark.parametrize("moment", ["exit", "freed"])
def test_what_a_command_did_stands(moment):
    done = explained("EPMQ-F40", moment)
    assert done.returncode == 0 and "EPMQ-F40" in done.stdout and not done.stderr
