"""Expert-guided post-merge quantization (E-PMQ, arXiv 2605.16882) for GPTQModel.

The commands of ``epmq-gptq`` are functions of the same names here, with the same options:

    epmq_gptq.quantize("recipe.yaml", out="merged-4bit", progress=True)

GPTQModel's own three calls do the same:

    model = GPTQModel.load("path/to/merged", EPMQConfig(experts={...}))
    model.quantize({"math": math_rows, "code": code_rows}, batch_size=4)
    model.save("merged-4bit")

GPTQModel knows ``EPMQConfig``, CLIP and T5 from ``from epmq_gptq import EPMQConfig`` on, or from
:func:`install`, or from ``import epmq_gptq`` if GPTQModel was imported before.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from .errors import (
    EPMQDeviceError,
    EPMQError,
    EPMQHostError,
    EPMQInputError,
    EPMQNumericalError,
    EPMQStopped,
)

if TYPE_CHECKING:
    from .calibration.sources import RowSource
    from .commands.card import card
    from .commands.check import check
    from .commands.demo import demo
    from .commands.evaluate import evaluate
    from .commands.explain import explain
    from .commands.inspect import inspect
    from .commands.merge import merge, methods
    from .commands.push import push
    from .commands.quantize import quantize
    from .commands.report import report
    from .commands.requantize import requantize
    from .commands.retention import retention
    from .config import EPMQConfig
    from .host.definitions.loading import load_clip
    from .run_report import ModuleReport, QuantizationReport

__version__ = "0.1.0"

# GPTQModel takes seconds to import, torch too; merging, the errors and `--help` do without them.
_OPERATIONS = {
    name: f"commands.{'merge' if name == 'methods' else name}"
    for name in (
        *("quantize", "requantize", "inspect", "merge", "methods", "evaluate", "retention"),
        *("report", "check", "card", "push", "demo", "explain"),
    )
}
_HOMES = _OPERATIONS | {
    "EPMQConfig": "config",
    "load_clip": "host.definitions.loading",
    "ModuleReport": "run_report",
    "QuantizationReport": "run_report",
    "RowSource": "calibration.sources",
}

__all__ = [
    "EPMQConfig",
    "EPMQDeviceError",
    "EPMQError",
    "EPMQHostError",
    "EPMQInputError",
    "EPMQNumericalError",
    "EPMQStopped",
    "ModuleReport",
    "QuantizationReport",
    "RowSource",
    "__version__",
    "card",
    "check",
    "demo",
    "evaluate",
    "explain",
    "inspect",
    "install",
    "load_clip",
    "merge",
    "methods",
    "push",
    "quantize",
    "report",
    "requantize",
    "retention",
]


def install() -> None:
    """Make ``EPMQConfig``, CLIP and T5 known to GPTQModel."""
    importlib.import_module(".host.door", __name__).install()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name in ("EPMQConfig", "load_clip"):
        install()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Not while it is being imported itself: what it imports may import us.
if hasattr(sys.modules.get("gptqmodel"), "GPTQModel"):
    install()
