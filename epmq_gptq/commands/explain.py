"""``explain``: what an error code means, from docs/troubleshooting.md."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import CODES, EPMQError, EPMQInputError
from ..io.console import Reporter
from .operation import Form, Result, operation

# One section of the page.
_SECTION = re.compile(
    r"^### (?P<code>EPMQ-\w+)\n\n"
    r"\*\*(?P<title>.+?)\.\*\*(?: (?P<means>.+))?\n\n"
    r"\*Usually:\* (?P<cause>.+)\n\n"
    r"\*What to do:\* (?P<remedy>.+)\n\n"
    r"``` \{ \.text \.wrap \}\n(?P<example>.+)\n```$",
    re.MULTILINE,
)


def page() -> Path:
    """docs/troubleshooting.md, of this checkout or as the installed package brings it along."""
    package = Path(__file__).parents[1]
    shipped = package / "troubleshooting.md"
    return shipped if shipped.is_file() else package.parent / "docs" / "troubleshooting.md"


def sections() -> dict[str, dict[str, str]]:
    """Code → ``code``, ``title``, ``means``, ``cause``, ``remedy``, ``example``."""
    found = {}
    for section in _SECTION.finditer(page().read_text(encoding="utf-8")):
        entry = {name: text or "" for name, text in section.groupdict().items()}
        found[entry["code"]] = entry | {"title": CODES.get(entry["code"], entry["title"])}
    return found


@dataclass(frozen=True, repr=False)
class ExplainResult(Result):
    """What an error code means.

    Attributes:
        entry: ``code``, ``title``, ``means``, ``cause``, ``remedy``, ``example``.
    """

    entry: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.entry)

    def print_to(self, console: Console) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_row(Text(self.entry["code"], "bold"), Text(f"{self.entry['title']}.", "bold"))
        labels = {"means": "", "cause": "usually", "remedy": "what to do", "example": "example"}
        for key, label in labels.items():
            if self.entry[key]:
                grid.add_row(Text(label, "dim"), Text(self.entry[key]))
        console.print(grid)

    def __repr__(self) -> str:
        return f"<ExplainResult {self.entry['code']}: {self.entry['title']}>"


@dataclass(frozen=True, repr=False)
class Codes(Result):
    """All error codes.

    Attributes:
        entries: of each code, in the order of the page.
    """

    entries: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        return {"codes": self.entries}

    def print_to(self, console: Console) -> None:
        table = Table("code", "what it stands for")
        for entry in self.entries:
            table.add_row(entry["code"], Text(entry["title"]))
        console.print(table)

    def __repr__(self) -> str:
        return f"<Codes: {len(self.entries)}>"


def _completed(incomplete: str) -> list[str]:
    """The codes, also by their last part: ``F3`` gives EPMQ-F30 and those after it."""
    start = incomplete.upper()
    return [code for code in CODES if code.startswith(start)] or [
        code for code in CODES if code.removeprefix("EPMQ-").startswith(start)
    ]


@operation(
    ("the code at the end of an error", "epmq-gptq explain EPMQ-F30"),
    ("its last part is enough", "epmq-gptq explain f30"),
    ("all codes there are", "epmq-gptq explain"),
)
def explain(
    code: Annotated[
        str | EPMQError | None,
        typer.Argument(help="Such as EPMQ-F30; without it all codes.", autocompletion=_completed),
        Form(str, python_help="Or the error itself."),
    ] = None,
    *,
    reporter: Reporter,
) -> ExplainResult | Codes:
    """Say what an error code means, why it usually comes, and what to do.

    Raises:
        EPMQInputError: there is no such code.
    """
    known = sections()
    if code is None:
        return Codes(list(known.values()))
    given = code.code if isinstance(code, EPMQError) else code
    short = given.strip().strip("[]").upper()
    full = short if short.startswith("EPMQ-") else f"EPMQ-{short}"
    if full in known:
        return ExplainResult(known[full])
    from ..io.declared import closest

    meant = closest(full, known)
    raise EPMQInputError(
        f"`{given[:40]}` is no error code.",
        code="EPMQ-O02",
        subject="the code",
        remedy=f"Did you mean `{meant}`?" if meant else "They look like EPMQ-F30.",
    )
