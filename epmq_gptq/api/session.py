"""What all functions share: the frame of a call, and results that a notebook shows."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import EPMQWarning
from ..io.console import Reporter
from ..io.yaml_files import resolve_path

# Of a table in a notebook, whose cells scroll; `str()` of a result has it, too.
_WIDTH = 160
# Colours and lines of rich; the notebook keeps its own background, light or dark.
_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:1.2">{code}</pre>'


class Result:
    """What a function of this module returns.

    A notebook shows its table; ``str()`` is the same as plain text.
    """

    def to_dict(self) -> dict[str, Any]:
        """What the command writes with ``--json``, as plain data."""
        raise NotImplementedError

    def print_to(self, console: Console) -> None:
        """Print the tables that the command shows."""
        raise NotImplementedError

    def _recorded(self) -> Console:
        # force_jupyter: rich would otherwise display it right now.
        console = Console(
            file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False, force_terminal=True
        )
        self.print_to(console)
        return console

    def _repr_html_(self) -> str:
        return self._recorded().export_html(code_format=_HTML, inline_styles=True)

    def __str__(self) -> str:
        return self._recorded().export_text()


@contextlib.contextmanager
def session(progress: bool) -> Iterator[Reporter]:
    """The host is quiet and heard, our own warnings are Python's, in the caller's line."""
    reporter = Reporter(quiet=not progress)
    own: dict[str, EPMQWarning] = {}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EPMQWarning)
            try:
                yield reporter
            finally:
                own = {
                    str(each.message): each.message
                    for each in caught
                    if isinstance(each.message, EPMQWarning)
                }
    finally:
        for warning in own.values():
            # 1 is this line, 2 contextlib's, 3 the function of this module, 4 who called it.
            warnings.warn(warning, stacklevel=4)


def path_of(place: str | Path) -> Path:
    return resolve_path(str(place), Path())
