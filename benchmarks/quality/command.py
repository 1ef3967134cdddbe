"""What the commands over the suites share: their arguments, and what they say of a run."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .plan import SUITES, Options, Plan
from .runner import Runner


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


def add_shared(parser: argparse.ArgumentParser, root: Path, work: str) -> None:
    """The options that all commands have; ``work`` names the default folder of cells and logs."""
    add = parser.add_argument
    add("--suite", action="append", help=f"repeatable; default: {', '.join(SUITES)}")
    add("--samples", type=int, default=Options().samples, help="calibration rows per task")
    add("--quick", action="store_true", help="the suites' tiny versions")
    add("--device", help="default: a GPU where there is one")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 4), help="processes of one thread")
    add("--suites-from", default=Options().suites_from, help="module with `build_suite`")
    add("--resume", action="store_true", help="take finished cells of the same inputs and code")
    add("--cache", type=Path, help="of the suites; default: the user's cache folder")
    add("--work", type=Path, default=root / "out" / work, help="cells, merges and logs")
    add("--out", type=Path, default=root / "benchmarks" / "results")
    add("--refresh", type=Path, action="append", default=[], help="Markdown with our markers")


def shared_options(given: argparse.Namespace) -> dict[str, Any]:
    """Those of them that decide the figures, as of :class:`~quality.plan.Options`."""
    names = ("samples", "quick", "device", "suites_from")
    return {"suites": tuple(given.suite or SUITES)} | {n: getattr(given, n) for n in names}


def run_plan(plan: Plan, given: argparse.Namespace) -> tuple[Runner, dict[str, Any], float]:
    """Run it; the runner, the results by the names of their cells, and the seconds."""
    print(f"{len(plan.cells)} cells, {given.workers} workers; logs in {given.work / 'logs'}")
    start = time.perf_counter()
    runner = Runner(
        plan,
        given.work.absolute(),
        cache=None if given.cache is None else given.cache.absolute(),
        workers=given.workers,
        resume=given.resume,
        say=lambda line: print(line, flush=True),
    )
    results = runner.run()
    return runner, results, time.perf_counter() - start


def told_failures(results: Mapping[str, Mapping[str, Any]]) -> int:
    """Print the cells that failed; how many."""
    failed = [name for name, result in results.items() if "error" in result]
    for name in failed:
        print(f"failed: {name}: {results[name]['error']['message'][:300]}")
    return len(failed)


def recorded(
    script: str,
    arguments: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
    given: argparse.Namespace,
    seconds: float,
) -> dict[str, Any]:
    """All that tables are made of: command, seconds, versions, hardware, and the cells' figures."""
    from epmq_gptq.evaluation.results import environment

    found = environment()
    found["hardware"]["threads"] = f"{given.workers} workers of 1"
    cells = {
        name: {key: value for key, value in result.items() if key != "merged"}
        for name, result in results.items()
    }
    command = f"python benchmarks/{script} {shlex.join(public(arguments))}".strip()
    return {"command": command, "seconds": round(seconds, 1), **found, "cells": cells}


def machine(found: Mapping[str, Any]) -> str:
    """One phrase about hardware and versions, from ``evaluation.results.environment``."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    hardware = found["hardware"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    cores = f"{hardware['cores']} cores ({hardware['threads']} thread)"
    return f"{hardware['cpu']}, {cores}, {gpus}; {versions}"
