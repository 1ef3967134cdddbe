"""What the linear layers of one input are rounded towards (arXiv 2605.16882, eq. 13 to 20).

    H = Σ β_i H_i,  D = Σ β_i (W_i − W_m) H_i                        (``statistics.py``)
    λ = α tr(H) / d                                                  (eq. 13)
    H_E = H + λ I                                                    (eq. 15)
    W* = W_m + D H_E⁻¹                                               (eq. 20, in delta form)

Tensors in, values out: nothing of a model, a device or a run is known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from ..io.phases import Phases
from .choice import GRID, choose_alpha, min_max_weights
from .deltas import WeightDelta, data_free_gram
from .nonfinite import is_finite
from .statistics import Moments, combined
from .target import add_anchor_, anchor_strength, centred, expert_target, numerical_rank

# Where the merged weight is the target, the curvature is damped as the host damps its own.
PLAIN_DAMPING = 0.05
# The anchor under which experts are weighed where α itself is still to be chosen.
_ALPHA_OF_WEIGHTS = 0.01


class DataFree(NamedTuple):
    """An expert without calibration rows, as one layer sees it.

    Attributes:
        share: of tr(H) of the others, that its stand-in for a Gram shall have.
        task_vector: W_i − W_0.
        delta: W_i − W_m.
    """

    share: float
    task_vector: WeightDelta
    delta: WeightDelta


@dataclass(frozen=True)
class LayerOptions:
    """What is asked for one layer.

    Attributes:
        alpha: strength of the anchor; ``"auto"`` chooses by the held-out rows; ``"gptq"``: the
            merged weight is the target.
        refit_bias: fit its bias as well.
        keep: why the merged weight is its target whatever the sums say; "" where it is not.
        data_free: experts without rows.
    """

    alpha: float | Literal["auto", "gptq"]
    refit_bias: bool = False
    keep: str = ""
    data_free: Iterable[DataFree] = ()


@dataclass(frozen=True)
class SolveOptions:
    """What is asked for the layers of one input.

    Attributes:
        layers: one for each, in the order of the moments.
        anchor: what λ multiplies, one of :data:`~epmq_gptq.method.target.ANCHORS`.
        min_max: weigh the experts so that the one of which least is kept is kept best.
        phases: where the time of choosing α is counted.
    """

    layers: Sequence[LayerOptions]
    anchor: str = "identity"
    min_max: bool = False
    phases: Phases = field(default_factory=Phases)


class Sums(NamedTuple):
    """What is known of the calibration: expert → moments of every layer, one ``H`` for all of them.

    Attributes:
        fitted: that targets are solved from; of all experts together under one name, unless they
            are kept apart.
        held_out: the same of the rows that choose α; may be empty. They count in the end.
    """

    fitted: Mapping[str, Sequence[Moments]]
    held_out: Mapping[str, Sequence[Moments]]


class BiasAim(NamedTuple):
    """What a bias is fitted to: b − b_m is the mean of ``outputs / count`` less what Q gives.

    Attributes:
        outputs: ``(out,)`` Σ (T − b_m).
        inputs: ``(d,)`` Σ x.
        count: of tokens.
    """

    outputs: torch.Tensor
    inputs: torch.Tensor
    count: float


class Guard(NamedTuple):
    """What the rounded target must not be worse than: the rounded merge, on held-out rows.

    Attributes:
        W_m: ``(out, d)`` fp32.
        H_E: ``(d, d)`` the curvature of both roundings.
        held_out: moments of rows that the target was chosen by.
    """

    W_m: torch.Tensor
    H_E: torch.Tensor
    held_out: Moments


@dataclass
class Solution:
    """What one layer is rounded towards.

    Attributes:
        W: ``W*: (out, d)`` fp32; None where there is a ``fault``.
        H_E: ``(d, d)`` fp32, one tensor for all layers of an input that have one α.
        lam, alpha: λ and α of it; ``alpha`` None where the merged weight is the target.
        merge_excess: how far eq. 12 of the unrounded merge lies above its optimum.
        merged: whether the merged weight is the target.
        reason: why it is; "" where that was asked for.
        bias: what the bias is fitted to once the weight is rounded, or None.
        guard: what the rounded target is compared with, or None.
        held_out: α → gain over the merge on the held-out rows, of those that were tried.
        weights: expert → what it counts beside its β_i, where that was chosen.
        fault: what makes it unsolvable: every input is zero; H_E is not positive definite; α = 0
            with a Gram of less than full ``rank``; W* holds values that are not finite.
        rank: of H, where that is the fault.
    """

    W: torch.Tensor | None = None
    H_E: torch.Tensor | None = None
    lam: float = 0.0
    alpha: float | None = None
    merge_excess: float = 0.0
    merged: bool = False
    reason: str = ""
    bias: BiasAim | None = None
    guard: Guard | None = None
    held_out: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    fault: Literal["", "no input", "indefinite", "rank", "not finite"] = ""
    rank: int = 0


def solve(moments: Sums, merged: Sequence[torch.Tensor], options: SolveOptions) -> list[Solution]:
    """The targets of the layers of one input (eq. 13, 15 and 20).

    Args:
        moments: of every layer; used up.
        merged: ``W_m: (out, d)`` fp32 of every layer.
        options: what is asked for.
    """
    parts = [part for part in moments if part]
    weights = _weights(parts[0], options)
    sums = [_summed(part, weights) for part in parts]
    if not any(bool(part[0].H.diagonal().any()) for part in sums):
        # Also where no token came at all: λ is 0 too, so nothing says how to round.
        return [Solution(fault="no input", weights=weights) for _ in merged]
    with options.phases.measure("alpha"):
        alphas, tried = _alphas(sums, options.layers, options.anchor)
    whole, held_out = sums[0], [None] * len(merged)
    if len(sums) > 1:
        held_out = sums[1]
        H = whole[0].H.add_(held_out[0].H)  # what was held out counts, too
        pairs = zip(whole, held_out, strict=True)
        whole = [combined(pair, [1, 1], H) for pair in pairs]
    problem = _Problem(whole, held_out, merged, options)
    solutions = problem.solved(alphas)
    for solution, layer in zip(solutions, options.layers, strict=True):
        solution.weights = weights if options.min_max and len(parts[0]) > 1 else {}
        solution.held_out = tried if layer.alpha == "auto" else {}
    return solutions


def _weights(parts: Mapping[str, Sequence[Moments]], options: SolveOptions) -> dict[str, float]:
    """What each part counts beside the β_i that it holds already."""
    if len(parts) < 2 or not options.min_max:
        return dict.fromkeys(parts, 1.0)
    alpha = options.layers[0].alpha
    alpha = _ALPHA_OF_WEIGHTS if isinstance(alpha, str) else alpha
    return min_max_weights(parts, alpha, anchor=options.anchor)


def _summed(
    parts: Mapping[str, Sequence[Moments]], weights: Mapping[str, float]
) -> Sequence[Moments]:
    """The moments of all experts together."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    # A routed module may be reached by an expert's held-out rows alone.
    factors = [weights.get(name, 1.0) for name in parts]
    H = sum(factor * part[0].H for factor, part in zip(factors, parts.values(), strict=True))
    return [combined(layer, factors, H) for layer in zip(*parts.values(), strict=True)]


