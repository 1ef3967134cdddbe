"""The exceptions of epmq_gptq.

A caller's mistake is an :class:`EPMQInputError`; numbers that cannot be trusted are an
:class:`EPMQNumericalError`. Both name the option or tensor, the rule, what was got, where
(expert, module) and what to do next.
"""

from __future__ import annotations


class EPMQError(Exception):
    """Base of every error that epmq_gptq raises on purpose."""


class EPMQInputError(EPMQError, ValueError):
    """An option, file or data set cannot be used as asked; nothing was computed."""


class EPMQNumericalError(EPMQError, ArithmeticError):
    """A tensor is non-finite, or a matrix that must be positive definite is not.

    Attributes:
        module: full name of the linear layer, or None.
        expert: name of the expert whose data or weights caused it, or None.
    """

    def __init__(self, message: str, *, module: str | None = None, expert: str | None = None):
        super().__init__(message)
        self.module = module
        self.expert = expert


class EPMQHostError(EPMQError, RuntimeError):
    """The installed GPTQModel is not one that epmq_gptq was tested with."""
