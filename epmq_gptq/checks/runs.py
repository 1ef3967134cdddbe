"""The preflight of a run that is about to start: options from its configuration, errors raised."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import EPMQWarning
from ..experts.linears import Linear
from .check import preflight
from .findings import Preflight


def run_preflight(
    config: Any,
    merged: Any,
    experts: Any,
    linears: Sequence[Linear],
    tokens: Mapping[str, int] | None,
    **depth: Any,
) -> Preflight:
    """What ``quantize`` does first; it leaves ``experts`` bound to ``linears``.

    Args:
        config: the run's ``EPMQConfig``.
        merged: tensors of the merged model.
        experts: the run's :class:`~epmq_gptq.experts.experts.Experts`.
        linears: the layers that will be quantized, in forward order.
        tokens: calibration tokens per expert.
        depth: ``verify``, ``device`` and ``dtype_bytes`` of :func:`~epmq_gptq.checks.preflight`.

    Warns:
        EPMQWarning: for every warning that was found, once each.

    Raises:
        EPMQInputError: the run cannot succeed; all errors of the first kind, see
            :meth:`Preflight.raise_errors`.
    """
    result = check_run(config, merged, experts, linears, tokens, **depth)
    result.raise_errors()
    for finding in result.warnings:
        warnings.warn(EPMQWarning(str(finding), code=finding.code), stacklevel=3)
    return result


def check_run(
    config: Any,
    merged: Any,
    experts: Any,
    linears: Sequence[Linear],
    tokens: Mapping[str, int] | None,
    **depth: Any,
) -> Preflight:
    """:func:`preflight` with the options of an ``EPMQConfig``; nothing is raised or warned of."""
    return preflight(
        merged,
        experts,
        linears,
        bits=int(config.bits),
        group_size=int(config.group_size),
        sym=bool(config.sym),
        desc_act=bool(config.desc_act),
        dynamic=config.dynamic,
        lm_head=bool(config.lm_head),
        allow_duplicates=config.allow_duplicates,
        on_bad_module=config.on_bad_module,
        base=None if experts.base is None else experts.base[0],
        tokens=tokens,
        runs_experts=config.runs_experts,
        chooses_alpha=config.chooses_alpha,
        keeps_apart=config.save_statistics or config.weighting == "minmax",
        save_statistics=config.save_statistics,
        **depth,
    )
