"""Hooks of mkdocs: fill in what is drawn from the code, and keep links right in both readings."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generated  # noqa: E402
from links import OUTSIDE  # noqa: E402

DOCS = Path(__file__).parent.parent


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """What the markers stand for; files of the repository that are no pages lose their link.

    The pages are read on a code host as well, where a link to `../benchmarks/RESULTS.md` works. The
    site has no such page; links.py checks that the file is there.
    """
    return OUTSIDE.sub(lambda found: f"{found['text']}", generated.filled(markdown))


def on_page_content(html: str, *, page, config, files) -> str:
    """Docstrings name things by Sphinx's roles, which Markdown leaves as they are."""
    return re.sub(
        r":\w+:<code>~?([\w.]+)</code>",
        lambda found: f"<code>{found[1].rpartition('.')[2]}</code>",
        html,
    )
