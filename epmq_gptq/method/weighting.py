"""β_i: how much each expert's Gram counts in H = Σ β_i H_i and D = Σ β_i (W_i − W_m) H_i."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

WEIGHTINGS = ("raw", "token", "trace", "minmax")


class Weighting:
    """β_i of one run, w_i being what the user says (1 where nothing is said):

    - ``raw``: w_i. Plain sums, as in the paper: long or high-norm calibration dominates.
    - ``token``: w_i · (N/K) / n_i, so that every expert counts as if it had the average number of
      tokens (RegMean, arXiv 2212.09849, divides by the tokens).
    - ``trace``: w_i · (N/K) d / tr(H_i), so that every Gram has the same trace: neither length nor
      norm counts.
    - ``minmax``: w_i here, and for the layers of each input a further factor that raises the expert
      of which the least is kept (``min_max_weights``). Needs the sums of
      every expert apart, so memory grows with K.

    N is the number of all tokens, K of the experts with calibration rows; with these factors Σ β_i
    H_i keeps the size of the raw sums, and with it the meaning of the reported losses.

    Args:
        kind: one of :data:`WEIGHTINGS`.
        tokens: expert → calibration tokens n_i, of the experts that have rows.
        given: expert → w_i.
        data_free: experts without rows. Their stand-in Gram (see
            :func:`~epmq_gptq.method.deltas.data_free_gram`) gets w_i times the mean trace of the
            others' Grams.
    """

    def __init__(
        self,
        kind: str,
        tokens: Mapping[str, int],
        given: Mapping[str, float] | None = None,
        data_free: Collection[str] = (),
    ):
        given = given or {}
        self.kind = kind
        self._given = {name: given.get(name, 1.0) for name in (*tokens, *data_free)}
        self._tokens = dict(tokens)
        self._mean = sum(tokens.values()) / len(tokens)
        with_rows = sum(self._given[name] for name in tokens)
        # expert -> its Gram's trace over that of all the others together
        self.data_free = {name: self._given[name] / with_rows for name in data_free}

    @property
    def needs_whole_gram(self) -> bool:
        """Whether β_i can only be known when all of an expert's inputs were counted."""
        return self.kind == "trace"

    @property
    def keeps_apart(self) -> bool:
        """Whether every expert's sums are wanted apart from the others'."""
        return self.kind == "minmax"

    def of(self, expert: str, diagonal: torch.Tensor) -> float:
        """β_i for a Gram H_i with the diagonal ``(d,)``."""
        w = self._given[expert]
        if self.kind == "token":
            return w * self._mean / self._tokens[expert]
        if self.kind == "trace":
            trace = float(diagonal.sum(dtype=torch.float64))
            return w * self._mean * len(diagonal) / trace if trace > 0 else 0.0
        return w
