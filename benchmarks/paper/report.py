"""Results of cells as tables: Markdown, CSV and JSON, beside what was published."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .cells import Cell
from .specs import ANCHOR_TOLERANCE, FAMILIES, SUITES, TITLES, published_row
from .tables import Table


@dataclass(frozen=True)
class Line:
    """One row of a finished table.

    Attributes:
        result: of ``Runner.run``.
        columns: tasks, in order.
    """

    cell: Cell
    result: dict[str, Any]
    columns: tuple[str, ...]

    @property
    def label(self) -> str:
        """As a reader knows it."""
        if self.cell.method == "FP":
            return TITLES[self.cell.merger]
        text = f"{TITLES[self.cell.merger].partition(' (')[0]} → {self.cell.method}"
        text += f", {self.cell.bits} bits" if self.cell.bits != 4 else ""
        text += "" if self.cell.alpha is None else f", α = {self.cell.alpha:g}"
        return text + ("" if self.cell.samples is None else f", {self.cell.samples} rows per task")

    @property
    def scores(self) -> dict[str, float]:
        """Column → per cent; empty of a failed cell."""
        return self.result.get("scores", {})

    @property
    def average(self) -> float | None:
        """Plain mean over the columns; None of a failed cell."""
        return fmean(self.scores.values()) if self.scores else None

    @property
    def published(self) -> float | None:
        """The published average over the same columns; None where there is none."""
        key = self.cell.key
        row = published_row(self.cell.family, self.cell.suite, key)
        row = row or published_row(self.cell.family, self.cell.suite, _plain(self.cell))
        if not row or self.average is None:
            return None
        if all(column in row for column in self.columns):
            whole = len(self.columns) == len(row) - 1
            return row["average"] if whole else fmean(row[column] for column in self.columns)
        whole = self.columns == tuple(SUITES[self.cell.suite])
        return row["average"] if whole else None

    @property
    def deviation(self) -> float | None:
        """Ours minus the published average, in points."""
        return None if self.published is None else self.average - self.published

    @property
    def is_anchor(self) -> bool:
        """Whether it should agree with the published row: nothing was quantized."""
        return self.cell.method == "FP" and self.published is not None


def _plain(cell: Cell) -> str:
    """The key without what equals the paper's constants."""
    family = FAMILIES[cell.family]
    alpha = None if cell.alpha == family.alpha_of(cell.merger) else cell.alpha
    samples = None if cell.samples == family.samples else cell.samples
    return Cell(cell.family, cell.suite, cell.merger, cell.method, cell.bits, alpha, samples).key


def anchors_of(lines: Iterable[Line], limit: int | None) -> list[str]:
    """What the full-precision rows say about the harness, one sentence each."""
    anchors = [line for line in lines if line.is_anchor]
    if not anchors:
        return ["No full-precision row of this table has a published counterpart."]
    missed = [line for line in anchors if abs(line.deviation) > ANCHOR_TOLERANCE]
    if not missed:
        return [
            f"Anchors: all {len(anchors)} full-precision rows lie within {ANCHOR_TOLERANCE:g} "
            "point of the published averages."
        ]
    told = [
        f"**Anchor missed:** {line.label} ({line.cell.family}, {line.cell.suite}) is "
        f"{line.average:.1f}, published {line.published:.1f} ({line.deviation:+.1f})."
        for line in missed
    ]
    told.append(
        f"{len(missed)} of {len(anchors)} full-precision rows are off by more than "
        f"{ANCHOR_TOLERANCE:g} point: models, data or heads differ from FusionBench's, and the "
        "quantized rows must not be compared with the paper's."
    )
    if limit is not None:
        told.append(f"At most {limit} items per task were scored, which alone moves averages.")
    return told


# ---- writing -----------------------------------------------------------------------------------


