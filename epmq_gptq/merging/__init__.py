"""Merging of experts that share a base, streamed tensor by tensor.

    result = merge("ties", base="base", experts={"math": "a", "code": "b"}, out=Path("merged"))

:func:`merge` works on safetensors folders and holds one tensor name at a time;
:func:`merge_state_dicts` is the same maths on state dicts; :func:`merge_methods` lists the methods
with their options, defaults and papers.
"""

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
