"""What ``EPMQConfig`` takes, checked option by option; nothing here needs GPTQModel."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import EPMQInputError
from .experts.in_memory import InMemoryExpert, in_memory, is_in_memory
from .io.declared import bad_option, closest, shown

BITS = (2, 3, 4, 5, 6, 7, 8)
# What the host's kernels pack and run.
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
# From here on fp32 no longer tells the target from the merged weights; far above it λ overflows.
LARGEST_ALPHA = 1e9
# Wider apart than this one expert is lost in the rounding of another's Gram.
LARGEST_WEIGHT = 1e6

# Expert names reach file names, tables and the published provenance.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_GRID = {"bits": BITS, "group_size": GROUP_SIZES}
# What the host reads of an override for some layers, apart from what `alpha` stands for here.
_DYNAMIC = (
    *("bits", "group_size", "sym", "desc_act", "act_group_aware", "static_groups", "mse"),
    *("fallback", "hessian"),
)
_SWITCHES = ("sym", "desc_act", "act_group_aware", "static_groups", "true_sequential", "lm_head")


def check_experts(experts: Any) -> dict[str, str | InMemoryExpert]:
    """Name → folder, hub id, or a model in memory that is ready to be read."""
    if not isinstance(experts, Mapping) or not experts:
        raise EPMQInputError(
            f"`experts` should map at least one expert's name to its model, got {shown(experts)}.",
            code="EPMQ-F20",
            subject="`experts`",
            remedy='For example `experts={"math": "org/math-expert@revision"}`.',
        )
    checked = {}
    for name, source in experts.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise EPMQInputError(
                "`experts`: a name should be letters, digits, `.`, `_` or `-` (at most 64), got "
                f"{name!r}.",
                code="EPMQ-O01",
                subject="`experts`",
                remedy="Choose a short name; it appears in tables and in the published record.",
            )
        if isinstance(source, InMemoryExpert):
            checked[name] = source
        elif is_in_memory(source):
            checked[name] = in_memory(source, what=f"expert `{name}`")
        elif isinstance(source, (str, Path)) and str(source).strip():
            checked[name] = str(source)
        else:
            raise EPMQInputError(
                f"`experts[{name!r}]` should be a folder, a hub id, a model or a state dict, got "
                f"{shown(source)}.",
                code="EPMQ-O01",
                subject=f"expert `{name}`",
                remedy="Give one of them.",
            )
    return checked


def number(value: Any, option: str, code: str = "EPMQ-O01") -> float:
    """A finite float that is not negative."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise bad_option(option, "a number", value, code=code)
    try:
        result = float(value)
    except OverflowError:  # an int of more digits than any float has
        result = math.inf
    if not math.isfinite(result) or result < 0:
        raise bad_option(option, "finite and not negative", result, code=code)
    return result


def check_alpha(value: Any, option: str, *, auto: bool = False) -> float | str:
    """An alpha, from 0 to so large that only the anchor is left; or one of the words if allowed."""
    if auto and isinstance(value, str):
        if value not in ("auto", "gptq"):
            raise bad_option(option, 'a number, "auto" or "gptq"', value, code="EPMQ-F28")
        return value
    alpha = number(value, option, "EPMQ-F28")
    if alpha > LARGEST_ALPHA:
        raise bad_option(
            option,
            f"at most {LARGEST_ALPHA:g}",
            value,
            "Take a smaller one: from 1e7 on the result is plain GPTQ of the merge.",
            code="EPMQ-F28",
        )
    return alpha


def check_pattern(pattern: Any) -> str:
    """A key of `alpha_pattern`, as :func:`pattern_matches` uses it."""
    try:
        pattern_matches(pattern, "")
        if not isinstance(pattern, str):
            raise TypeError("it is no text")
    except (re.error, TypeError) as error:
        raise EPMQInputError(
            f"`alpha_pattern`: {pattern!r} is not a regular expression: {error}.",
            code="EPMQ-O01",
            subject="`alpha_pattern`",
            remedy="Write one that matches the end of a module's name.",
        ) from error
    return pattern


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a pattern matches the end of a module's full name, whole path parts."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None


def check_grid(options: Mapping[str, Any], prefix: str = "{}") -> None:
    """Refuse a grid that the host would stumble over once the work is done, or read otherwise.

    Args:
        options: some of ``bits``, ``group_size`` and the switches.
        prefix: how errors call an option, with ``{}`` for its name.
    """
    for name, known in _GRID.items():
        value = options.get(name, known[0])
        # 128.0 and True equal an int without being one; the host slices with it.
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or value not in known:
            raise bad_option(prefix.format(name), f"one of {list(known)}", value, code="EPMQ-F33")
    for name in _SWITCHES:
        value = options.get(name)
        if value is not None and not isinstance(value, bool):
            raise bad_option(prefix.format(name), "True or False", value)


def check_dynamic(dynamic: Any) -> None:
    """Refuse an override that the host would pass over, or that cannot go with experts."""
    if dynamic is None:
        return
    if not isinstance(dynamic, Mapping):
        raise bad_option("dynamic", "a mapping of module patterns to overrides", dynamic)
    for pattern, overrides in dynamic.items():
        option = f"dynamic[{pattern!r}]"
        if not isinstance(pattern, str) or not isinstance(overrides, Mapping):
            raise bad_option(
                option,
                "a pattern with a mapping of options",
                overrides,
                'To leave layers out write "-:pattern": {}.',
            )
        for name in overrides:
            if name not in _DYNAMIC:
                meant = closest(name, _DYNAMIC)
                hint = f"Did you mean `{meant}`?" if meant else "Leave it out."
                raise EPMQInputError(
                    f"`{option}` sets `{name}`, which EPMQConfig does not allow.",
                    code="EPMQ-O03",
                    subject="`dynamic`",
                    remedy="Use `alpha_pattern` for a module's anchor."
                    if name in ("alpha", "damp_percent")
                    else hint,
                )
        check_grid(overrides, f"{option}[{{}}]")
