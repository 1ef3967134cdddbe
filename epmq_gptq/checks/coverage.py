"""Calibration tokens against what the layers' Grams need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..experts.linears import Linear
from .findings import Finding

# A Gram of n tokens has rank n at most. Below a quarter of the width an expert says nothing about
# most directions, and the anchor decides there.
FEW = 4
UNBALANCED = 10
_ROUTED = ".experts."


def widths(linears: Iterable[Linear], config: Mapping[str, Any]) -> dict[int, float]:
    """Inputs d_in of the layers → the share of the tokens that reach such a layer.

    A routed module sees k of E parts of them if the router is even, which it seldom is.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    total = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts")
    chosen = text.get("num_experts_per_tok")
    even = chosen / total if isinstance(total, int) and isinstance(chosen, int) and total else 1.0
    shares: dict[int, float] = {}
    for linear in linears:
        share = even if _ROUTED in linear.name else 1.0
        shares[linear.inputs] = min(share, shares.get(linear.inputs, 1.0))
    return dict(sorted(shares.items()))


def check_coverage(
    tokens: Mapping[str, int], widths: Mapping[int, float]
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings and the table behind them.

    Args:
        tokens: expert → calibration tokens, padding left out; experts without rows left out.
        widths: what :func:`widths` returned.
    """
    table = {"tokens": dict(tokens), "widths": {str(d): share for d, share in widths.items()}}
    return list(_findings(tokens, widths)), table


def _findings(tokens: Mapping[str, int], widths: Mapping[int, float]) -> Iterator[Finding]:
    for name, count in tokens.items():
        if count == 0:
            yield Finding(
                "error",
                "EPMQ-F22",
                f"expert `{name}`",
                f"calibration of expert `{name}` has no tokens.",
                "Give rows of that expert's own task.",
            )
            continue
        starved = [d for d, share in widths.items() if count * share < d / FEW]
        if starved:
            yield Finding(
                "warning",
                "EPMQ-F23",
                f"expert `{name}`",
                f"expert `{name}` has {count:,} calibration tokens"
                f"{_routed(widths, starved)}, less than a quarter of the width d_in of "
                f"{_said(starved)}: its Gram says little there and the merge decides.",
                "Give more rows of that expert's task.",
            )
    counts = [count for count in tokens.values() if count]
    total = sum(counts)
    thin = [d for d, share in widths.items() if total * share < d]
    if counts and thin:
        yield Finding(
            "note",
            "EPMQ-F23",
            "calibration",
            f"all experts together have {total:,} calibration tokens{_routed(widths, thin)}, fewer "
            f"than the width d_in of {_said(thin)}: the Gram has no full rank there, so `alpha` "
            "must be above 0.",
        )
    if len(counts) > 1 and max(counts) > UNBALANCED * min(counts):
        most = max(tokens, key=lambda name: tokens[name])
        least = min((name for name in tokens if tokens[name]), key=lambda name: tokens[name])
        yield Finding(
            "warning",
            "EPMQ-F26",
            "calibration",
            f"expert `{most}` has {tokens[most]:,} calibration tokens, `{least}` has "
            f"{tokens[least]:,}: with raw sums the first outweighs the other "
            f"{tokens[most] // tokens[least]} to 1.",
            'Set `weighting` to "token" or "trace", or give rows of like number and length.',
        )


def _routed(widths: Mapping[int, float], among: Iterable[int]) -> str:
    share = min(widths[d] for d in among)
    return "" if share == 1 else f" (of which a routed module sees about {share:.0%})"


def _said(widths: Iterable[int]) -> str:
    return "layers with " + ", ".join(f"{d:,}" for d in widths) + " inputs"
