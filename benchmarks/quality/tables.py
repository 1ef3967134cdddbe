"""The results as the paper's tables: Markdown for readers, long CSV for programs."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .plan import (
    ABLATED,
    ABLATION,
    BEST,
    CALIBRATED,
    GAMMA,
    LABELS,
    MERGERS,
    Cell,
    Plan,
    paper_alpha,
)

Results = Mapping[str, Mapping[str, Any]]

CSV_COLUMNS = (
    *("suite", "seed", "kind", "merger", "parameters", "method", "variant", "bits", "alpha"),
    "choice",
    *("chosen", "samples", "split", "task", "metric", "value", "items", "seconds", "state", "note"),
)


@dataclass
class Line:
    """One row of a table: a label and, per seed, the result it shows."""

    label: str
    cells: list[Cell]
    reference: list[Cell] = field(default_factory=list)
    bold: bool = False
    part: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda result: result


class Tables:
    """All tables of one suite.

    Args:
        plan: what was asked for.
        results: name of a cell → result.
        suite: which suite.
    """

    def __init__(self, plan: Plan, results: Results, suite: str):
        self.plan, self.results, self.suite = plan, results, suite
        self.options = plan.options
        self.notes: list[str] = []
        built = self._cells(kind="suite")
        self.tasks: list[str] = next(
            (results[c.name]["tasks"] for c in built if "tasks" in results.get(c.name, {})), []
        )

    # ---- finding -------------------------------------------------------------------------------

    def _cells(self, **wanted: Any) -> list[Cell]:
        return [
            cell
            for cell in self.plan.cells.values()
            if cell.suite == self.suite
            and all(getattr(cell, key) == value for key, value in wanted.items())
        ]

    def _merged(self, merger: str) -> list[Cell]:
        return self._cells(kind="merge", merger=merger, choice=None)

    # ---- Markdown ------------------------------------------------------------------------------

    def markdown(self) -> str:
        """Every table that was asked for, with its notes."""
        parts = []
        self.notes = []
        if "main" in self.options.tables:
            parts += [self.main(bits) for bits in self.options.bits]
        if "alpha" in self.options.tables:
            parts.append(self.alpha())
        if "bits" in self.options.tables:
            parts.append(self.bits())
        if "budget" in self.options.tables:
            parts.append(self.budget())
        text = "\n\n".join(part for part in parts if part)
        if self.notes:
            text += "\n\n" + "\n".join(f"{i}. {note}" for i, note in enumerate(self.notes, 1))
        return text + "\n"

    def main(self, bits: int) -> str:
        """The paper's Tables 1 to 3: every merger in full precision and under every method."""
        base, experts = self._cells(kind="base"), self._cells(kind="experts")
        lines = [Line("Pre-trained base", base), Line("Each expert, own task", experts)]
        for merger in self.options.mergers:
            if merger in MERGERS:
                lines += self._merger_lines(merger, bits)
        for merger in CALIBRATED:
            if merger in self.options.mergers:
                lines += self._calibrated_lines(merger, bits)
        return self._table(f"{self.suite}, {bits} bits", lines)

    def averages(self, bits: int) -> dict[tuple[str, str], str]:
        """(what was merged or "", row) → average accuracy, in the order of the main table.

        Full precision comes as it is under every bit width; rows have the same names in all suites.
        """
        found = {}
        for label, kind in (("Pre-trained base", "base"), ("Each expert, own task", "experts")):
            found["", label] = self._average(Line(label, self._cells(kind=kind)), "accuracy")
        for merger in self.options.mergers:
            calibrated = merger in CALIBRATED
            lines = (self._calibrated_lines if calibrated else self._merger_lines)(merger, bits)
            for line in lines:
                # Without the value that was chosen, which differs between suites.
                name = re.sub(r"([αγ]) [^,)]+, by", r"\1 by", line.label)
                name = re.sub(r"α [^,)]+, the paper's", "the paper's α", name)
                found[LABELS[merger], name] = self._average(line, "accuracy")
        return found

    def _merger_lines(self, merger: str, bits: int) -> list[Line]:
        merged = self._merged(merger)
        lines = [Line(LABELS[merger], merged)]

        def find(**wanted: Any) -> list[Cell]:
            return self._cells(kind="quantize", merger=merger, bits=bits, **wanted)

        for method in self.options.methods:
            if method != "E-PMQ":
                lines.append(Line(f"w/ {method}", find(method=method), merged))
                continue
            alpha = paper_alpha(self.suite, merger)
            fixed = find(method=method, alpha=alpha, choice=None)
            lines.append(Line(f"w/ E-PMQ (α {alpha:g}, the paper's)", fixed, merged, bold=True))
            chosen = find(method=method, choice="alpha")
            label = f"w/ E-PMQ (α {self._chosen(chosen)}, by held-out rows)"
            lines.append(Line(label, chosen, merged, bold=True))
            best = find(method=method, variant=BEST)
            lines.append(Line("w/ E-PMQ (best profile)", best, merged, bold=True))
        return lines

    def _calibrated_lines(self, merger: str, bits: int) -> list[Line]:
        ours = [
            cell
            for cell in self._merged(merger)
            if cell.parameters["reduce_non_diagonal_ratio"] == GAMMA
        ]
        best = self._cells(kind="merge", merger=merger, choice="gamma")
        name = LABELS[merger]
        lines = [
            Line(f"{name} (γ {GAMMA:g})", ours),
            Line(f"{name} (γ {self._chosen(best)}, by held-out rows)", best),
        ]
        quantized = self._cells(kind="quantize", merger=merger, bits=bits)
        for label, choice, merged in (
            (f"{name} (γ {GAMMA:g}) → GPTQ", None, ours),
            (f"{name} (γ by held-out rows) → GPTQ", "gamma", best),
        ):
            cells = [cell for cell in quantized if cell.choice == choice]
            if cells:
                lines.append(Line(label, cells, merged))
        return lines

    def _chosen(self, cells: Sequence[Cell]) -> str:
        values = [self.results.get(cell.name, {}).get("chosen") for cell in cells]
        known = sorted({value for value in values if value is not None})
        return "/".join(f"{value:g}" for value in known) or "?"

    def alpha(self) -> str:
        """The paper's Tables 5 and 12: the strength of the anchor, at 4 bits."""
        lines = []
        for merger in self._ablated():
            merged = self._merged(merger)
            lines.append(Line(LABELS[merger], merged))
            find = {"kind": "quantize", "merger": merger, "bits": 4, "choice": None}
            lines.append(Line("w/ GPTQ", self._cells(**find, method="GPTQ"), merged))
            for alpha in ABLATION:
                cells = self._cells(**find, method="E-PMQ", alpha=alpha)
                lines.append(Line(f"w/ E-PMQ (α {alpha:g})", cells, merged))
        return self._table(f"{self.suite}, strength of the anchor, 4 bits", lines)

    def _ablated(self) -> list[str]:
        return [merger for merger in ABLATED if merger in self.options.mergers]

    def bits(self) -> str:
        """The paper's Figure 3 as a table: average accuracy by bits."""
        header = ["model", *(f"{bits} bits" for bits in self.options.bits_table)]
        rows = []
        for merger in self._ablated():
            full = self._average(Line("", self._merged(merger)), "accuracy")
            alpha = paper_alpha(self.suite, merger)
            rows.append([f"**{LABELS[merger]}**, full precision", *[full] * (len(header) - 1)])
            for method, more in (("GPTQ", {}), ("E-PMQ", {"alpha": alpha})):
                label = f"w/ {method}" + (f" (α {alpha:g})" if more else "")
                cells = []
                for bits in self.options.bits_table:
                    find = {"kind": "quantize", "merger": merger, "method": method, "bits": bits}
                    found = self._cells(**find, choice=None, **more)
                    cells.append(self._average(Line(label, found), "accuracy"))
                rows.append([label, *cells])
        return markdown(f"{self.suite}, average accuracy (%) by bits", header, rows)

    def budget(self) -> str:
        """The paper's Table 6: rows per task, accuracy, seconds of ``quantize`` and their ratio."""
        header = ["method", "rows per task", "average (%)", "seconds", "ratio to GPTQ"]
        rows = []
        for method in ("GPTQ", "E-PMQ"):
            for samples in self.options.budget:
                cells = self._cells(kind="budget", samples=samples)

                def part(result, method=method):
                    return result.get("budget", {}).get(method, result)

                line = Line(method, cells, part=part)
                shown = [
                    self._mean(line, lambda result, key=key: result[key], digits)
                    for key, digits in (("seconds", 1), ("ratio", 2))
                ]
                average = self._average(line, "accuracy")
                rows.append([method, str(samples), average, shown[0], f"{shown[1]}×"])
        title = f"{self.suite}, calibration budget, task arithmetic, 4 bits"
        return markdown(title, header, rows)

    # ---- numbers -------------------------------------------------------------------------------

    def _table(self, title: str, lines: Sequence[Line]) -> str:
        header = ["model", *self.tasks, "average", "Δ", "loss"]
        rows = []
        for line in lines:
            accuracies = [self._task(line, task) for task in self.tasks]
            average = self._average(line, "accuracy")
            row = [line.label, *accuracies, average, self._change(line)]
            row.append(self._average(line, "loss", 3))
            if line.bold:
                row = [f"**{cell}**" if cell else cell for cell in row]
            rows.append(row)
        return markdown(f"{title}: accuracy (%), average loss (nats)", header, rows)

    def _found(self, line: Line) -> list[Mapping[str, Any]]:
        results = [self.results.get(cell.name) for cell in line.cells]
        return [line.part(result) for result in results if result is not None]

    def _mean(self, line: Line, value: Callable[[Mapping[str, Any]], float], digits: int) -> str:
        """Mean over the seeds, ± their spread; or why there is none."""
        found = self._found(line)
        for result in found:
            if "refused" in result:
                return f"n/a{self._note(line, result['refused'])}"
            if "error" in result:
                error = result["error"]
                return f"{error['type']}{self._note(line, error['message'])}"
        if not found:
            return "-"
        values = [value(result) for result in found]
        mean = sum(values) / len(values)
        if len(values) == 1:
            return f"{mean:.{digits}f}"
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return f"{mean:.{digits}f} ± {spread:.{digits}f}"

    def _note(self, line: Line, text: str) -> str:
        text = " ".join(text.split())[:300]
        if text not in self.notes:
            self.notes.append(text)
        return f" ({self.notes.index(text) + 1})"

    def _task(self, line: Line, task: str) -> str:
        return self._mean(line, lambda result: _scores(result)[task]["accuracy"], 1)

    def _average(self, line: Line, metric: str, digits: int = 1) -> str:
        return self._mean(line, lambda result: average_of(result, metric), digits)

    def _change(self, line: Line) -> str:
        """Points of the average above or below the full-precision merge."""
        ours, theirs = self._found(line), self._found(Line("", line.reference))
        pairs = list(zip(ours, theirs, strict=False))
        if not pairs or any("scores" not in result for pair in pairs for result in pair):
            return ""
        changes = [average_of(a, "accuracy") - average_of(b, "accuracy") for a, b in pairs]
        mean = sum(changes) / len(changes)
        return f"{'↑' if mean >= 0 else '↓'} {abs(mean):.1f}"


