"""The embedded default: small experts trained here, merged, quantized and compared.

run_demo(DemoOptions(out=Path("demo-4bit")), Console())
"""

from __future__ import annotations

from contextlib import nullcontext

from rich.console import Console

from ...io.console import HostOutput, captured
from .table import DemoOptions, DemoResult

__all__ = ["DemoOptions", "DemoResult", "run_demo"]


def run_demo(options: DemoOptions, console: Console, *, quiet: bool = True) -> DemoResult:
    """Run the demo and print its table on ``console``.

    Args:
        quiet: keep GPTQModel's own output off the terminal.

    Raises:
        EPMQInputError: ``out`` is taken, or an option cannot be used.
    """
    # The stream it writes to now, whatever happens to `sys.stdout` meanwhile.
    console.file = console.file
    # From here on, because much of the host's noise comes from importing it.
    with captured(HostOutput()) if quiet else nullcontext():
        from .run import Demo

        return Demo(options, console).run()
