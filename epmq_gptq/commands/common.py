"""What several commands share: their options, and what they print and write at the end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..console import Reporter
from ..errors import EPMQError, EPMQInputError
from ..options import parse_yaml, resolve_path
from ..summary import folder_size, human_size

Out = Annotated[Path, typer.Option("--out", help="Folder of the new checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show GPTQModel's own log, and tracebacks.")
]


def pairs(values: list[str], option: str) -> dict[str, str]:
    """``name=value`` options as a dict.

    Raises:
        EPMQInputError: one without a name or a value, or a name given twice.
    """
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            raise EPMQInputError(
                f"`{option}` should be of the form name=value, got `{value}`.",
                code="EPMQ-O01",
                subject=f"`{option}`",
                remedy="Write it so, without spaces around the sign.",
            )
        if name in pairs:
            raise EPMQInputError(
                f"`{option}`: `{name}` is given twice.",
                code="EPMQ-O01",
                subject=f"`{option}`",
                remedy="Keep one.",
            )
        pairs[name] = text
    return pairs


def values(values: list[str], option: str) -> dict[str, Any]:
    """``key=value`` options as a dict; values are read as YAML."""
    result = {}
    for key, value in pairs(values, option).items():
        try:
            result[key] = parse_yaml(value)
        except EPMQInputError as error:
            raise error.within(f"`{option} {key}`") from error
    return result


def place(path: Path) -> Path:
    """The path of an option; a shell leaves the ``~`` of ``--out=~/x`` as it is.

    Raises:
        EPMQInputError: it starts in the home of a user that this machine does not know.
    """
    return resolve_path(str(path), Path())


def write_error(file: Path | None, error: EPMQError) -> None:
    """What scripts read when there is no report; the place itself may be what is wrong."""
    if file is not None:
        with contextlib.suppress(OSError, EPMQInputError):
            text = json.dumps({"epmq_gptq": __version__, "error": error.to_dict()}, indent=2)
            place(file).write_text(text + "\n", encoding="utf-8")


def print_checkpoint(reporter: Reporter, out: Path) -> None:
    size, files = folder_size(out)
    reporter.step("checkpoint", f"{out}: {human_size(size)} in {files} files")
    if reporter.host.alarms:
        count = len(reporter.host.alarms)
        reporter.note(f"GPTQModel gave {count} warnings on the way; --verbose shows them.")