def _alphas(
    sums: Sequence[Sequence[Moments]], layers: Sequence[LayerOptions], anchor: str
) -> tuple[list[float | None], dict[str, float]]:
    """α of every layer, and the held-out gains of those that were tried.

    One for all that say ``"auto"``, so that they share a factor. None: the merged weight is the
    target, because no other was better on the held-out rows, or because that was asked for.
    """
    auto = [index for index, layer in enumerate(layers) if layer.alpha == "auto"]
    best, gains = None, {}
    if auto and len(sums) > 1:  # else a routed module that no held-out row reached
        best, gains = choose_alpha(
            *([part[index] for index in auto] for part in sums),
            anchor=anchor,
            refit_bias=[layers[index].refit_bias for index in auto],
        )
    known = {"auto": best, "gptq": None}
    alphas = [known[a] if isinstance(a, str) else a for a in (layer.alpha for layer in layers)]
    # Those that cannot be solved have no gain, and JSON no word for it.
    return alphas, {f"{value:g}": gain for value, gain in gains.items() if math.isfinite(gain)}


class _Factor(NamedTuple):
    """``H_E`` of the layers of one input, its lower Cholesky factor, and how it came about."""

    H_E: torch.Tensor
    L: torch.Tensor
    lam: float
    alpha: float | None


