"""The tables at the end of a run, from a :class:`QuantizationReport`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..calibration.encoded import RowCounts
from ..io.console import human_size
from ..run_report import ModuleReport, QuantizationReport

# With more layers than this one line stands for all layers of a kind, unless `--full` is given.
MAX_LINES = 40

_TARGETS = {"merged": "kept the merged weight as its target", "rtn": "rounded to nearest"}
_LEGEND = "excess: eq. 12 above its optimum, rounded; merge excess: the same of the unrounded merge"
_COLUMNS = ("bits", "target", "alpha", "loss", "excess", "merge excess", "tokens", "seconds")
_STYLES = {"merged": "yellow", "rtn": "bold red"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def print_summary(
    console: Console,
    report: QuantizationReport,
    rows: Mapping[str, RowCounts],
    *,
    full: bool = False,
) -> None:
    """Modules (or kinds of modules), exceptions and experts."""
    if full or len(report.modules) <= MAX_LINES:
        console.print(module_table(report))
    else:
        console.print(kind_table(report))
        console.print("one line per kind of layer; --full shows every layer", style="dim")
    console.print(_LEGEND, style="dim")
    for module in report.exceptions:
        console.print(
            Text(
                f"! {module.module}: {_TARGETS.get(module.target, module.target)}: {module.reason}",
                _STYLES.get(module.target, ""),
            ),
            soft_wrap=True,
        )
    for name, reason in report.left.items():
        text = f"! expert `{name}` was not run to the end, so its targets are the paper's: {reason}"
        console.print(Text(text, "yellow"), soft_wrap=True)
    if report.phases:
        console.print(phase_line(report), style="dim", soft_wrap=True)
    if rows:
        console.print(expert_table(rows))


def phase_line(report: QuantizationReport) -> str:
    """Seconds by phase, the longest first, and the memory at the peak."""
    spent = sorted(report.phases.items(), key=lambda phase: -phase[1])
    told = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in spent)
    peaks = (f"{human_size(size)} ({name})" for name, size in report.peak_memory.items())
    return f"spent {report.seconds:.1f} s: {told}; peak memory {', '.join(peaks)}"


def module_table(report: QuantizationReport) -> Table:
    """One line per linear layer, in forward order."""
    table = _table("module")
    for module in report.modules:
        table.add_row(
            module.module, *_cells([module], module.target), style=_STYLES.get(module.target)
        )
    _add_total(table, report)
    return table


def kind_table(report: QuantizationReport) -> Table:
    """One line per kind of layer: the same name with other numbers in it."""
    kinds: dict[str, list[ModuleReport]] = {}
    for module in report.modules:
        kinds.setdefault(_NUMBER.sub("*", module.module), []).append(module)
    table = _table("modules")
    for kind, modules in kinds.items():
        odd = sum(m.target != "experts" for m in modules)
        target = f"experts, {odd} not" if odd else "experts"
        table.add_row(
            f"{kind} ({len(modules)})", *_cells(modules, target), style="yellow" if odd else None
        )
    _add_total(table, report)
    return table


def _table(first: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for name in _COLUMNS[2:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_total(table: Table, report: QuantizationReport) -> None:
    table.add_section()
    cells = _cells(report.modules, "")
    # The rows of the run, not the sum over layers that all saw the same ones.
    cells[_COLUMNS.index("tokens")] = f"{sum(report.tokens.values()):,}"
    cells[_COLUMNS.index("seconds")] = f"{report.seconds:.1f}"
    table.add_row(f"all {len(report.modules)} (wall time)", *cells, style="bold")


def _cells(modules: list[ModuleReport], target: str) -> list[str]:
    """One cell for each of ``_COLUMNS``; of several modules a range, a mean (loss) or a sum."""
    alphas = sorted({m.alpha for m in modules if m.alpha is not None})
    bits = sorted({m.bits for m in modules})
    losses = [m.loss for m in modules if m.loss is not None]
    excesses = [m.excess for m in modules if m.excess is not None]
    tokens = sorted({sum(m.tokens.values()) for m in modules})
    return [
        "/".join(map(str, bits)),
        target,
        "–".join(f"{alpha:g}" for alpha in dict.fromkeys(alphas[:1] + alphas[-1:])) or "-",
        _number(sum(losses) / len(losses)) if losses else "-",
        _number(sum(excesses)) if excesses else "-",
        _number(sum(m.merge_excess for m in modules)),
        "–".join(f"{count:,}" for count in dict.fromkeys((tokens[0], tokens[-1]))),
        f"{sum(m.seconds for m in modules):.2f}",
    ]


def _number(value: float) -> str:
    return f"{value:.3g}"


def expert_table(rows: Mapping[str, RowCounts]) -> Table:
    """What every expert's calibration came to."""
    table = Table()
    table.add_column("expert", overflow="fold")
    for name in ("asked for", "rows", "of", "blocks", "tokens", "cut to length", "left over"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, made in rows.items():
        asked = "all" if made.asked is None else f"{made.asked:,}"
        numbers = (made.used, made.available, made.blocks, made.tokens, made.cut, made.dropped)
        table.add_row(name, asked, *(f"{number:,}" for number in numbers))
    return table


def folder_size(folder: Path) -> tuple[int, int]:
    """(bytes, files) of a folder."""
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return sum(sizes), len(sizes)


def columns(pairs: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a frame: a key and what is said of it."""
    grid = Table.grid(padding=(0, 2))
    for key, text in pairs:
        grid.add_row(Text(key, "bold"), Text(text))
    return grid


def methods_table(known: Mapping[str, Mapping[str, Any]]) -> Table:
    """One block of lines per method: what it is, its paper, what it needs, its parameters."""
    table = Table(show_lines=True)
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("what it does, its paper, its parameters", overflow="fold")
    for name, about in known.items():
        needs = "needs --base" if about["needs_base"] else "does without --base"
        if about["needs_calibration"]:
            needs += ", needs --calibration"
        text = Text(f"{about['summary']}\n{about['title']}, {about['reference']}\n{needs}")
        for parameter, option in about["parameters"].items():
            default = json.dumps(option["default"], default=str)
            text.append(f"\n{parameter}", "bold")
            text.append(f": {option['doc']} ({option['rule']}; default {default})")
        table.add_row(name, text)
    return table
