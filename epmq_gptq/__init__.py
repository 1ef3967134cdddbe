"""Expert-guided post-merge quantization (E-PMQ, arXiv 2605.16882) for GPTQModel.

Taking ``EPMQConfig`` from this package makes it known to GPTQModel:

    model = GPTQModel.load("path/to/merged", EPMQConfig(experts={...}))
    model.quantize({"math": math_rows, "code": code_rows}, batch_size=4)
    model.save("merged-4bit")
"""

from typing import TYPE_CHECKING

from .errors import EPMQError, EPMQHostError, EPMQInputError, EPMQNumericalError

if TYPE_CHECKING:
    from .config import EPMQConfig
    from .report import ModuleReport, QuantizationReport
    from .rows import RowSource

__version__ = "0.1.0"

__all__ = [
    "EPMQConfig",
    "EPMQError",
    "EPMQHostError",
    "EPMQInputError",
    "EPMQNumericalError",
    "ModuleReport",
    "QuantizationReport",
    "RowSource",
    "__version__",
]


def __getattr__(name: str):
    # GPTQModel takes seconds to import; merging, the errors and `--help` do without it.
    if name == "EPMQConfig":
        from .config import EPMQConfig
        from .host import install

        install()
        return EPMQConfig
    if name in ("ModuleReport", "QuantizationReport"):
        from . import report

        return getattr(report, name)
    if name == "RowSource":
        from .rows import RowSource

        return RowSource
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
