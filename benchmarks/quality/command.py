"""What the commands over the suites share: their arguments, and what they say of a run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def names_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Reads comma-separated names, each one of ``known``."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(",") if part.strip())
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return read


def numbers(text: str) -> tuple[int, ...]:
    """Reads comma-separated whole numbers."""
    return tuple(int(part) for part in text.split(","))


def public(arguments: Sequence[str]) -> list[str]:
    """The arguments without the folders of this machine."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip or name in ("--out", "--work", "--cache", "--refresh"):
            skip = not skip and not equals
            continue
        kept.append(argument)
    return kept


def refreshed(text: str, sections: dict[str, str]) -> str:
    """``text`` with what stands between a suite's markers replaced by its tables."""
    for suite, tables in sections.items():
        begin, end = f"<!-- quality:{suite} -->", f"<!-- /quality:{suite} -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.S)
        replacement = f"{begin}\n{tables}{end}"
        text = pattern.sub(lambda _, new=replacement: new, text)
    return text


def machine(found: Mapping[str, Any]) -> str:
    """One phrase about hardware and versions, from ``evaluation.results.environment``."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    hardware = found["hardware"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    cores = f"{hardware['cores']} cores ({hardware['threads']} thread)"
    return f"{hardware['cpu']}, {cores}, {gpus}; {versions}"
