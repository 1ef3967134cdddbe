"""The table of docs/reliability.md, from the markers of the tests: `python tests/faults/table.py`.

A marker is ``@pytest.mark.fault("F39", injected="…", outcome="…")`` with texts of Markdown.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
BLOCK = re.compile(r"(?<=<!-- faults -->\n).*?(?=<!-- /faults -->)", re.DOTALL)


class Fault(NamedTuple):
    """What one marker says."""

    code: str
    injected: str
    outcome: str


def faults() -> list[Fault]:
    """Those of all tests, by code, then in the order of the files."""
    found = []
    for file in sorted(HERE.parent.rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "mark.fault(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                texts = {one.arg: ast.literal_eval(one.value) for one in node.keywords}
                found.append(Fault(ast.literal_eval(node.args[0]), **texts))
    return sorted(found, key=lambda fault: fault.code)


def table() -> str:
    """Fault, how it is injected, what comes of it."""
    lines = ["| Fault | Injected how | Outcome |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(fault)} |" for fault in faults()]
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """The page with the table of today."""
    return BLOCK.sub(lambda _: table(), page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
