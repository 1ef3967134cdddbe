"""With which code a command leaves, and what each code means."""

from __future__ import annotations

from enum import IntEnum

from .errors import EPMQInputError, EPMQNumericalError, EPMQStopped


class Terminated(KeyboardInterrupt):
    """SIGTERM came, which for a command is an interrupt."""


class ExitCode(IntEnum):
    """The exit codes of every command; scripts may rely on them."""

    OK = 0
    FAILED = 1
    INPUT = 2
    NUMERICAL = 3
    STOPPED = 75
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143

    @property
    def meaning(self) -> str:
        """In a few words, for the help and the documentation."""
        return _MEANINGS[self]

    @classmethod
    def of(cls, error: BaseException) -> ExitCode:
        """The code of what went wrong."""
        if isinstance(error, EPMQInputError):
            return cls.INPUT
        if isinstance(error, EPMQNumericalError):
            return cls.NUMERICAL
        if isinstance(error, EPMQStopped):
            return cls.STOPPED
        if isinstance(error, Terminated):
            return cls.TERMINATED
        if isinstance(error, KeyboardInterrupt):
            return cls.INTERRUPTED
        if isinstance(error, BrokenPipeError):
            return cls.BROKEN_PIPE
        return cls.FAILED


_MEANINGS = {
    ExitCode.OK: "done; of `inspect`: nothing stands in the way of a run",
    ExitCode.FAILED: "anything else: another GPTQModel, a save that does not read back, a bug",
    ExitCode.INPUT: "an option, a file or a model cannot be used as asked; nothing was computed",
    ExitCode.NUMERICAL: "numbers that cannot be trusted; no checkpoint was written",
    ExitCode.STOPPED: "stopped (Ctrl-C, SIGTERM) where it can go on: the same command continues it",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C); no checkpoint was written",
    ExitCode.BROKEN_PIPE: "whoever read the output went away, as `| head` does",
    ExitCode.TERMINATED: "ended by SIGTERM; no checkpoint was written",
}
