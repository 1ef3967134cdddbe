"""What an evaluation returns."""

from typing import NamedTuple


class Score(NamedTuple):
    """One figure of a table.

    Attributes:
        value: in per cent; of STS-B 100 · Spearman's rho.
        items: how many were scored.
    """

    value: float
    items: int
