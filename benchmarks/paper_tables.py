"""The paper's tables from the hub's models and data, full precision and 4 bits in one harness.

    python benchmarks/paper_tables.py --table 1 --device cuda --out results/paper
    python benchmarks/paper_tables.py --table 3 --table 6 --model flan-t5-base
    python benchmarks/paper_tables.py --table 1 --tasks mnist svhn --limit 500   # a quick look

Needs the extra ``paper`` (and ``eval`` for Table 4), a connection to the hub, and for Table 4 its
gated Llama models. Every finished cell is kept under ``OUT/cells``; the same command goes on where
it stopped. Writes ``table<N>.md``, ``.csv`` and ``.json`` for each table, and ends with 1 if a cell
failed, with 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Two OpenMP threads make GPTQ's column loop up to 10x slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from paper.specs import FAMILIES, METHODS, SUITES, TITLES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [*map(str, range(1, 13)), "figure3"]
    tasks = sorted({task for suite in SUITES.values() for task in suite})
    found = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--table", action="append", choices=names, help="may be repeated; default: 1")
    add("--model", action="append", choices=list(FAMILIES), help="only these models of a table")
    add("--tasks", nargs="+", choices=tasks, metavar="TASK", help="only these tasks of a suite")
    add("--mergers", nargs="+", choices=list(TITLES), metavar="MERGER", help="only these rows")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="only these rows")
    add("--limit", type=_count, help="evaluated items per task at most (drawn, not the first)")
    add("--samples", type=_count, help="calibration rows per task, in place of the paper's")
    add("--seed", type=int, default=0, help="of the calibration rows")
    add("--device", default=None, help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the evaluation")
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2), help="prepare images")
    add("--out", type=Path, default=Path("results/paper"), help="tables and finished cells")
    add("--cache", type=Path, default=Path("cache/paper"), help="copies of models, and merges")
    add("--keep", action="store_true", help="keep the quantized checkpoints in the cache")
    add("--revision", action="append", default=[], metavar="ID=REVISION", help="pin a hub model")
    add(
        "--allow-bin",
        action="store_true",
        help="let transformers convert hub models whose only weights are PyTorch .bin files",
    )
    add(
        "--allow-code-execution",
        action="store_true",
        help="Table 4: run code that the models write (HumanEval, MBPP+); without, both are left "
        "out",
    )
    add("--list", action="store_true", help="name the cells and stop")
    return found


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, got {value}")
    return value


def chosen(options: argparse.Namespace) -> dict[str, list]:
    """Table → cells, after ``--model``, ``--tasks``, ``--mergers`` and ``--methods``."""
    from paper.tables import TABLES

    found = {}
    for name in dict.fromkeys(options.table or ["1"]):
        cells = []
        for family, suite in TABLES[name].blocks:
            if options.model and family not in options.model:
                continue
            if options.tasks and not set(options.tasks) & set(SUITES[suite]):
                continue
            cells += TABLES[name].cells(family, suite)
        if options.mergers:
            cells = [cell for cell in cells if cell.merger in options.mergers]
        if options.methods:
            cells = [cell for cell in cells if cell.method in options.methods]
        if cells:
            found[name] = cells
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and write the tables; the exit code."""
    options = parser().parse_args(arguments)
    pins = dict(pin.partition("=")[::2] for pin in options.revision)
    if any(not name or not revision for name, revision in pins.items()):
        parser().error("--revision should be ID=REVISION")
    cells = chosen(options)
    if not cells:
        parser().error("no cell of these tables is of these models, tasks, mergers and methods")
    if options.list:
        for name, each in cells.items():
            for cell in each:
                print(f"{name}\t{cell.family}\t{cell.suite}\t{cell.key}")
        return 0
    from epmq_gptq.errors import EPMQError

    try:
        return _run(options, cells, pins, arguments)
    except EPMQError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 2


def _run(
    options: argparse.Namespace,
    cells: dict[str, list],
    pins: dict[str, str],
    arguments: Sequence[str] | None,
) -> int:
    import torch
    from paper.cells import Runner, Settings
    from paper.models import Fetcher
    from paper.report import Line, markdown, rows_csv, rows_json
    from paper.tables import TABLES

    from epmq_gptq.evaluation.results import environment

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(
        out=options.out.resolve(),
        cache=options.cache.resolve(),
        device=device,
        tasks=tuple(options.tasks or ()),
        limit=options.limit,
        samples=options.samples,
        seed=options.seed,
        dtype=options.dtype,
        keep=options.keep,
        workers=options.workers,
        runs_code=options.allow_code_execution,
    )

    def log(text: str) -> None:
        print(f"[paper] {text}", file=sys.stderr, flush=True)

    about = {"environment": _with_fusion_bench(environment()), "limit": options.limit}
    # Without places, which are of one machine only.
    given = list(sys.argv[1:] if arguments is None else arguments)
    for place in ("--out", "--cache"):
        if place in given:
            del given[given.index(place) : given.index(place) + 2]
    about["command"] = " ".join(["python benchmarks/paper_tables.py", *given])
    fetcher = Fetcher(settings.cache, log, pins, options.allow_bin)
    runner = Runner(settings, fetcher, log, about["environment"])
    settings.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, each in cells.items():
        lines = []
        for cell in each:
            result = runner.run(cell)
            columns = runner.bench(cell.family, cell.suite).columns
            lines.append(Line(cell, result, columns))
            failed |= result["failed"] is not None
        stem = name if name == "figure3" else f"table{name}"
        (settings.out / f"{stem}.md").write_text(
            markdown(TABLES[name], lines, about), encoding="utf-8"
        )
        (settings.out / f"{stem}.csv").write_text(rows_csv(TABLES[name], lines), encoding="utf-8")
        (settings.out / f"{stem}.json").write_text(rows_json(lines, about), encoding="utf-8")
        print(markdown(TABLES[name], lines, about))
    return int(failed)


def _with_fusion_bench(environment: dict) -> dict:
    from importlib.metadata import version

    environment["versions"]["fusion-bench"] = version("fusion-bench")
    return environment


if __name__ == "__main__":
    sys.exit(main())
