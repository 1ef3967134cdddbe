"""The figures of a run for a terminal: a line per expert."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from .page import percent

# Figure → what its column is called; those that are known of nobody have none.
_COLUMNS = {
    "merged": "before",
    "gptq": "plain GPTQ",
    "rounded": "after",
    "aim_merged": "aim: before",
    "aim_rounded": "aim: after",
}


def expert_table(document: dict[str, Any]) -> Table:
    """One line per expert, from what :func:`~epmq_gptq.regret.report_figures` returned."""
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
        cells.append(f"{worst['module']} ({percent(worst['rounded'])})" if worst else "–")
        if evaluated:
            kept = one["retention"] and one["retention"]["percent"]["quantized"]
            cells.append("–" if kept is None else percent(kept / 100))
        # As Text: brackets in somebody's names are no markup.
        table.add_row(*map(Text, (one["name"], *cells)))
    return table
