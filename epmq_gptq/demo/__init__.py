"""The embedded default: small experts trained here, merged, quantized and compared.

run_demo(DemoOptions(out=Path("demo-4bit")), Console())
"""

from __future__ import annotations

from rich.console import Console

from .options import DemoOptions, DemoResult
from .quiet import quiet_host

__all__ = ["DemoOptions", "DemoResult", "run_demo"]


def run_demo(options: DemoOptions, console: Console) -> DemoResult:
    """Run the demo and print its table on ``console``; what it says is reported as it is.

    Raises:
        EPMQInputError: ``out`` is taken, or an option cannot be used.
    """
    with quiet_host():  # torch, transformers and GPTQModel speak while they are imported
        import gptqmodel  # noqa: F401

        from .run import Demo
    return Demo(options, console).run()
