"""Everything that can be said of a run before any compute: ``epmq-gptq inspect``.

One file per question, each a pure function of stores and plain values; :func:`preflight` asks all
of them. Nothing here needs GPTQModel.
"""

from .check import VERIFY, Wanted, preflight
from .findings import Finding, Preflight

__all__ = ["VERIFY", "Finding", "Preflight", "Wanted", "preflight"]
