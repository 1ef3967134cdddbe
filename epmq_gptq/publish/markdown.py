"""Text of strangers in Markdown: names stay text, whatever they hold."""

from __future__ import annotations

import re

# Characters of a name; a model card has room for no more.
MAX_TEXT = 200
# What means nothing in Markdown, LaTeX or HTML, in any place; an underscore may begin emphasis.
_PLAIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 .,+/-]|(?<=[A-Za-z0-9])_(?=[A-Za-z0-9]))*")
# Renderers make links of these on their own.
_LINKS = re.compile(r"www\.|//", re.IGNORECASE)
_CODE = re.compile(r"[\w./@:+=-]+", re.ASCII)


def one_line(text: object) -> str:
    """Printable characters in one line, cut at :data:`MAX_TEXT`."""
    line = "".join(char if char.isprintable() else " " for char in str(text))
    line = " ".join(line.split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def plain(text: object) -> str:
    """Text that no renderer takes for a heading, a link, a table's border, HTML or a formula.

    Punctuation becomes character references, which Markdown never reads as structure.
    """
    line = one_line(text)
    if _PLAIN.fullmatch(line) and not _LINKS.search(line):
        return line
    return "".join(
        char if char.isalnum() or char == " " or not char.isascii() else f"&#{ord(char)};"
        for char in line
    )


def code(text: object) -> str:
    """Text as a code span where it can be one, else as :func:`plain` text."""
    line = one_line(text)
    return f"`{line}`" if _CODE.fullmatch(line) else plain(line)
