"""Which engines can serve the export that was asked for: the rules of ``engines``, as findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..calibration.rows import TEXT, RowForm, form_of
from ..experts.linears import Linear
from .engines.facts import Export, Facts, planned
from .engines.rules import judge
from .findings import Finding

__all__ = ["Export", "check_serving"]


def check_serving(
    export: Export, linears: Iterable[Linear], config: Mapping[str, Any]
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings, and per engine its version, its verdict and the reasons.

    Args:
        export: what was asked for.
        linears: the layers that will be quantized.
        config: of the merged model, for the heads that tensor parallelism deals out.
    """
    facts = planned(export, linears, config)
    table = judge(facts)
    return [*_grid(facts), *_judge(table, form_of(config))], table


def _grid(facts: Facts) -> Iterator[Finding]:
    """F33: groups that do not divide the inputs, one finding per size and width."""
    seen = set()
    for layer in facts.layers:
        size = layer.settings.group_size
        if size > 0 and layer.inputs % size and (size, layer.inputs) not in seen:
            seen.add((size, layer.inputs))
            yield Finding(
                "error",
                "EPMQ-F33",
                "`group_size`",
                f"`group_size` {size} does not divide the {layer.inputs} inputs of `{layer.name}`.",
                "Choose a divisor, or -1 for one group per row.",
            )


def _judge(table: Mapping[str, Any], form: RowForm) -> Iterator[Finding]:
    """One line for all engines, or none: who asks for 3 bits knows what they are for."""
    reasons = {
        engine: [r["reason"] for r in entry["reasons"] if r["verdict"] == "no"]
        for engine, entry in table.items()
    }
    refusing = [engine for engine in reasons if reasons[engine]]
    if not refusing:
        return
    # Engines that do not take it for one reason are named together.
    by_reason: dict[str, list[str]] = {}
    for engine in refusing:
        called = f"{engine} {table[engine]['version']}"
        by_reason.setdefault("; ".join(reasons[engine]), []).append(called)
    told = "; ".join(f"{' and '.join(names)}: {why}" for why, names in by_reason.items())
    # Nothing that the user could set would change it.
    by_itself = refusing == ["transformers"] or form is not TEXT
    yield Finding(
        "note" if by_itself else "warning",
        "EPMQ-F33",
        ", ".join(refusing),
        f"this export cannot be served by every engine: {told}.",
        "Load it with GPTQModel, which gives the same kind of model."
        if by_itself
        else "For all of them: 4 or 8 bits, sym=True, desc_act=False, a group size of 32, 64 or "
        "128, and one setting for all parts of a fused layer.",
    )
