"""RegMean: every linear layer as the least-squares fit to what the experts' own layers put out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import EPMQNumericalError
from .average import Average
from .method import MergeMethod, Stack, is_number, option

# The smallest part of its energy that a channel must keep when what the channels before it explain
# is taken off, in units of d times the epsilon of fp64: below it is rounding noise.
_NOISE = 16.0


@dataclass(frozen=True)
class RegMean(MergeMethod):
    """RegMean with each expert on its own inputs (Jin et al. 2023), as FusionBench computes it.

    For each linear layer of the layer stacks, W_i: (out, in) the weight of expert i and
    X_i: (in, n_i) the inputs that its n_i calibration tokens produce in *its own* model:

        H_i = X_i X_i^T / n_i        G_i = gamma H_i + (1 - gamma) diag(H_i)
        W = (sum_i W_i G_i) (sum_i G_i)^-1

    All other parameters (embeddings, biases, norms, heads) are averaged. Padding does not count as
    a token, and an input channel that is zero in all rows keeps the average of the experts.
    """

    name: ClassVar[str] = "regmean"
    title: ClassVar[str] = "Dataless Knowledge Fusion by Merging Weights of Language Models"
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2212.09849"
    needs_base: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = True
    merged_prefix: ClassVar[bool] = False

    reduce_non_diagonal_ratio: float = option(
        0.95,
        doc="gamma, what the off-diagonal entries of the Grams are multiplied with",
        rule="a number from 0 (diagonals only) to 1 (no reduction)",
        check=lambda value: is_number(value) and 0 <= value <= 1,
    )

    def merge(self, stack: Stack, state: Any = None) -> Tensor:
        """The mean of the experts: of every tensor that is not a linear layer's weight."""
        return Average().merge(stack)


class Regression:
    """The sums of linear layers that share one input, over the experts.

    Written around the mean W_mean of the experts, D_m = sum_i (W_i - W_mean) G_i and
    W = W_mean + D (sum_i G_i)^-1, which is RegMean's solution and gives equal experts back bit for
    bit. The state is one (in, in) and two (out, in) a layer, whatever K is.

    Args:
        means: layer → W_mean, (out, in), fp32.
        gamma: ``reduce_non_diagonal_ratio``.
    """

    def __init__(self, means: Mapping[str, Tensor], gamma: float):
        self._means = dict(means)
        self._gamma = gamma
        self._total: Tensor | None = None  # sum_i G_i, (in, in), fp64
        self._pulls = {
            name: torch.zeros_like(mean, dtype=torch.float64) for name, mean in means.items()
        }

    def add(self, gram: Tensor, tokens: int, weights: Mapping[str, Tensor]) -> None:
        """Add one expert.

        Args:
            gram: X X^T, (in, in), fp64.
            tokens: n, the columns of X.
            weights: layer → W_i, (out, in), any floating dtype.
        """
        shrunk = gram * (self._gamma / tokens)
        shrunk.diagonal().copy_(gram.diagonal() / tokens)
        self._total = shrunk if self._total is None else self._total.add_(shrunk)
        for name, pull in self._pulls.items():
            delta = weights[name].to(torch.float64) - self._means[name].to(torch.float64)
            pull.addmm_(delta, shrunk)

    def solve(self) -> dict[str, Tensor]:
        """Layer → W, (out, in), fp64.

        Raises:
            EPMQNumericalError: the Grams do not determine the weights (gamma = 1 and fewer tokens
                than channels, or channels that depend on one another).
        """
        merged = {name: mean.to(torch.float64) for name, mean in self._means.items()}
        moved = {name: pull for name, pull in self._pulls.items() if bool(pull.any())}
        if self._total is None or not moved:
            return merged
        factor = self._factor(next(iter(moved)))
        for name, pull in moved.items():
            merged[name] += torch.cholesky_solve(pull.T, factor).T
        return merged

    def _factor(self, name: str) -> Tensor:
        assert self._total is not None
        total = self._total.clone()
        energy = total.diagonal()
        # Of a channel that is always zero the objective says nothing: its column of D is zero too.
        energy[energy == 0] = 1
        factor, failed = torch.linalg.cholesky_ex(total)
        width = len(total)
        least = (factor.diagonal().square() / energy).min()
        noise = _NOISE * width * torch.finfo(torch.float64).eps
        if int(failed) or not float(least) > noise:
            raise EPMQNumericalError(
                f"layer `{name}`: the experts' inputs do not determine its {width} input channels, "
                f"with `reduce_non_diagonal_ratio` {self._gamma}.",
                code="EPMQ-F29",
                subject=f"layer `{name}`",
                remedy="Lower `reduce_non_diagonal_ratio` below 1 (0.95 is the default), or give "
                "more calibration rows.",
                module=name,
            )
        return factor