def _scores(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return result["scores"]["evaluation"]


def average_of(result: Mapping[str, Any], metric: str) -> float:
    """Plain mean over the tasks."""
    values = [score[metric] for score in _scores(result).values()]
    return sum(values) / len(values)


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(header)} |"]
    lines.append("|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|")
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def summary(plan: Plan, results: Results) -> str:
    """One table of all suites and bit widths: averages over the tasks."""
    columns = {
        f"{suite}, {bits} bits": Tables(plan, results, suite).averages(bits)
        for suite in plan.options.suites
        for bits in plan.options.bits
    }
    names = list(dict.fromkeys(name for found in columns.values() for name in found))
    rows = [
        [
            f"**{row}**" if row in ("", merger) or "E-PMQ" in row else row,
            *(found.get((merger, row), "-") for found in columns.values()),
        ]
        for merger, row in names
    ]
    return markdown("Average accuracy (%)", ["model", *columns], rows) + "\n"


def csv_of(plan: Plan, results: Results) -> str:
    """One line per figure of every cell, failures and refusals included."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, cell in plan.cells.items():
        result = results.get(name, {})
        common = {
            "suite": cell.suite,
            "seed": cell.seed,
            "kind": cell.kind,
            "merger": cell.merger,
            "parameters": ";".join(f"{k}={v}" for k, v in cell.parameters.items()),
            "method": cell.method,
            "variant": cell.variant,
            "bits": cell.bits,
            "alpha": cell.alpha,
            "choice": cell.choice,
            "chosen": result.get("chosen"),
            "samples": cell.samples,
            "seconds": result.get("seconds"),
            "state": "error" if "error" in result else "n/a" if "refused" in result else "ok",
            "note": result.get("refused") or result.get("error", {}).get("message", ""),
        }
        parts = {"": result}
        if "budget" in result:
            parts = result["budget"]
        written = False
        for method, part in parts.items():
            own = {"method": method, "seconds": part["seconds"]} if method else {}
            for split, tasks in part.get("scores", {}).items():
                for task, score in tasks.items():
                    for metric in ("accuracy", "loss"):
                        figure = {"split": split, "task": task, "metric": metric}
                        figure |= {"value": score[metric], "items": score["items"]}
                        writer.writerow(common | own | figure)
                        written = True
        if not written:
            writer.writerow(common)
    return stream.getvalue()
