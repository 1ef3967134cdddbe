"""A preflight on a terminal: findings first, then the numbers behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..io.console import human_size
from .engines.printing import serving_table
from .findings import LISTED, Finding, Preflight, counted

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
# Experts whose cosines fit beside one another.
_MAX_COSINES = 12


def print_preflight(console: Console, result: Preflight) -> None:
    """Everything that a person wants to know; all of it is in ``to_dict()`` too."""
    if result.models:
        console.print(_models(result))
    if result.similarity:
        _print_similarity(console, result.similarity)
    if result.coverage:
        console.print(_coverage(result.coverage))
    if result.serving:
        console.print(serving_table(result.serving))
    for line in _estimates(result.estimates):
        console.print(line, highlight=False)
    for finding, more in _grouped(result.findings):
        console.print(_line(finding, more), soft_wrap=True)
    console.print(_verdict(result), highlight=False)


def _grouped(findings: list[Finding]) -> Iterator[tuple[Finding, int]]:
    """At most 20 findings of one subject and code, and how many the last one stands for."""
    kinds: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.level, finding.code, finding.subject), []).append(finding)
    for members in kinds.values():
        shown = members[:LISTED]
        for finding in shown:
            is_last = finding is shown[-1]
            yield finding, len(members) - len(shown) if is_last else 0


def _line(finding: Finding, more: int) -> Text:
    text = Text(f"{finding.level:<8}{finding.code:<9} ", _STYLES[finding.level])
    text.append(finding.cause)
    if more:
        text.append(f" And {more:,} more of this kind.")
    if finding.remedy:
        text.append(f" {finding.remedy}", "dim")
    return text


def _verdict(result: Preflight) -> Text:
    depth = {
        "headers": "headers only",
        "sample": f"headers and {human_size(result.bytes_read)} of weights",
        "full": f"headers and all weights, {human_size(result.bytes_read)}",
    }[result.verify]
    told = f"{counted(len(result.warnings), 'warning')}; read {depth} in {result.seconds:.1f} s"
    if result.errors:
        return Text(f"cannot run: {counted(len(result.errors), 'error')}, {told}", "bold red")
    return Text(f"ready to run: {told}", "bold green")


def _table(*columns: str, title: str = "") -> Table:
    table = Table(title=title or None, title_justify="left")
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _models(result: Preflight) -> Table:
    table = _table(
        "model", "tensors", "dtype", "size", "misfit", "missing", "extra", "to merge", "to base"
    )
    for name, entry in result.models.items():
        table.add_row(
            name.strip("`"),
            f"{entry['tensors']:,}",
            "/".join(list(entry["dtypes"])[:2]),
            human_size(entry["bytes"]),
            str(len(entry.get("misfits", ())) or "-"),
            str(len(entry.get("missing", ())) or "-"),
            str(len(entry.get("extra", ())) or "-"),
            _ratio(result.similarity.get("to_merged"), name),
            _ratio(result.similarity.get("to_base"), name),
        )
    return table


def _ratio(ratios: dict[str, Any] | None, name: str) -> str:
    value = (ratios or {}).get(name)
    return "-" if value is None else f"{value:.2%}"


def _print_similarity(console: Console, table: dict[str, Any]) -> None:
    names = list(table["to_merged"])
    console.print(
        f"to merge, to base: ‖W_i − W‖/‖W‖ over {table['share']:.1%} of the linear weights",
        style="dim",
    )
    if not 2 <= len(names) <= _MAX_COSINES:
        return
    origin = "the base" if table["reference"] == "base" else "the merge (no `base` is given)"
    cosines = _table("cosine", *names)
    for name, row in zip(names, table["cosine"], strict=True):
        cosines.add_row(name, *("-" if value is None else f"{value:.2f}" for value in row))
    console.print(cosines)
    console.print(f"of the task vectors, the differences to {origin}", style="dim")


def _coverage(coverage: dict[str, Any]) -> Table:
    widths = coverage["widths"]
    table = _table("calibration", "tokens", *(f"per d_in {int(d):,}" for d in widths))
    for name, count in coverage["tokens"].items():
        cells = [f"{count * share / int(d):.2f}" for d, share in widths.items()]
        table.add_row(name, f"{count:,}", *cells)
    return table


def _estimates(estimates: dict[str, Any]) -> Iterator[Text]:
    disk = estimates.get("disk")
    if disk:
        yield Text(
            f"estimated   disk: {human_size(disk['checkpoint'])} "
            f"({human_size(disk['codes'] + disk['scales'])} quantized, "
            f"{human_size(disk['unquantized'])} as it is)"
        )
        if "statistics" in disk:
            yield Text(
                f"estimated   statistics: {human_size(disk['statistics'])} beside it, and as much "
                "in the temporary folder while it runs"
            )
    memory = estimates.get("memory")
    if memory:
        named = {"experts": "the experts' own passes"}
        parts = [(named.get(key, key), size) for key, size in memory.items() if key != "peak"]
        yield Text(
            f"estimated   memory at the peak: {human_size(memory['peak'])} "
            f"({', '.join(f'{name} {human_size(size)}' for name, size in parts)})"
        )
    duration = estimates.get("time")
    if duration:
        low, high = duration["seconds"]
        rate = duration["flops_per_second"]["statistics"]
        yield Text(
            f"estimated   time: {_time(low)} to {_time(high)} for {duration['tokens']:,} tokens at "
            f"{rate / 1e9:,.0f} GFLOP/s in float32, measured just now"
        )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
