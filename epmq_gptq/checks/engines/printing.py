"""A :class:`ServingReport` on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...io.console import human_size
from .check import ServingReport

_VERDICTS = {"yes": "green", "limited": "yellow", "no": "bold red"}


def print_serving(console: Console, report: ServingReport) -> None:
    """What is in the checkpoint, one line per engine, and the sources of what stands against it."""
    for line in _found(report):
        console.print(Text(line), soft_wrap=True)
    console.print(serving_table(report.engines))
    for line in _sources(report.engines):
        console.print(Text(line, "dim"), soft_wrap=True)
    console.print(_verdict(report), soft_wrap=True)


def serving_table(engines: Mapping[str, Mapping[str, Any]]) -> Table:
    """Engine, version, verdict and reasons."""
    table = Table()
    for name in ("engine", "version", "serves it", "why"):
        table.add_column(name, overflow="fold" if name == "why" else "ellipsis")
    for engine, entry in engines.items():
        why = "; ".join(reason["reason"] for reason in entry["reasons"])
        if entry["verdict"] != "no" and "max_tensor_parallel" in entry:
            most = entry["max_tensor_parallel"]
            split = f"on up to {most} GPU{'' if most == 1 else 's'}"
            why = f"{why}; {split}" if why else split
        verdict = Text(entry["verdict"], _VERDICTS[entry["verdict"]])
        table.add_row(engine, entry["version"], verdict, Text(why))
    return table


def _found(report: ServingReport) -> Iterator[str]:
    found = report.found
    name = report.name if report.revision is None else f"{report.name}@{report.revision}"
    yield (
        f"checkpoint  {name}: {found['architecture'] or 'no architecture named'}, "
        f"{found['tensors']:,} tensors in {found['files']} file"
        f"{'' if found['files'] == 1 else 's'}, {human_size(found['bytes'])}"
    )
    for each in found["settings"]:
        yield (
            f"layers      {each['layers']} of {each['bits']} bits, group_size "
            f"{each['group_size']}, sym={each['sym']}, desc_act={each['desc_act']}"
        )
    zeros = dict(found["zero_points"])
    read = zeros.pop("read")
    names = {"v1": "of version 1", "v2": "of version 2", "free": "not symmetric"}
    told = ", ".join(f"{count} {names[kind]}" for kind, count in zeros.items())
    yield (
        f"zeros       {told or 'none'} (read of {read} of {found['layers']} layers); "
        f"format says {found['format']}"
    )
    dense = "/".join(list(found["dense_dtypes"])[:2]) or "none"
    yield f"dense       {dense} tensors, dtype {found['dtype']}; head {found['head']}"
    for line in found["disagreements"]:
        yield f"differs     {line}"


def _sources(engines: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for engine, entry in engines.items():
        for reason in entry["reasons"]:
            yield f"{engine} {entry['version']}, {reason['verdict']}: {reason['source']}"


def _verdict(report: ServingReport) -> Text:
    can = [engine for engine in report.engines if report.can(engine)]
    cannot = [engine for engine in report.engines if not report.can(engine)]
    where = "" if report.tensor_parallel == 1 else f" on {report.tensor_parallel} GPUs"
    text = f"served by {', '.join(can) or 'no engine'}{where}"
    if cannot and can:
        text += f"; not by {', '.join(cannot)}"
    return Text(text, "bold green" if report.is_served else "bold red")
