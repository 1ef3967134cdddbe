"""Merging of anything that hands out tensors by name; the maths without files.

:func:`run_method` is the one loop: :func:`merge_state_dicts` runs it on state dicts in memory,
:func:`epmq_gptq.merging.merge` on checkpoints on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import EPMQInputError
from ..io.dtypes import NAMES, WEIGHTS
from .compatibility import Header, check_copied, check_headers
from .method import MergeMethod, Stack
from .registry import build_method


def run_method(
    method: MergeMethod,
    names: Sequence[str],
    load: Callable[[str], Stack],
    write: Callable[[str, Tensor], None],
    tick: Callable[[str], None] = lambda name: None,
) -> None:
    """Merge ``names`` one after the other.

    Between two tensors nothing of the first is kept: ``load`` is called when the last stack is
    gone, so the K + 1 copies of one name are all that lives.

    Args:
        method: what to compute.
        names: of the floating tensors.
        load: name → its stack; called ``method.passes`` times for each name.
        write: takes each merged tensor.
        tick: called after each tensor of each pass.

    Raises:
        EPMQNumericalError: a tensor holds NaN or Inf, or the merged one leaves its dtype's range.
    """
    checked: set[str] = set()

    def fetch(name: str) -> Stack:
        stack = load(name)
        if name not in checked:
            stack.check_finite()
            checked.add(name)
        return stack

    def each(visit: Callable[[Stack], None]) -> None:
        for name in names:
            # No variable may hold the stack while the next one is loaded.
            visit(fetch(name))
            tick(name)

    with torch.no_grad():
        state = method.prepare(each)
        for name in names:
            write(name, method.merge(fetch(name), state))
            tick(name)


def check_merge(
    method: str, parameters: Mapping[str, Any] | None, has_base: bool, experts: Sequence[str]
) -> MergeMethod:
    """The method with its options, if it can merge these experts.

    Raises:
        EPMQInputError: unknown method or option, no experts, or a missing base.
    """
    built = build_method(method, parameters)
    if not experts:
        raise EPMQInputError(
            "`experts` should name at least one expert, got none.",
            code="EPMQ-F20",
            subject="`experts`",
            remedy="Name the models to merge.",
        )
    if built.needs_base and not has_base:
        raise EPMQInputError(
            f"`base` should be the model that the experts were tuned from: `{built.name}` adds "
            "task vectors to it, got none.",
            code="EPMQ-O03",
            subject="`base`",
            remedy="Name it; `epmq-gptq methods` says which methods need no base.",
        )
    built.check_experts(experts)
    return built


def merge_state_dicts(
    method: str,
    base_sd: Mapping[str, Tensor] | None,
    expert_sds: Mapping[str, Mapping[str, Tensor]],
    parameters: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts in memory; the same numbers as :func:`epmq_gptq.merging.merge`.

    Args:
        method: name of a merge method, see :func:`epmq_gptq.merging.merge_methods`.
        base_sd: theta_0; may be None for ``average``.
        expert_sds: expert name → theta_i.
        parameters: the method's options, over its defaults.

    Returns:
        A state dict with the names and dtypes of the base (of the first expert without one).
        Tensors that are not fp32, fp16 or bf16 are copied.

    Raises:
        EPMQInputError: unknown method or option, no experts, a missing base, or models whose
            tensors do not match; or a method that runs the models on calibration rows, for which
            state dicts do not suffice.
        EPMQNumericalError: NaN or Inf in a tensor.
    """
    built = check_merge(method, parameters, base_sd is not None, list(expert_sds))
    if built.needs_calibration:
        raise EPMQInputError(
            f"`method` should be one that looks at weights only, got {method!r}: it runs the "
            "models on calibration rows, and a state dict does not say what model it is of.",
            code="EPMQ-O03",
            subject="`method`",
            remedy="Save the models and use `epmq_gptq.merging.merge`.",
        )
    reference = next(iter(expert_sds.values())) if base_sd is None else base_sd
    header = _header(reference)
    what = "the first expert" if base_sd is None else "the base"
    check_headers(header, what, {name: _header(sd) for name, sd in expert_sds.items()})

    def load(name: str) -> Stack:
        base = base_sd[name] if base_sd is not None and built.needs_base else None
        experts = {expert: sd[name] for expert, sd in expert_sds.items()}
        return Stack(name, base, experts, reference[name].dtype)

    copied = [name for name, entry in header.items() if entry.dtype not in WEIGHTS]
    for name in copied:
        for expert, sd in expert_sds.items():
            check_copied(name, reference[name], what, sd[name], expert)
    merged: dict[str, Tensor] = {}
    run_method(built, [n for n in header if n not in copied], load, merged.__setitem__)
    return {n: reference[n].detach().clone() if n in copied else merged[n] for n in reference}


def _header(state_dict: Mapping[str, Tensor]) -> dict[str, Header]:
    return {
        name: Header(tuple(tensor.shape), NAMES.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in state_dict.items()
    }
