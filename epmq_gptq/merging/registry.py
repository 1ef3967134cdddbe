"""The merge methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import EPMQInputError
from .average import Average
from .method import MergeMethod
from .regmean import RegMean
from .regmean_plusplus import RegMeanPlusPlus
from .task_arithmetic import TaskArithmetic
from .ties import Ties
from .ties_per_tensor import TiesPerTensor
from .wudi import Wudi

METHODS: dict[str, type[MergeMethod]] = {
    method.name: method
    for method in (Average, TaskArithmetic, Ties, TiesPerTensor, Wudi, RegMean, RegMeanPlusPlus)
}


def merge_methods() -> dict[str, dict[str, Any]]:
    """Every method as plain data, for a CLI or a page of documentation.

    Returns:
        name → ``summary``, ``title`` and ``reference`` of the paper, ``needs_base``,
        ``needs_calibration``, ``passes`` (how often all models are read, calibration left out) and
        ``parameters``: option → ``default``, ``rule``, ``doc``.
    """
    return {
        name: {
            "summary": (method.__doc__ or "").strip().partition("\n")[0],
            "title": method.title,
            "reference": method.reference_url,
            "needs_base": method.needs_base,
            "needs_calibration": method.needs_calibration,
            "passes": method.passes,
            "parameters": {
                entry.name: {
                    "default": entry.default,
                    "rule": entry.metadata["rule"],
                    "doc": entry.metadata["doc"],
                }
                for entry in fields(method)
            },
        }
        for name, method in METHODS.items()
    }


def build_method(name: str, parameters: Mapping[str, Any] | None) -> MergeMethod:
    """The method ``name`` with ``parameters`` over its defaults.

    Raises:
        EPMQInputError: no such method or option, or a value that breaks an option's rule.
    """
    if name not in METHODS:
        raise EPMQInputError(
            f"`method` should be one of {', '.join(METHODS)}, got {name!r}.",
            code="EPMQ-O01",
            subject="`method`",
            remedy="`epmq-gptq methods` describes them.",
        )
    method = METHODS[name]
    known = [entry.name for entry in fields(method)]
    for key in parameters or {}:
        if key not in known:
            options = ", ".join(f"`{option}`" for option in known) or "none"
            raise EPMQInputError(
                f"`{key}` is not an option of `{name}`; its options are {options}.",
                code="EPMQ-O02",
                subject=f"`{key}`",
                remedy="Leave it out, or write it as it is there.",
            )
    return method(**(parameters or {}))