def markdown(table: Table, lines: Sequence[Line], about: dict[str, Any]) -> str:
    """A finished table for a reader.

    Args:
        about: ``environment``, ``command`` and ``limit`` of the run.
    """
    name = "Figure 3" if table.name == "figure3" else f"Table {table.name}"
    parts = [f"# {name}: {table.title}", ""]
    for family, suite in dict.fromkeys((line.cell.family, line.cell.suite) for line in lines):
        block = [line for line in lines if (line.cell.family, line.cell.suite) == (family, suite)]
        parts += [f"## {family}, {suite}", "", *_grid(table, block), ""]
    failed = [line for line in lines if line.result["failed"]]
    parts += [f"- {sentence}" for sentence in anchors_of(lines, about.get("limit"))]
    parts += [f"- Failed: {line.label}: {line.result['failed']}" for line in failed]
    parts += [f"- {table.note}"] if table.note else []
    ours = 'RegMean and RegMean++ are not in the paper; "paper" is FusionBench\'s figure there.'
    parts += [f"- {ours}"] if any(line.cell.merger.startswith("regmean") for line in lines) else []
    versions = ", ".join(f"{k} {v}" for k, v in about["environment"]["versions"].items())
    hardware = ", ".join(f"{k}: {v}" for k, v in about["environment"]["hardware"].items() if v)
    parts += ["", f"Versions: {versions}.", "", f"Hardware: {hardware}.", ""]
    parts += [f"Command: `{about['command']}`", "", "Read from the hub:", ""]
    parts += [f"- `{name}` at `{commit}`" for name, commit in _commits(lines).items()]
    return "\n".join(parts).rstrip() + "\n"


def _grid(table: Table, lines: Sequence[Line]) -> list[str]:
    columns = () if table.name == "5" else lines[0].columns
    timed = table.name == "6"
    head = ["Method", *columns, "Avg.", "paper", "Δ", *(("seconds", "ratio") if timed else ())]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for line in lines:
        if line.result["failed"]:
            rows.append([line.label, *["failed"] * (len(columns) + 1), *["–"] * (len(head) - 2)])
            rows[-1] = rows[-1][: len(head)]
            continue
        row = [line.label, *(_two(line.scores.get(column)) for column in columns)]
        delta = "–" if line.deviation is None else f"{line.deviation:+.1f}"
        row += [_two(line.average), _two(line.published), delta]
        rows.append(row + (_timing(line, lines) if timed else []))
    return [f"| {' | '.join(row)} |" for row in rows]


def _timing(line: Line, lines: Sequence[Line]) -> list[str]:
    """Seconds of the quantization, and their ratio to GPTQ's with the same rows."""
    seconds = line.result["seconds"].get("quantize")
    if seconds is None:
        return ["–", "–"]
    host = [
        other.result["seconds"]["quantize"]
        for other in lines
        if other.cell.method == "GPTQ"
        and other.cell.samples == line.cell.samples
        and not other.result["failed"]
    ]
    return [f"{seconds:.1f}", f"{seconds / host[0]:.2f}×" if host else "–"]


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _commits(lines: Iterable[Line]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for line in lines:
        facts = line.result["facts"]
        found |= facts["models"] | {f"datasets/{k}": v for k, v in facts["datasets"].items()}
    return dict(sorted(found.items()))


_FIELDS = (
    "table",
    "family",
    "suite",
    "merger",
    "method",
    "bits",
    "alpha",
    "samples",
    "column",
    "items",
    "score",
    "published",
    "seconds",
    "failed",
)


def rows_csv(table: Table, lines: Sequence[Line]) -> str:
    """A finished table as CSV, one figure per line; ``column`` "average" holds the mean.

    ``published`` is the paper's figure of the same column, empty where it has none.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, _FIELDS, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        facts, cell = line.result["facts"], line.cell
        common = {
            "table": table.name,
            "family": cell.family,
            "suite": cell.suite,
            "merger": cell.merger,
            "method": cell.method,
            "bits": facts.get("bits", ""),
            "alpha": facts.get("alpha", ""),
            "samples": facts.get("samples", ""),
            "seconds": line.result.get("seconds", {}).get("quantize", ""),
            "failed": line.result["failed"] or "",
        }
        printed = published_row(cell.family, cell.suite, _plain(cell))
        for column in line.columns:
            figure = {"score": line.scores.get(column, ""), "published": printed.get(column, "")}
            items = line.result.get("items", {}).get(column, "")
            writer.writerow(common | figure | {"column": column, "items": items})
        mean = {"score": "" if line.average is None else line.average}
        mean["published"] = "" if line.published is None else line.published
        writer.writerow(common | mean | {"column": "average", "items": ""})
    return out.getvalue()


def rows_json(lines: Sequence[Line], about: dict[str, Any]) -> str:
    """Every result with all that decided it."""
    return json.dumps({"about": about, "results": [line.result for line in lines]}, indent=1) + "\n"
