"""The quality tables: every merger, quantizer and bit width in one run and one harness.

    python benchmarks/quality.py                        # all suites and tables
    python benchmarks/quality.py --suite text4 --tables main --bits 4
    python benchmarks/quality.py --quick --suite text4  # tiny models, only to see that it runs

Base, experts and merges in full precision and every quantized model are loaded from their folder
by one loader and scored on the same rows; a quantized model is always the saved checkpoint, read
again. Before a merge's figures count, its folder must score as the same merge in memory. The alpha
of E-PMQ and the gamma of RegMean are the paper's, and, in rows of their own, those that were best
on held-out rows. A cell that fails is in the table by the name of its error; the exit code is 1.

Writes quality.csv, quality.md and quality.json to --out; --refresh FILE puts the tables between
`<!-- quality:vision8 -->` and `<!-- /quality:vision8 -->` of a Markdown file.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality import plan as plans  # noqa: E402
from quality.command import machine, names_of, numbers, public, refreshed  # noqa: E402
from quality.runner import Runner  # noqa: E402
from quality.tables import Tables, csv_of, summary  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0, or 1 where a cell failed."""
    given = parser().parse_args(arguments)
    options = options_of(given)
    plan = plans.Plan(options)
    start = time.perf_counter()
    print(f"{len(plan.cells)} cells, {given.workers} workers; logs in {given.work / 'logs'}")
    runner = Runner(
        plan,
        given.work.absolute(),
        cache=None if given.cache is None else given.cache.absolute(),
        workers=given.workers,
        resume=given.resume,
        say=lambda line: print(line, flush=True),
    )
    results = runner.run()
    seconds = time.perf_counter() - start
    write(plan, results, given, runner.facts, seconds, list(arguments or sys.argv[1:]))
    failed = [name for name, result in results.items() if "error" in result]
    print(
        f"{len(plan.cells)} cells in {seconds:.0f} s, {len(failed)} failed; tables in {given.out}"
    )
    for name in failed:
        print(f"failed: {name}: {results[name]['error']['message'][:300]}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The options, with defaults."""
    default = plans.Options()
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--suite", action="append", help=f"repeatable; default: {', '.join(plans.SUITES)}")
    add("--tables", type=names_of(plans.TABLES), default=default.tables, help="comma-separated")
    add("--mergers", type=names_of(default.mergers), default=default.mergers)
    add("--methods", type=names_of(default.methods), default=default.methods)
    add("--bits", type=numbers, default=default.bits, help="of the main table")
    add("--seeds", type=numbers, default=default.seeds, help="of the suites and the rows")
    add("--samples", type=int, default=default.samples, help="calibration rows per task")
    add("--budget", type=numbers, default=default.budget, help="rows per task of that table")
    add("--batch-size", type=int, default=default.batch_size)
    add("--group-size", type=int, default=default.group_size)
    add("--quick", action="store_true", help="the suites' tiny versions")
    add("--device", help="default: a GPU where there is one")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 4), help="processes of one thread")
    add(
        "--suites-from", default=default.suites_from, help="module with `build_suite`, for own ones"
    )
    add("--resume", action="store_true", help="take finished cells of the same inputs and code")
    add("--cache", type=Path, help="of the suites; default: the user's cache folder")
    add("--work", type=Path, default=ROOT / "out" / "quality", help="cells, merges and logs")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results")
    add("--refresh", type=Path, action="append", default=[], help="Markdown with our markers")
    return found


def options_of(given: argparse.Namespace) -> plans.Options:
    """What decides the figures, of all that was given."""
    return plans.Options(
        suites=tuple(given.suite or plans.SUITES),
        tables=given.tables,
        mergers=given.mergers,
        methods=given.methods,
        bits=given.bits,
        budget=given.budget,
        seeds=given.seeds,
        samples=given.samples,
        batch_size=given.batch_size,
        group_size=given.group_size,
        quick=given.quick,
        device=given.device,
        suites_from=given.suites_from,
    )


def write(
    plan: plans.Plan,
    results: dict[str, Any],
    given: argparse.Namespace,
    facts: dict[str, Any],
    seconds: float,
    arguments: Sequence[str],
) -> None:
    """The files of ``--out``, and the sections of ``--refresh``."""
    from epmq_gptq.evaluation.results import environment

    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    found = environment()
    found["hardware"]["threads"] = f"{given.workers} workers of 1"
    command = f"python benchmarks/quality.py {shlex.join(public(arguments))}".strip()
    record = {
        "command": command,
        "seconds": round(seconds, 1),
        **found,
        "code": facts["code"],
        "options": vars(plan.options),
        "cells": results,
    }
    for name, result in results.items():
        results[name] = {key: value for key, value in result.items() if key != "merged"}
    (out / "quality.json").write_text(
        json.dumps(record, indent=1, default=list) + "\n", encoding="utf-8"
    )
    (out / "quality.csv").write_text(csv_of(plan, results), encoding="utf-8")
    sections = {suite: Tables(plan, results, suite).markdown() for suite in plan.options.suites}
    head = heading(plan.options, found, command, seconds)
    body = "\n".join(f"## {suite}\n\n{text}" for suite, text in sections.items())
    if "main" in plan.options.tables:
        sections["summary"] = summary(plan, results)
        body = f"## All suites\n\n{sections['summary']}\n{body}"
    (out / "quality.md").write_text(f"{head}\n{body}", encoding="utf-8")
    for file in given.refresh:
        text = refreshed(file.read_text(encoding="utf-8"), sections)
        file.write_text(text, encoding="utf-8")


def heading(options: plans.Options, found: dict[str, Any], command: str, seconds: float) -> str:
    """What the tables are, in which run, on which machine."""
    tiny = (
        " **Tiny models: these figures only show that everything runs.**" if options.quick else ""
    )
    return (
        "# Quality on the suites\n\n"
        f"`{command}`: {seconds / 60:.1f} minutes, {machine(found)}.{tiny}\n\n"
        f"Groups of {options.group_size}, {options.samples} calibration rows per task, the same "
        "for every method that takes any; seeds "
        f"{', '.join(map(str, options.seeds))}. Every quantized row is the saved checkpoint, read "
        "again, its packed weights computed in float32 as those of the merge are. AWQ is "
        "quantized from the merge in bfloat16, as GPTQModel does it on a CPU. Δ: points against "
        "the merge in full precision. α and γ by held-out rows: chosen by accuracy on rows that "
        f"are neither calibrated on nor shown here, at {options.bits[0]} bits.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
