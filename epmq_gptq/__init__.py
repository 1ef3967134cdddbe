"""Expert-guided post-merge quantization (E-PMQ, arXiv 2605.16882) for GPTQModel.

Importing this package makes ``EPMQConfig``, CLIP and T5 known to GPTQModel:

    model = GPTQModel.load("path/to/merged", EPMQConfig(experts={...}))
    model.quantize({"math": math_rows, "code": code_rows}, batch_size=4)
    model.save("merged-4bit")

The commands of ``epmq-gptq`` are functions of the same names here, see ``epmq_gptq.api``:

    epmq_gptq.quantize("recipe.yaml", out="merged-4bit", progress=True)
"""

from typing import TYPE_CHECKING

from .errors import (
    EPMQDeviceError,
    EPMQError,
    EPMQHostError,
    EPMQInputError,
    EPMQNumericalError,
    EPMQStopped,
)
from .on_import import when_host_is_imported

if TYPE_CHECKING:
    from .api import (
        card,
        check,
        evaluate,
        explain,
        inspect,
        merge,
        methods,
        push,
        quantize,
        report,
        requantize,
        retention,
    )
    from .calibration.sources import RowSource
    from .config import EPMQConfig
    from .host.definitions.loading import load_clip
    from .report import ModuleReport, QuantizationReport

__version__ = "0.1.0"

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
    "evaluate",
    "explain",
    "inspect",
    "load_clip",
    "merge",
    "methods",
    "push",
    "quantize",
    "report",
    "requantize",
    "retention",
]

# No submodule may bear one of these names: importing it would put it in the function's place.
_COMMANDS = (
    *("quantize", "requantize", "inspect", "merge", "methods", "evaluate", "retention"),
    *("report", "check", "card", "push", "explain"),
)

when_host_is_imported()


def __getattr__(name: str):
    # GPTQModel takes seconds to import; merging, the errors and `--help` do without it.
    if name in _COMMANDS:
        from . import api

        return getattr(api, name)
    if name == "EPMQConfig":
        from .config import EPMQConfig
        from .host.door import install

        install()
        return EPMQConfig
    if name == "load_clip":
        from .host.definitions.loading import load_clip

        return load_clip
    if name in ("ModuleReport", "QuantizationReport"):
        from . import report as run_report

        return getattr(run_report, name)
    if name == "RowSource":
        from .calibration.sources import RowSource

        return RowSource
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
