"""What the user sees: our lines and bars, one line per error, and the host's chatter only if asked.

Imports rich and the standard library only: entering :meth:`Reporter.quiet_host` must come before
torch, transformers and GPTQModel are imported, because much of their noise comes from importing.
"""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .errors import EPMQError, EPMQInputError, EPMQNumericalError, EPMQWarning

EXIT_FAILED, EXIT_INPUT, EXIT_NUMERICAL, EXIT_INTERRUPTED = 1, 2, 3, 130

# Without a terminal rich assumes 80 columns and would break the summary table.
_PLAIN_WIDTH = 140
# Where no bar can be drawn, a line is printed after each tenth, but not more often than this.
_PLAIN_LINES = 10
_PLAIN_SECONDS = 5.0
# LogBar ("WARN  ..."), python's logging ("WARNING:name:...") and warnings ("x.py:1: UserWarning:").
_ALARM = re.compile(r"^\s*(?:WARN|ERROR|CRIT|FATAL)|^\S+:\d+: \w*Warning:|^Traceback")
# Said on every run with a usual Python, whatever is being done.
_IRRELEVANT = "Python GIL is enabled"
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class HostOutput(io.TextIOBase):
    """Takes what the host prints, from any thread, and keeps what may matter later.

    Attributes:
        alarms: the last warnings and errors, each once.
        tail: the last lines of any kind.
    """

    encoding = "utf-8"

    def __init__(self) -> None:
        self.alarms: deque[str] = deque(maxlen=100)
        self.tail: deque[str] = deque(maxlen=40)
        self._line = ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            # A bar redraws its line after "\r": only what stands at the end of the line counts.
            *lines, self._line = (self._line + text).split("\n")
            self._line = self._line[-4096:]
            for line in lines:
                self._keep(_ANSI.sub("", line.rpartition("\r")[2] or line).rstrip())
        return len(text)

    def _keep(self, line: str) -> None:
        if not line.strip():
            return
        self.tail.append(line)
        if _IRRELEVANT in line:
            return
        if _ALARM.match(line) and line not in self.alarms:
            self.alarms.append(line)


@contextlib.contextmanager
def captured(host: HostOutput) -> Iterator[None]:
    """Keep what others print off the terminal and in ``host``.

    GPTQModel's logger and bars, transformers' and datasets' bars, ``print`` and ``warnings`` all
    look up ``sys.stdout`` or ``sys.stderr`` when they write, and loggers when they are imported, so
    replacing these two is enough; the process's file descriptors stay as they are. A console that
    shall be seen meanwhile must hold its own stream.
    """
    with contextlib.redirect_stdout(host), contextlib.redirect_stderr(host):
        yield


