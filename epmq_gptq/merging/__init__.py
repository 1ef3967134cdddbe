"""Merging of experts that share a base, streamed tensor by tensor.

    result = merge("ties", base="base", experts={"math": "a", "code": "b"}, out=Path("merged"))

:func:`merge` works on safetensors folders and holds one tensor name at a time;
:func:`merge_state_dicts` is the same maths on state dicts; :func:`merge_methods` lists the methods
with their options, defaults and papers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core import check_merge, merge_state_dicts
    from .record import RECORD_NAME
    from .registry import merge_methods
    from .streaming import MergeResult, merge

__all__ = [
    "RECORD_NAME",
    "MergeResult",
    "check_merge",
    "merge",
    "merge_methods",
    "merge_state_dicts",
]


def __getattr__(name: str):
    # torch takes seconds to import; reading how somebody else merged does without it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = {"RECORD_NAME": "record", "merge_methods": "registry"}
    modules |= {"MergeResult": "streaming", "merge": "streaming"}
    return getattr(import_module(f".{modules.get(name, 'core')}", __name__), name)
