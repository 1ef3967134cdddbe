"""Which engines can serve a quantized model, and why not: one set of rules with their sources.

The rules judge an export that is planned (the preflight) and a finished checkpoint
(:func:`check_checkpoint`, ``epmq-gptq check``).
"""

from .check import ServingReport, check_checkpoint
from .table import ENGINES

__all__ = ["ENGINES", "ServingReport", "check_checkpoint"]
