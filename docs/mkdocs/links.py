"""Links of the README and of the pages: files and headings must be there, addresses well formed.

mkdocs checks the links between its pages; this checks what it does not see: the README, files of
the repository outside docs/, and the form of external addresses. Nothing is fetched.

    python docs/mkdocs/links.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from markdown_it import MarkdownIt

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
# A link of a page of docs/ that leads out of it.
OUTSIDE = re.compile(r"\[(?P<text>[^\]\[]*)\]\((?P<target>\.\./[^)\s]+)\)")
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}|localhost|127\.0\.0\.1")


def files() -> list[Path]:
    """Every Markdown file whose links are checked."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def links(text: str) -> Iterator[str]:
    """The targets of all links and images of a Markdown text."""
    for token in MarkdownIt().enable("table").parse(text):
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield str(target)


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as code hosts make them."""
    found: dict[str, int] = {}
    tokens = MarkdownIt().parse(text)
    for token, inline in zip(tokens, tokens[1:], strict=False):
        if token.type != "heading_open":
            continue
        words = "".join(
            child.content
            for child in inline.children or []
            if child.type in ("text", "code_inline")
        )
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {
        slug if n == 0 else f"{slug}-{n}" for slug, last in found.items() for n in range(last + 1)
    }


def fault(file: Path, target: str) -> str | None:
    """What is wrong with a link of ``file``, or None."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        well_formed = parts.hostname is not None and _HOST.fullmatch(parts.hostname)
        return None if well_formed and not re.search(r"\s", target) else "no web address"
    if parts.scheme == "mailto":
        return None if "@" in parts.path else "no mail address"
    if parts.scheme or parts.netloc or target.startswith("/"):
        return "neither a web address nor a relative path"
    place = (file.parent / parts.path).resolve() if parts.path else file
    if not place.is_relative_to(ROOT):
        return "leads out of the repository"
    if not place.exists():
        return "no such file"
    # Headings of pages that mkdocs fills in are mkdocs' to check.
    if parts.fragment and place.suffix == ".md" and not place.is_relative_to(DOCS):
        if parts.fragment not in anchors(place.read_text(encoding="utf-8")):
            return "no such heading"
    return None


def faults() -> list[str]:
    """``file: target: what is wrong`` for every broken link."""
    found = []
    for file in files():
        for target in links(file.read_text(encoding="utf-8")):
            wrong = fault(file, target)
            if wrong is not None:
                found.append(f"{file.relative_to(ROOT)}: {target}: {wrong}")
    return found


def main() -> None:
    broken = faults()
    for line in broken:
        sys.stderr.write(f"{line}\n")
    count = sum(1 for file in files() for _ in links(file.read_text(encoding="utf-8")))
    sys.stdout.write(f"{count} links in {len(files())} files, {len(broken)} broken\n")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