class Reporter:
    """The two streams of one command, taken when it starts, so that the host cannot replace them.

    Args:
        verbose: let the host speak, and show tracebacks.
    """

    def __init__(self, *, verbose: bool = False):
        self.verbose = verbose
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)
        self.host = HostOutput()
        self._interrupted = threading.Event()

    def step(self, name: str, text: str) -> None:
        """One line about a finished or beginning step.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed before, and somebody swallowed it.
        """
        self.check_interrupt()
        self.out.print(f"{name:<12}{text}", markup=False, highlight=False, soft_wrap=True)

    def check_interrupt(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed.

        Some of the libraries that are imported catch every exception, that one too: one Ctrl-C
        during the import of transformers was seen to be lost.
        """
        if self._interrupted.is_set():
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _remembered_interrupts(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(*_) -> None:
            self._interrupted.set()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def error(self, message: str, code: str = "") -> None:
        """One line on stderr, whatever the message holds; ends with the code, if there is one."""
        line = f"error: {' '.join(message.split())}" + (f" [{code}]" if code else "")
        self.err.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)

    def warning(self, message: str, code: str) -> None:
        """One line on stderr about something that works and deserves a look."""
        line = f"warning: {' '.join(message.split())} [{code}]"
        self.err.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def note(self, message: str) -> None:
        """A line on stderr that is no error."""
        self.err.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def quiet_host(self) -> Iterator[None]:
        """:func:`captured` into ``self.host``, unless verbose."""
        with contextlib.nullcontext() if self.verbose else captured(self.host):
            yield

    @contextlib.contextmanager
    def _own_warnings(self) -> Iterator[None]:
        """Print our warnings as lines of ours, each once; all others go where they went."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", EPMQWarning)
            others, seen = warnings.showwarning, set()

            def show(message, category, *where, **options) -> None:
                if not isinstance(message, EPMQWarning):
                    others(message, category, *where, **options)
                elif str(message) not in seen:
                    seen.add(str(message))
                    self.warning(str(message), message.code)

            warnings.showwarning = show
            yield

    @contextlib.contextmanager
    def exit_codes(
        self,
        on_error: Callable[[EPMQError], None] | None = None,
        *,
        interrupted: str = "no checkpoint was written.",
    ) -> Iterator[None]:
        """Turn what goes wrong into one line and an exit code.

        Args:
            on_error: called with an error of ours before it is printed.
            interrupted: what an interrupt leaves behind.

        Raises:
            SystemExit: 2 a mistake in the input, 3 numbers that cannot be trusted, 1 anything else,
                130 an interrupt.
        """
        try:
            with self._remembered_interrupts(), self._own_warnings():
                yield
        except EPMQError as error:
            if self.verbose:
                self._traceback()
            if on_error is not None:
                on_error(error)
            self.error(str(error), error.code)
            code = EXIT_FAILED
            if isinstance(error, EPMQInputError):
                code = EXIT_INPUT
            elif isinstance(error, EPMQNumericalError):
                code = EXIT_NUMERICAL
            raise SystemExit(code) from None
        except KeyboardInterrupt:
            self.error(f"interrupted; {interrupted}")
            raise SystemExit(EXIT_INTERRUPTED) from None
        except Exception as error:
            self._unexpected(error)
            raise SystemExit(EXIT_FAILED) from None

    def _traceback(self) -> None:
        self.err.print(traceback.format_exc(), markup=False, highlight=False, soft_wrap=True)

    def _unexpected(self, error: Exception) -> None:
        name = type(error).__name__
        if self.verbose:
            self._traceback()
            self.error(f"{name}: {error}")
            return
        hint = "run again with --verbose for the traceback and GPTQModel's log."
        if name == "OutOfMemoryError":
            hint = "lower `--batch-size` or `seqlen`; " + hint
        self.error(f"{name}: {error} ({hint})")
        for line in list(self.host.alarms)[-10:]:
            self.note(f"  GPTQModel: {line}")


def _console(stream) -> Console:
    console = Console(file=stream)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


class StepProgress:
    """A bar on a terminal, and about ten plain lines elsewhere.

    Args:
        reporter: where to; with its ``verbose`` there is no bar that the host's log would tear.
        name: what is being done.
        total: of the steps.
        unit: what a step is.
    """

    def __init__(self, reporter: Reporter, name: str, total: int, unit: str):
        self._reporter, self._name, self._total, self._unit = reporter, name, total, unit
        self._start = time.perf_counter()
        self._done = self._printed = 0
        self._printed_at = self._start
        self._bar: Progress | None = None
        if reporter.out.is_terminal and not reporter.verbose:
            self._bar = Progress(
                TextColumn(f"{name:<12}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=reporter.out,
                # rich would put back the streams that quiet_host has taken away.
                redirect_stdout=False,
                redirect_stderr=False,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int, what: str) -> None:
        """``steps`` more are done; ``what`` says where we are."""
        self._reporter.check_interrupt()
        self._done += steps
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=what)
            return
        now = time.perf_counter()
        is_due = (
            self._done - self._printed >= self._total / _PLAIN_LINES
            and now - self._printed_at >= _PLAIN_SECONDS
        )
        if is_due or self._done >= self._total:
            self._printed, self._printed_at = self._done, now
            self._reporter.step(
                self._name,
                f"{self._done}/{self._total} {self._unit}, {now - self._start:.0f} s, {what}",
            )
