"""GPTQModel and what it imports, kept off the terminal. Imports the standard library only."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Loggers that speak while the host is imported, loads or saves.
_NOISY = ("torchao", "torch.utils._pytree", "tokenicer", "transformers", "huggingface_hub")


@contextlib.contextmanager
def quiet_host(scratch: Path | None = None) -> Iterator[io.StringIO]:
    """Keep banners, log lines and progress bars off the terminal; errors raise as ever.

    Enter it before transformers and GPTQModel are first imported: much of the noise comes from
    the imports. What is printed meanwhile goes to the buffer that is yielded, on stdout and
    stderr alike, so a console that shall be seen must hold its own stream
    (``Console(file=sys.stdout)``).

    Args:
        scratch: a folder to work in meanwhile: the host writes ``./logs`` into the current one.
    """
    printed = io.StringIO()
    before = Path.cwd()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        from logbar import LogBar  # the host's logger; its import already prints a line

        loggers = [LogBar.shared(), *map(logging.getLogger, _NOISY)]
        levels = [logger.level for logger in loggers]
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            if scratch is not None:
                os.chdir(scratch)
            yield printed
        finally:
            os.chdir(before)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
