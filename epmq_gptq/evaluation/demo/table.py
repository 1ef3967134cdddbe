"""The demo's one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from .domains import DOMAINS

if TYPE_CHECKING:
    from .options import DemoResult

LABELS = {
    "base": "base",
    "experts": "each expert, own domain",
    "merged": "merged",
}


def result_table(result: DemoResult) -> Table:
    """One row per model, per domain loss and accuracy, and the averages.

    Accuracy is exact answers for the generated domains and next tokens for the texts.
    """
    settings = result.settings
    table = Table(
        title=f"{settings['bits']} bits, groups of {settings['group_size']}: "
        "loss (nats) · accuracy (%)",
        caption="arithmetic, sorting: exact answers to unseen questions; "
        "code, prose: next tokens of unseen files",
    )
    table.add_column("model", no_wrap=True)
    for name in (*DOMAINS, "average"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, scores in result.scores.items():
        cells = [_cell(scores[name]) for name in DOMAINS]
        quantized = row not in LABELS
        label = f"{row} (merged, {settings['bits']} bits)" if quantized else LABELS[row]
        table.add_row(
            label,
            *cells,
            _cell(result.average(row)),
            style="bold" if row == "E-PMQ" else None,
            end_section=row == "merged",
        )
    return table


def _cell(score) -> str:
    return f"{score.loss:.3f} · {100 * score.accuracy:.1f}"
