"""The exceptions of epmq_gptq: one family, each with a code, an object, a cause and a remedy.

A caller's mistake is an :class:`EPMQInputError`; numbers that cannot be trusted are an
:class:`EPMQNumericalError`; a device that is full or gone is an :class:`EPMQDeviceError`. Codes are
stable: scripts and issues may rely on them.
"""

from __future__ import annotations

import copy
import copyreg
from enum import IntEnum
from typing import Any

# Code -> what it stands for. F: a fault of the inputs or of the numbers; O: of an option or a file
# of options; H: of the host; S: of a save; P: of publishing.
CODES: dict[str, str] = {
    "EPMQ-F01": "a tensor that is needed is missing",
    "EPMQ-F02": "a checkpoint holds tensors that are not used",
    "EPMQ-F03": "a tensor has another shape than in the merged model",
    "EPMQ-F04": "the configuration describes another network",
    "EPMQ-F05": "the vocabularies differ",
    "EPMQ-F06": "a tensor has a dtype that cannot be used",
    "EPMQ-F07": "a model is already quantized",
    "EPMQ-F08": "an expert's weight is not finite",
    "EPMQ-F09": "a merged weight is not finite",
    "EPMQ-F10": "a file of a checkpoint lies outside of it",
    "EPMQ-F11": "the index and the shards disagree",
    "EPMQ-F12": "a shard is damaged",
    "EPMQ-F13": "a configuration file is not readable",
    "EPMQ-F14": "a checkpoint is in a pickle format, or another that is not read",
    "EPMQ-F15": "a checkpoint cannot be found or read",
    "EPMQ-F16": "a hub id is not pinned, or cannot be had",
    "EPMQ-F17": "two experts are the same",
    "EPMQ-F18": "an expert equals the base or the merge",
    "EPMQ-F19": "an expert has nothing to do with the merge, or undoes another",
    "EPMQ-F20": "there is no expert",
    "EPMQ-F21": "experts and calibration name different experts",
    "EPMQ-F22": "an expert has no usable calibration row",
    "EPMQ-F23": "an expert has very few calibration tokens",
    "EPMQ-F24": "a calibration source has fewer rows than were asked for",
    "EPMQ-F25": "calibration rows are longer than the context",
    "EPMQ-F26": "calibration is unbalanced between experts",
    "EPMQ-F27": "activations are not finite",
    "EPMQ-F28": "alpha is out of range",
    "EPMQ-F29": "the objective is singular",
    "EPMQ-F30": "a curvature is not positive definite",
    "EPMQ-F31": "a layer's inputs are all zero",
    "EPMQ-F32": "a calibration row is not readable",
    "EPMQ-F33": "bits or group size do not fit",
    "EPMQ-F34": "an adapter cannot be used exactly",
    "EPMQ-F35": "the lineage of a merge cannot be resolved",
    "EPMQ-F36": "tokenizers differ",
    "EPMQ-F37": "a tied head cannot be quantized",
    "EPMQ-F38": "an architecture or a layer type is not supported",
    "EPMQ-F40": "a run was stopped, and can go on",
    "EPMQ-F41": "a checkpoint is of another run",
    "EPMQ-F42": "a checkpoint is damaged, or is not where it should be",
    "EPMQ-F43": "two processes write to one place",
    "EPMQ-F44": "a disk has too little space",
    "EPMQ-F45": "an output place cannot be used",
    "EPMQ-F46": "memory ran out",
    "EPMQ-F47": "a device was lost",
    "EPMQ-F49": "the host is not a tested one",
    "EPMQ-F52": "a call came at the wrong time",
    "EPMQ-F53": "a report or an evaluation is not readable as such",
    "EPMQ-F54": "figures of a run, a baseline or evaluations do not belong together",
    "EPMQ-F55": "statistics are of another model, or lack what is asked of them",
    "EPMQ-F56": "a checkpoint is no GPTQ checkpoint",
    "EPMQ-F57": "a model asks for code of its own, or of a hub, to be run",
    "EPMQ-H01": "a fast kernel is missing: the same result takes longer",
    "EPMQ-O01": "an option has a wrong type or value",
    "EPMQ-O02": "an option does not exist",
    "EPMQ-O03": "options exclude or need one another",
    "EPMQ-O04": "a file of options is not readable",
    "EPMQ-N01": "a rounded weight, a target or a scale is not finite",
    "EPMQ-S01": "what was written does not read back as it should",
    "EPMQ-S02": "a save that was cut off was cleared up",
    "EPMQ-P01": "a checkpoint is not fit to be published",
    "EPMQ-P02": "a hub wants another token, or a right that it does not give",
    "EPMQ-P03": "a repository or a revision of a hub cannot be used as asked",
    "EPMQ-P04": "an upload did not come to its end",
}

# Codes of the table that nothing raises or reports yet.
RESERVED: frozenset[str] = frozenset()


class EPMQError(Exception):
    """Base of every error that epmq_gptq raises on purpose.

    Args:
        cause: what is wrong: names the object, the rule and what was got; ends with a full stop.
        code: one of :data:`CODES`.
        subject: the object in a few words: an option, a tensor, an expert, a module, a file.
        remedy: what to do about it; ends with a full stop.
    """

    def __init__(self, cause: str, *, code: str, subject: str, remedy: str):
        assert code in CODES, code
        self.code = code
        # Paths, tensor names and other people's messages may hold line breaks; an error has none.
        self.cause, self.subject, self.remedy = map(_one_line, (cause, subject, remedy))
        super().__init__(f"{self.cause} {self.remedy}".rstrip())

    def to_dict(self) -> dict[str, str]:
        """The four parts as plain data."""
        return {
            "code": self.code,
            "subject": self.subject,
            "cause": self.cause,
            "remedy": self.remedy,
        }

    def within(self, place: str) -> EPMQError:
        """The same error with the place where it was met in front of its cause."""
        error = copy.copy(self)
        cause = f"{place}: {self.cause}"
        EPMQError.__init__(error, cause, code=self.code, subject=self.subject, remedy=self.remedy)
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with the text alone, and `code` has no default.
        return copyreg.__newobj__, (type(self), *self.args), dict(self.__dict__)


def _one_line(text: str) -> str:
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    # Nor does a stranger's tensor name get to move the cursor of our terminal.
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


class EPMQInputError(EPMQError, ValueError):
    """An option, file or data set cannot be used as asked; nothing was computed."""


class EPMQNumericalError(EPMQError, ArithmeticError):
    """A tensor is non-finite, or a matrix that must be positive definite is not.

    Attributes:
        module: full name of the linear layer, or None.
        expert: name of the expert whose data or weights caused it, or None.
    """

    def __init__(
        self, cause: str, *, module: str | None = None, expert: str | None = None, **parts: str
    ):
        super().__init__(cause, **parts)
        self.module = module
        self.expert = expert


class EPMQStopped(EPMQError):
    """A run was asked to stop, and has committed what is done: it can go on."""


class EPMQHostError(EPMQError, RuntimeError):
    """The installed GPTQModel is not one that epmq_gptq was tested with."""


class EPMQDeviceError(EPMQError, RuntimeError):
    """A device has no memory left, or does not answer any more; no checkpoint was written."""


class EPMQWarning(UserWarning):
    """Something that works and that deserves a look.

    Attributes:
        code: one of :data:`CODES`.
    """

    def __init__(self, text: str, *, code: str):
        assert code in CODES, code
        super().__init__(_one_line(text))
        self.code = code


# ---- exit codes ----------------------------------------------------------------------------------


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
