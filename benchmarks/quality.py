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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality import command  # noqa: E402
from quality import plan as plans  # noqa: E402
from quality.tables import Tables, csv_of, summary  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0, or 1 where a cell failed."""
    given = parser().parse_args(arguments)
    plan = plans.Plan(options_of(given))
    runner, results, seconds = command.run_plan(plan, given)
    arguments = list(arguments or sys.argv[1:])
    record = command.recorded("quality.py", arguments, results, given, seconds)
    write(plan, record | {"code": runner.facts["code"]}, given)
    failed = command.told_failures(results)
    print(f"{len(plan.cells)} cells in {seconds:.0f} s, {failed} failed; tables in {given.out}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The options, with defaults."""
    default = plans.Options()
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_shared(found, ROOT, "quality")
    add = found.add_argument
    add("--tables", type=command.names_of(plans.TABLES), default=default.tables)
    add("--mergers", type=command.names_of(default.mergers), default=default.mergers)
    add("--methods", type=command.names_of(default.methods), default=default.methods)
    add("--bits", type=command.numbers, default=default.bits, help="of the main table")
    add("--seeds", type=command.numbers, default=default.seeds, help="of the suites and the rows")
    add(
        "--budget", type=command.numbers, default=default.budget, help="rows per task of that table"
    )
    add("--batch-size", type=int, default=default.batch_size)
    add("--group-size", type=int, default=default.group_size)
    return found


def options_of(given: argparse.Namespace) -> plans.Options:
    """What decides the figures, of all that was given."""
    names = ("tables", "mergers", "methods", "bits", "budget", "seeds")
    own = {name: getattr(given, name) for name in (*names, "batch_size", "group_size")}
    return plans.Options(**command.shared_options(given), **own)


def write(plan: plans.Plan, record: dict[str, Any], given: argparse.Namespace) -> None:
    """The files of ``--out``, and the sections of ``--refresh``."""
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    record |= {"options": vars(plan.options)}
    text = json.dumps(record, indent=1, default=list) + "\n"
    (out / "quality.json").write_text(text, encoding="utf-8")
    results = record["cells"]
    (out / "quality.csv").write_text(csv_of(plan, results), encoding="utf-8")
    sections = {suite: Tables(plan, results, suite).markdown() for suite in plan.options.suites}
    head = heading(plan.options, record)
    body = "\n".join(f"## {suite}\n\n{text}" for suite, text in sections.items())
    if "main" in plan.options.tables:
        sections["summary"] = summary(plan, results)
        body = f"## All suites\n\n{sections['summary']}\n{body}"
    (out / "quality.md").write_text(f"{head}\n{body}", encoding="utf-8")
    for file in given.refresh:
        text = command.refreshed(file.read_text(encoding="utf-8"), sections)
        file.write_text(text, encoding="utf-8")


def heading(options: plans.Options, record: dict[str, Any]) -> str:
    """What the tables are, in which run, on which machine."""
    spent = sum(result.get("total_seconds", 0) for result in record["cells"].values())
    tiny = (
        " **Tiny models: these figures only show that everything runs.**" if options.quick else ""
    )
    return (
        "# Quality on the suites\n\n"
        f"`{record['command']}`: {record['seconds'] / 60:.1f} minutes ({spent / 60:.0f} of all "
        "workers together, earlier runs included), "
        f"{command.machine(record)}.{tiny}\n\n"
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
