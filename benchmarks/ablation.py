"""Which part of E-PMQ pays: suites x mergers x bits x seeds, as recovery of what merging lost.

    python benchmarks/ablation.py                          # three seeds, all suites
    python benchmarks/ablation.py --suite text4 --seeds 0

The default profile is what this table says. Writes ablation.md and ablation.csv to --out.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality import plan as plans  # noqa: E402
from quality.ablation import Ablation, AblationPlan  # noqa: E402
from quality.command import machine, names_of, numbers, public, refreshed  # noqa: E402
from quality.runner import Runner  # noqa: E402
from quality.tables import csv_of  # noqa: E402

RECORD = "ablation.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0, or 1 where a cell failed."""
    given = parser().parse_args(arguments)
    options = plans.Options(
        suites=tuple(given.suite or plans.SUITES),
        mergers=given.mergers,
        bits=(4, 3),
        seeds=given.seeds,
        samples=given.samples,
        quick=given.quick,
        device=given.device,
        suites_from=given.suites_from,
    )
    plan = AblationPlan(options)
    if given.render:
        record = json.loads((given.out / RECORD).read_text(encoding="utf-8"))
        write(plan, record, given)
        return 0
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
    command = f"python benchmarks/ablation.py {shlex.join(public(arguments or sys.argv[1:]))}"
    seconds = time.perf_counter() - start
    write(plan, recorded(results, given, command.strip(), seconds), given)
    failed = [name for name, result in results.items() if "error" in result]
    for name in failed:
        print(f"failed: {name}: {results[name]['error']['message'][:300]}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The options, with defaults."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--suite", action="append", help=f"repeatable; default: {', '.join(plans.SUITES)}")
    add("--mergers", type=names_of(tuple(plans.MERGERS)), default=tuple(plans.MERGERS))
    add("--seeds", type=numbers, default=(0, 1, 2), help="of the suites and the rows")
    add("--samples", type=int, default=64, help="calibration rows per task")
    add("--quick", action="store_true", help="the suites' tiny versions")
    add("--device", help="default: a GPU where there is one")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 4), help="processes of one thread")
    add("--suites-from", default="epmq_gptq.suites", help="module with `build_suite`")
    add("--resume", action="store_true", help="take finished cells of the same inputs and code")
    add("--render", action="store_true", help="only write the tables of the last run anew")
    add("--cache", type=Path, help="of the suites; default: the user's cache folder")
    add("--work", type=Path, default=ROOT / "out" / "ablation", help="cells, merges and logs")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results")
    add("--refresh", type=Path, action="append", default=[], help="Markdown with our markers")
    return found


def recorded(results: dict, given: argparse.Namespace, command: str, seconds: float) -> dict:
    """All that the tables are made of."""
    from epmq_gptq.evaluation.results import environment

    found = environment()
    found["hardware"]["threads"] = f"{given.workers} workers of 1"
    cells = {
        name: {key: value for key, value in result.items() if key != "merged"}
        for name, result in results.items()
    }
    return {"command": command, "seconds": seconds, **found, "cells": cells}


def write(plan: AblationPlan, record: dict, given: argparse.Namespace) -> None:
    """The files of ``--out``, and the sections of ``--refresh``."""
    given.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (given.out / RECORD).write_text(text, encoding="utf-8")
    results = record["cells"]
    tables = Ablation(plan, results)
    options = plan.options
    tiny = " **Tiny models: these figures only show that it runs.**" if options.quick else ""
    head = (
        "# Ablation on the suites\n\n"
        f"`{record['command']}`: {record['seconds'] / 60:.0f} minutes, {machine(record)}.{tiny}\n\n"
        "recovery = (score − merged) / (experts − merged) of average accuracy: 0 is the merge in "
        "full precision, 100 every expert on its own task. Mean ± standard deviation over seeds "
        f"{', '.join(map(str, options.seeds))} (data, models and rows); {options.samples} "
        f"calibration rows per task, groups of {options.group_size}. Of the lines from "
        '"α by held-out rows" to "+ residual correction" each has one thing more than the line '
        "before; the four after them change one thing of the last. The models of text4 and "
        "seq2seq4 have no biases.\n\n"
    )
    (given.out / "ablation.md").write_text(head + tables.markdown(), encoding="utf-8")
    (given.out / "ablation.csv").write_text(csv_of(plan, results), encoding="utf-8")
    for file in given.refresh:
        sections = {
            "ablation": f"{tables.summary()}\n\n{tables.goals()}\n",
            "recovery": f"{tables.summary()}\n",
        }
        text = refreshed(file.read_text(encoding="utf-8"), sections)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