@dataclass
class _Problem:
    """All rows of the layers of one input, the held-out ones among them."""

    moments: Sequence[Moments]
    held_out: Sequence[Moments | None]
    merged: Sequence[torch.Tensor]
    options: SolveOptions

    def solved(self, alphas: Sequence[float | None]) -> list[Solution]:
        """Layers with one H and one α share a factor."""
        layers = self.options.layers
        found: dict[int, Solution] = {}
        if any(layer.data_free for layer in layers):
            # τ differs from layer to layer, so these have no Gram in common.
            for index, layer in enumerate(layers):
                own = _with_data_free(self.moments[index], self.merged[index], layer.data_free)
                found |= self._cohort([index], {index: own}, alphas[index])
            return [found[index] for index in range(len(layers))]
        cohorts: dict[tuple, list[int]] = {}
        for index, layer in enumerate(layers):
            cohorts.setdefault((alphas[index], layer.refit_bias), []).append(index)
        while cohorts:
            (alpha, _), members = cohorts.popitem()
            moments = {index: self.moments[index] for index in members}
            if cohorts:  # the last one may write to H
                H = moments[members[0]].H.clone()
                moments = {index: one._replace(H=H) for index, one in moments.items()}
            found |= self._cohort(members, moments, alpha)
        return [found[index] for index in range(len(layers))]

    def _cohort(
        self, members: list[int], moments: dict[int, Moments], alpha: float | None
    ) -> dict[int, Solution]:
        """The layers of one H and one α; that H becomes H_E."""
        first = self.options.layers[members[0]]
        whole, H = moments, moments[members[0]].H
        if alpha == 0.0 and (rank := numerical_rank(H)) < len(H):
            return {index: Solution(alpha=alpha, fault="rank", rank=rank) for index in members}
        # Where the merge is the target, its bias stays as well.
        if first.refit_bias and alpha is not None:
            around = centred([moments[index] for index in members])
            moments, H = dict(zip(members, around, strict=True)), around[0].H
        factor = _factor(H, alpha, self.options.anchor, chosen=first.alpha == "auto")
        if factor is None:
            return {index: Solution(alpha=alpha, fault="indefinite") for index in members}
        return {
            index: self._one(index, factor, moments[index].D, whole[index]) for index in members
        }

    def _one(self, index: int, factor: _Factor, D: torch.Tensor | None, whole: Moments) -> Solution:
        W_m, layer, held_out = self.merged[index], self.options.layers[index], self.held_out[index]
        solution = Solution(H_E=factor.H_E, lam=factor.lam, alpha=factor.alpha)
        solution.reason = layer.keep
        if not layer.keep and factor.alpha is None and layer.alpha == "auto":
            better = "no target was better on the held-out rows"
            solution.reason = better if held_out else "no held-out row was routed here"
        solution.merged = bool(layer.keep) or factor.alpha is None
        D = None if solution.merged else D
        solution.W, solution.merge_excess = expert_target(W_m, D, factor.L)
        if not is_finite(solution.W):
            solution.fault = "not finite"
        elif D is not None:
            if layer.refit_bias:
                # Σ (T − b_m − Q x) = Σ (T − b_m − W_m x) + W_m s − Q s, so W_m need not be kept.
                aimed = whole.outputs + W_m @ whole.inputs
                solution.bias = BiasAim(aimed, whole.inputs, whole.count)
            if layer.alpha == "auto":
                solution.guard = Guard(W_m, factor.H_E, held_out)
        return solution


def _factor(H: torch.Tensor, alpha: float | None, anchor: str, *, chosen: bool) -> _Factor | None:
    """H becomes H_E; None where it is not positive definite.

    Args:
        chosen: α was chosen, from fewer rows: with all of them a stronger anchor may be needed to
            solve at all.
    """
    diagonal = H.diagonal().clone()
    stronger = [one for one in GRID if one > alpha] if chosen and alpha is not None else []
    for candidate in (alpha, *stronger):
        H.diagonal().copy_(diagonal)
        lam = anchor_strength(H, PLAIN_DAMPING if candidate is None else candidate)
        L, info = torch.linalg.cholesky_ex(add_anchor_(H, lam, anchor))
        if not int(info):
            return _Factor(H, L, lam, candidate)
    return None


def _with_data_free(known: Moments, W_m: torch.Tensor, experts: Iterable[DataFree]) -> Moments:
    """The moments of one layer with the experts that have no calibration rows."""
    energy = float(known.H.diagonal().sum(dtype=torch.float64))
    H, D = known.H.clone(), known.D
    for share, task_vector, delta in experts:
        C = data_free_gram(task_vector, share * energy)
        if delta.size():
            D = torch.zeros_like(W_m) if D is None else D
            delta.add_product_(D, C)
        H.add_(C)
    return known._replace(H=H, D=D)
