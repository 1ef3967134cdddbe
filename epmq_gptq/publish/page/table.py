"""The figures of a run for a terminal: a line per expert."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from .retention import STAGES, Retention
from .texts import percent

# Figure → what its column is called; those that are known of nobody have none.
_COLUMNS = {
    "merged": "before",
    "gptq": "plain GPTQ",
    "rounded": "after",
    "aim_merged": "aim: before",
    "aim_rounded": "aim: after",
}


def expert_table(document: dict[str, Any]) -> Table:
    """One line per expert, from what :func:`~epmq_gptq.publish.page.report_figures` returned."""
    experts = document["experts"]
    keys = [key for key in _COLUMNS if any(one["figures"][key] is not None for one in experts)]
    evaluated = any(one["retention"] for one in experts)
    table = Table(caption="% of each expert's output energy; before: merged, after: quantized")
    table.add_column("expert", overflow="fold")
    for key in keys:
        table.add_column(_COLUMNS[key], justify="right", no_wrap=True)
    table.add_column("worst module", overflow="fold")
    if evaluated:
        table.add_column("retention", justify="right", no_wrap=True)
    for one in experts:
        worst = one["worst"]
        cells = [percent(one["figures"][key]) for key in keys]
        cells.append(f"{worst['module']} ({percent(worst['figure'])})" if worst else "–")
        if evaluated:
            kept = one["retention"] and one["retention"]["percent"]["quantized"]
            cells.append("–" if kept is None else percent(kept / 100))
        # As Text: brackets in somebody's names are no markup.
        table.add_row(*map(Text, (one["name"], *cells)))
    return table


def retention_table(retention: Retention) -> Table:
    """One line per expert: its figures, and how much of it is kept."""
    shown = [
        stage
        for stage in STAGES
        if any(getattr(one, stage) is not None for one in retention.experts.values())
    ]
    table = Table()
    for name in ("expert", "task", "metric"):
        table.add_column(name, overflow="fold")
    for stage in (*shown, "retention"):
        table.add_column(stage, justify="right", no_wrap=True)
    for name, one in retention.experts.items():
        metric = one.metric if one.higher_is_better else f"{one.metric} (less is better)"
        figures = [_figure(getattr(one, stage)) for stage in shown]
        # As Text: names are somebody's, and brackets in them are no markup.
        cells = [Text(cell) for cell in (name, one.task, metric)]
        table.add_row(*cells, *figures, _per_cent(one.percent()))
    if len(retention.experts) > 1:
        table.add_section()
        blank = [""] * (2 + len(shown))
        table.add_row("average", *blank, _per_cent(retention.average()), style="bold")
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
