"""What a shell offers after an option: names that are known without importing anything heavy.

The registries that own most of these names import torch; a shell that waits two seconds for a TAB
is worse than one without completion. tests/commands/test_completion.py holds them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

MERGE_METHODS = (
    "average",
    "task_arithmetic",
    "ties",
    "ties_per_tensor",
    "wudi",
    "regmean",
    "regmean_plusplus",
)
VERIFY = ("headers", "sample", "full")
DEVICES = ("cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Of the options of EPMQConfig those that a shell is used for; what may follow `=`, where it is one
# of a few things.
SETTINGS: dict[str, tuple[str, ...]] = {
    "bits": ("2", "3", "4", "8"),
    "group_size": ("32", "64", "128", "-1"),
    "profile": ("best", "paper", "gptq"),
    "alpha": ("auto",),
    "eta": (),
    "rho": (),
    "anchor": ("identity", "channel"),
    "bias_refit": ("true", "false"),
    "held_out": (),
    "weighting": ("raw", "token", "trace", "minmax"),
    "sym": ("true", "false"),
    "desc_act": ("true", "false"),
    "act_group_aware": ("true", "false"),
    "static_groups": ("true", "false"),
    "lm_head": ("true", "false"),
    "allow_duplicates": ("true", "false"),
    "require_pinned": ("true", "false"),
    "on_bad_module": ("raise", "rtn"),
}

Completion = Callable[[str], list[str]]


def one_of(names: Iterable[str]) -> Completion:
    """A completion with fixed names."""
    known = tuple(names)

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


merge_methods = one_of(MERGE_METHODS)
verifications = one_of(VERIFY)
devices = one_of(DEVICES)
dtypes = one_of(DTYPES)


def settings(incomplete: str) -> list[str]:
    """``key=`` of ``--set``, then the values of the key."""
    key, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in SETTINGS if name.startswith(key)]
    return [f"{key}={each}" for each in SETTINGS.get(key, ()) if each.startswith(value)]


def codes(incomplete: str) -> list[str]:
    """The error codes, also by their last part: ``F3`` gives EPMQ-F30 and those after it."""
    from ..errors import CODES

    start = incomplete.upper()
    return [code for code in CODES if code.startswith(start)] or [
        code for code in CODES if code.removeprefix("EPMQ-").startswith(start)
    ]
