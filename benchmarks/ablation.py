"""Which part of E-PMQ pays: suites x mergers x bits x seeds, as recovery of what merging lost.

    python benchmarks/ablation.py                          # three seeds, all suites
    python benchmarks/ablation.py --suite text4 --seeds 0

The default profile is what this table says. Writes ablation.md and ablation.csv to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality import command  # noqa: E402
from quality import plan as plans  # noqa: E402
from quality.ablation import Ablation, AblationPlan  # noqa: E402
from quality.tables import csv_of  # noqa: E402

RECORD = "ablation.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0, or 1 where a cell failed."""
    given = parser().parse_args(arguments)
    options = plans.Options(
        **command.shared_options(given), mergers=given.mergers, bits=(4, 3), seeds=given.seeds
    )
    plan = AblationPlan(options)
    if given.render:
        record = json.loads((given.out / RECORD).read_text(encoding="utf-8"))
        write(plan, record, given)
        return 0
    _, results, seconds = command.run_plan(plan, given)
    arguments = list(arguments or sys.argv[1:])
    write(plan, command.recorded("ablation.py", arguments, results, given, seconds), given)
    return 1 if command.told_failures(results) else 0


def parser() -> argparse.ArgumentParser:
    """The options, with defaults."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_shared(found, ROOT, "ablation")
    add = found.add_argument
    add("--mergers", type=command.names_of(tuple(plans.MERGERS)), default=tuple(plans.MERGERS))
    add("--seeds", type=command.numbers, default=(0, 1, 2), help="of the suites and the rows")
    add("--render", action="store_true", help="only write the tables of the last run anew")
    return found


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
        f"`{record['command']}`: {record['seconds'] / 60:.0f} minutes, "
        f"{command.machine(record)}.{tiny}\n\n"
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
        text = command.refreshed(file.read_text(encoding="utf-8"), sections)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
