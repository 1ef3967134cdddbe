"""What the user sees: our lines and bars, one line per error, and the host's chatter only if asked.

Imports rich and the standard library only: entering :meth:`Reporter.quiet_host` must come before
torch, transformers and GPTQModel are imported, because much of their noise comes from importing.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

from ..errors import EPMQError, EPMQWarning, ExitCode, Terminated
from .interrupts import handled

if TYPE_CHECKING:
    from rich.progress import Progress

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
        quiet: say nothing of the course of the run; warnings, errors and results stay.
        piped: stdout is for a machine, which gets the result; the course of the run goes to stderr.
        asks: on a terminal, a person may be asked for what is missing.

    Attributes:
        out: the course of the run.
        result: what was asked for, such as the table of ``inspect``, for people.
        err: warnings and errors.
        stdout: the stream itself, for what is no text for people.
    """

    def __init__(
        self,
        *,
        verbose: bool = False,
        quiet: bool = False,
        piped: bool = False,
        asks: bool = False,
    ):
        self.verbose, self.quiet, self.piped = verbose, quiet, piped
        self.stdout: TextIO = sys.stdout
        people = sys.stderr if piped else sys.stdout
        self.out = _console(people, quiet=quiet)
        self.result = _console(people, quiet=piped)
        self.err = _console(sys.stderr)
        self.host = HostOutput()
        self.asks = asks and sys.stdin is not None and sys.stdin.isatty() and self.err.is_terminal
        self._interrupted: KeyboardInterrupt | None = None

    def step(self, name: str, text: str) -> None:
        """One line about a finished or beginning step.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM came before, and somebody swallowed it.
        """
        self.check_interrupt()
        self.out.print(f"{name:<12}{text}", markup=False, highlight=False, soft_wrap=True)

    def check_interrupt(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C or SIGTERM came.

        Some of the libraries that are imported catch every exception, that one too: one Ctrl-C
        during the import of transformers was seen to be lost.
        """
        if self._interrupted is not None:
            raise self._interrupted

    def _remember(self, number: int, frame: object) -> None:
        # SIGTERM by itself would leave temporary folders behind.
        kind = KeyboardInterrupt if number == signal.SIGINT else Terminated
        self._interrupted = kind()
        raise self._interrupted

    def ask(self, question: str) -> str:
        """A line that a person types; only where ``asks``.

        Raises:
            KeyboardInterrupt: Ctrl-C, or the end of the input.
        """
        self.err.print(f"{question}: ", end="", markup=False, highlight=False, soft_wrap=True)
        line = sys.stdin.readline()
        if not line:
            raise KeyboardInterrupt
        return line.rstrip("\n")

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
        if self.quiet:
            return
        self.err.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def quiet_host(self) -> Iterator[None]:
        """:func:`captured` into ``self.host``; with verbose it speaks, on stderr if ``piped``."""
        if not self.verbose:
            heard = captured(self.host)
        elif self.piped:
            heard = contextlib.redirect_stdout(sys.stderr)
        else:
            heard = contextlib.nullcontext()
        with heard:
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
        on_error: Callable[[BaseException], None] | None = None,
        *,
        interrupted: str = "no checkpoint was written.",
    ) -> Iterator[None]:
        """Turn what goes wrong into one line and an exit code.

        Args:
            on_error: called with what was raised before it is printed.
            interrupted: what an interrupt leaves behind.

        Raises:
            SystemExit: with one of :class:`~epmq_gptq.errors.ExitCode`.
        """
        try:
            with handled(self._remember, signal.SIGINT, signal.SIGTERM), self._own_warnings():
                yield
        except BrokenPipeError as error:
            silence(self.stdout)
            raise SystemExit(ExitCode.of(error)) from None
        except (Exception, KeyboardInterrupt) as error:
            if on_error is not None:
                on_error(error)
            self._failed(error, interrupted)
            raise SystemExit(ExitCode.of(error)) from None

    def _failed(self, error: BaseException, interrupted: str) -> None:
        if isinstance(error, EPMQError):
            if self.verbose:
                self._traceback()
            self.error(str(error), error.code)
        elif isinstance(error, KeyboardInterrupt):
            how = "ended by SIGTERM" if isinstance(error, Terminated) else "interrupted"
            self.error(f"{how}; {interrupted}")
        else:
            self._unexpected(error)

    def _traceback(self) -> None:
        self.err.print(traceback.format_exc(), markup=False, highlight=False, soft_wrap=True)

    def _unexpected(self, error: BaseException) -> None:
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


class _Stream(Console):
    """A console of a command that ends quietly when nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(self.file)
        raise SystemExit(ExitCode.BROKEN_PIPE)


def silence(stream: TextIO) -> None:
    """Let what is still to be flushed go nowhere: Python would complain of it when it ends."""
    with contextlib.suppress(OSError, ValueError):  # no file: a test's, a notebook's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _console(stream: TextIO, *, quiet: bool = False) -> Console:
    # A notebook's rich would show every line as a table of its own.
    console = _Stream(file=stream, quiet=quiet, force_jupyter=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


class StepProgress:
    """A bar on a terminal, and about ten plain lines elsewhere; both say how much time is left.

    Args:
        reporter: where to; with its ``verbose`` there is no bar that the host's log would tear,
            and with its ``quiet`` there is nothing.
        name: what is being done.
        total: of the steps.
        unit: what a step is.
        work: of all steps together, in the unit of :meth:`advance`; default: a step is as much as
            any other.
    """

    def __init__(
        self, reporter: Reporter, name: str, total: int, unit: str, work: float | None = None
    ):
        self._reporter, self._name, self._total, self._unit = reporter, name, total, unit
        self._left = TimeLeft(float(total) if work is None else work)
        self._done = self._printed = 0
        self._printed_at = self._left.start
        self._bar: Progress | None = None
        if reporter.out.is_terminal and not reporter.verbose and not reporter.quiet:
            self._bar = self._new_bar()
            self._task = self._bar.add_task("", total=total, left="")

    def _new_bar(self) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        return Progress(
            TextColumn(f"{self._name:<12}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} " + self._unit),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}", markup=False),
            console=self._reporter.out,
            # rich would put back the streams that quiet_host has taken away.
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int, what: str, work: float | None = None) -> None:
        """``steps`` more are done, which were ``work``; ``what`` says where we are."""
        self._reporter.check_interrupt()
        self._done += steps
        now = time.perf_counter()
        seconds = self._left.after(steps if work is None else work, now)
        left = "" if seconds is None or self._done >= self._total else f"{spoken(seconds)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=what, left=left)
            return
        is_due = (
            self._done - self._printed >= self._total / _PLAIN_LINES
            and now - self._printed_at >= _PLAIN_SECONDS
        )
        if is_due or self._done >= self._total:
            self._printed, self._printed_at = self._done, now
            told = [spoken(now - self._left.start), *([left] if left else []), what]
            self._reporter.step(
                self._name, f"{self._done}/{self._total} {self._unit}, {', '.join(told)}"
            )


class TimeLeft:
    """How long the rest of some work takes, by the pace so far.

    What comes before the first step is done (checks, the first layer's inputs) says nothing of the
    pace, so time is counted from then on.

    Args:
        work: all of it, in any unit.
    """

    def __init__(self, work: float):
        self._work, self._done = work, 0.0
        self.start = time.perf_counter()
        self._first: tuple[float, float] | None = None

    def after(self, work: float, now: float) -> float | None:
        """Seconds that are left when ``work`` more is done at ``now``; None at the first call."""
        self._done += work
        if self._first is None:
            self._first = self._done, now
            return None
        done, since = self._first
        if self._done <= done:
            return None
        pace = (now - since) / (self._done - done)
        return max(0.0, pace * (self._work - self._done))


def spoken(seconds: float) -> str:
    """A duration as a person would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def human_size(size: int) -> str:
    """Decimal units, as disks and hubs count."""
    if size < 1000:
        return f"{size} B"
    power = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**power:.1f} {' kMGT'[power]}B"
