"""From the sums over one input to what its layers are rounded towards: λ, H_E, factor, W*.

Runs on the main thread, after a subset's forward passes and before any of its layers is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from gptqmodel.quantization.gptq import SharedHessianFactorCache
from gptqmodel.utils.fallback import should_use_fallback

from ..errors import EPMQNumericalError
from ..experts.experts import Experts, check_finite
from ..io.phases import Phases
from ..method.choice import GRID, choose_alpha, min_max_weights
from ..method.deltas import data_free_gram
from ..method.expert_error import Watch
from ..method.statistics import GroupStatistics, Moments, combined
from ..method.target import add_anchor_, anchor_strength, centred, expert_target, numerical_rank
from ..method.weighting import Weighting
from .recorded.sums import RecordedStatistics
from .task import EPMQ

# Where the merged weight is the target, the curvature is damped as the host damps its own.
PLAIN_DAMPING = 0.05
# The anchor under which experts are weighed where α itself is still to be chosen.
_ALPHA_OF_WEIGHTS = 0.01


Statistics = GroupStatistics | RecordedStatistics
WatchOf = Callable[[EPMQ, torch.Tensor], Watch | None]


class _Group(NamedTuple):
    """What the layers of one input have beside their moments.

    Attributes:
        merged: layer → W_m, given away.
        held_out: layer → moments of the rows that α was chosen with; empty where none was.
        tokens: calibration tokens that reached the input.
        generation: of the host's cache of factors.
        watch: see :meth:`TargetSolver.solve`.
    """

    merged: dict[EPMQ, torch.Tensor]
    held_out: dict[EPMQ, Moments]
    tokens: int
    generation: int
    watch: WatchOf


class _Factor(NamedTuple):
    """``H_E`` of the layers of one input, its lower Cholesky factor, and how it came about."""

    H: torch.Tensor
    L: torch.Tensor
    lam: float
    alpha: float | None


class TargetSolver:
    """Gives the tasks of one shared input their targets.

    Args:
        experts: their weights, bound to the model's linear layers.
        weighting: β_i of every expert.
        anchor: what λ multiplies, see :func:`~epmq_gptq.method.target.add_anchor_`.
        is_routed: whether a module's full name is that of a routed (mixture-of-experts) module.
        on_bad: called with a task and why it cannot be rounded as asked; may raise.
        all_tokens: calibration tokens of the run, for the threshold of routed modules.
    """

    def __init__(
        self,
        *,
        experts: Experts,
        weighting: Weighting,
        anchor: str,
        is_routed: Callable[[str], bool],
        on_bad: Callable[[EPMQ, EPMQNumericalError], None],
        all_tokens: Callable[[], float],
        phases: Phases,
    ):
        self._experts = experts
        self._weighting = weighting
        self._anchor = anchor
        self._is_routed = is_routed
        self._on_bad = on_bad
        self._all_tokens = all_tokens
        self._phases = phases

    def solve(
        self,
        tasks: list[EPMQ],
        fitted: Mapping[str, Statistics],
        held_out: Mapping[str, Statistics],
        error: Exception | None,
        generation: int,
        watch: WatchOf = lambda task, W_m: None,
    ) -> None:
        """Aim every task.

        Args:
            tasks: the layers of one input.
            fitted: expert → the sums that targets are solved from; of all experts together under
                one name, unless they are kept apart.
            held_out: the same of the rows that choose α; may be empty.
            error: the first trouble met while counting.
            generation: of the host's cache of factors.
            watch: (layer, W_m) → what tells how far it lies from every expert, or None.
        """
        parts = [part for part in (fitted, held_out) if part]
        tokens = _added(one.tokens for part in parts for one in part.values())
        device = next(iter(fitted.values())).device
        merged = {}
        for task in tasks:
            merged[task] = task.merged_weight(device)
            # Nothing sensible can be made of a broken merge, whatever the policy.
            check_merged(task, merged[task])
            task.expect(tokens)
        if error is not None:
            if not isinstance(error, EPMQNumericalError):
                raise error
            for task in tasks:
                self._on_bad(task, error)
            return
        total = sum(tokens.values())
        if total == 0 and all(self._is_routed(t.full_name) for t in tasks):
            # The limit of eq. 12 where only the anchor is left: ‖Q − W_m‖².
            H = torch.eye(tasks[0].columns, device=device)
            for task in tasks:
                _keep_merged(task, "no calibration token was routed here")
                task.aim(merged[task], H, tokens=1)
            return
        taken = [
            {name: _taken(one, tasks, merged, device) for name, one in part.items()}
            for part in parts
        ]
        weights = self._weights(tasks, taken[0])
        moments = [_summed(part, weights) for part in taken]
        if not any(bool(part[tasks[0]].H.diagonal().any()) for part in moments):
            # Also where no token came at all: λ is 0 too, so nothing says how to round.
            for task in tasks:
                self._on_bad(task, task.no_input(total))
            return
        with self._phases.measure("alpha"):
            alphas = self._alphas(tasks, moments)
        whole = moments[0]
        if len(moments) > 1:
            H = whole[tasks[0]].H.add_(moments[1][tasks[0]].H)  # what was held out counts, too
            whole = {t: combined([whole[t], moments[1][t]], [1, 1], H) for t in tasks}
        apart = moments[1] if len(moments) > 1 else {}
        self._aim(tasks, whole, alphas, _Group(merged, apart, total, generation, watch))

    def _weights(
        self, tasks: list[EPMQ], parts: Mapping[str, dict[EPMQ, Moments]]
    ) -> dict[str, float]:
        """What each part counts beside the β_i that it holds already."""
        if len(parts) < 2 or not self._weighting.keeps_apart:
            return dict.fromkeys(parts, 1.0)
        alpha = tasks[0].alpha if isinstance(tasks[0].alpha, float) else _ALPHA_OF_WEIGHTS
        layers = {name: [part[task] for task in tasks] for name, part in parts.items()}
        found = min_max_weights(layers, alpha, anchor=self._anchor)
        for task in tasks:
            task.report.weights = found
        return found

    # ---- α -------------------------------------------------------------------------------------

    def _alphas(
        self, tasks: list[EPMQ], moments: list[dict[EPMQ, Moments]]
    ) -> dict[EPMQ, float | None]:
        """A number for every "auto", one for all layers of an input, so that they share a factor.

        None: the merged weight is the target, because no other was better on the held-out rows, or
        because that was asked for.
        """
        auto = [task for task in tasks if task.alpha == "auto"]
        alphas = {
            task: None if task.alpha == "gptq" else task.alpha
            for task in tasks
            if task.alpha != "auto"
        }
        if not auto:
            return alphas
        if len(moments) == 1:  # a routed module that no held-out row reached
            return alphas | dict.fromkeys(auto)
        fitted, held_out = ([part[task] for task in auto] for part in moments)
        alpha, gains = choose_alpha(
            fitted,
            held_out,
            anchor=self._anchor,
            refit_bias=[task.refits_bias for task in auto],
        )
        for task in auto:
            # Those that cannot be solved have none, and JSON no word for it.
            known = {value: gain for value, gain in gains.items() if math.isfinite(gain)}
            task.report.held_out = {f"{value:g}": gain for value, gain in known.items()}
        return alphas | dict.fromkeys(auto, alpha)

    # ---- targets -------------------------------------------------------------------------------

    def _aim(
        self,
        tasks: list[EPMQ],
        moments: dict[EPMQ, Moments],
        alphas: dict[EPMQ, float | None],
        group: _Group,
    ) -> None:
        if self._weighting.data_free:
            # τ differs from layer to layer, so these have no Gram in common.
            for task in tasks:
                own = self._with_data_free(task, group.merged[task], moments.pop(task))
                self._aim_cohort([task], {task: own}, alphas[task], group)
            return
        cohorts: dict[tuple, list[EPMQ]] = {}
        for task in tasks:
            cohorts.setdefault((alphas[task], task.refits_bias), []).append(task)
        while cohorts:
            (alpha, _), cohort = cohorts.popitem()
            if cohorts:
                H = moments[cohort[0]].H.clone()
                moments |= {task: moments[task]._replace(H=H) for task in cohort}
            self._aim_cohort(cohort, moments, alpha, group)

    def _with_data_free(self, task: EPMQ, W_m: torch.Tensor, known: Moments) -> Moments:
        """The moments of one layer with the experts that have no calibration rows."""
        energy = float(known.H.diagonal().sum(dtype=torch.float64))
        sums = known.H.clone(), known.D
        for expert, share in self._weighting.data_free.items():
            sums = self._add_data_free(task, expert, share * energy, W_m, *sums)
        H, D = sums
        return known._replace(H=H, D=D)

    def _add_data_free(
        self,
        task: EPMQ,
        expert: str,
        energy: float,
        W_m: torch.Tensor,
        H: torch.Tensor,
        D: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """H and D with one of these experts, whose stand-in for a Gram has a trace of ``energy``;
        both are written to once all that is needed is there."""
        task_vector = self._experts.task_vector(expert, task.full_name, H.device)
        size = task_vector.size()
        if not math.isfinite(size):
            self._experts.check(expert, task.full_name)
            check_finite(
                self._experts.base_weight(task.full_name),
                f"`base`: weight of `{task.full_name}`",
                module=task.full_name,
                code="EPMQ-F09",
            )
        if not size:
            return H, D
        C = data_free_gram(task_vector, energy)
        difference = self._experts.delta(expert, task.full_name, W_m)
        if difference.size():
            D = torch.zeros_like(W_m) if D is None else D
            difference.add_product_(D, C)
        return H.add_(C), D

    def _aim_cohort(
        self,
        tasks: list[EPMQ],
        moments: dict[EPMQ, Moments],
        alpha: float | None,
        group: _Group,
    ) -> None:
        """Give the layers of one input and one alpha their targets; their ``H`` becomes ``H_E``."""
        H = moments[tasks[0]].H
        if alpha == 0.0:
            _check_rank(tasks[0], H, group.tokens)
        whole = moments
        # Where the merge is the target, its bias stays as well.
        if tasks[0].refits_bias and alpha is not None:
            around = centred([moments[task] for task in tasks])
            moments, H = dict(zip(tasks, around, strict=True)), around[0].H
        factor = self._factor(tasks[0], H, H.diagonal().clone(), alpha)
        if factor is None:
            for task in tasks:
                self._on_bad(task, task.not_positive_definite())
            return
        for task in tasks:
            W_m = group.merged.pop(task)
            self._aim_one(
                task, group, factor, W_m, moments[task], whole[task], group.held_out.get(task)
            )
        alpha = factor.alpha
        if len(tasks) > 1:
            cache = SharedHessianFactorCache(group.generation, f"{tasks[0].name}@{alpha!r}")
            for task in tasks:
                task.attach_shared_hessian_cache(cache)

    def _factor(
        self, task: EPMQ, H: torch.Tensor, diagonal: torch.Tensor, alpha: float | None
    ) -> _Factor | None:
        """H becomes H_E; None where it is not positive definite."""
        chosen = alpha is not None and task.alpha == "auto"
        # Chosen from fewer rows; with all of them a stronger anchor may be needed to solve at all.
        stronger = [larger for larger in GRID if larger > alpha] if chosen else []
        for candidate in (alpha, *stronger):
            H.diagonal().copy_(diagonal)
            lam = anchor_strength(H, PLAIN_DAMPING if candidate is None else candidate)
            L, info = torch.linalg.cholesky_ex(add_anchor_(H, lam, self._anchor))
            if not int(info):
                return _Factor(H, L, lam, candidate)
        return None

    def _aim_one(
        self,
        task: EPMQ,
        group: _Group,
        factor: _Factor,
        W_m: torch.Tensor,
        moments: Moments,
        whole: Moments,
        held_out: Moments | None,
    ) -> None:
        """Give one layer its target; nothing but the layer is written to."""
        H, L, lam, alpha = factor
        D = moments.D
        task.report.lam, task.report.alpha = lam, alpha
        why = self._why_merged(task, alpha, group)
        if why or alpha is None:
            _keep_merged(task, why)
            D = None
        target = expert_target(W_m, D, L)
        try:
            check_finite(target.W, f"`{task.full_name}`: target W*", module=task.full_name)
        except EPMQNumericalError as error:
            self._on_bad(task, error)
            return
        task.report.merge_excess = target.merge_excess
        with self._phases.measure("deviation"):
            watch = group.watch(task, W_m)
            if watch is not None:
                task.watch(watch, target.W)
        task.aim(target.W, H, group.tokens)
        if D is None:
            return
        if task.refits_bias:
            task.aim_bias(W_m, whole)
        if task.alpha == "auto":
            task.guard(W_m, H, held_out)

    def _why_merged(self, task: EPMQ, alpha: float | None, group: _Group) -> str:
        """Why the merged weight is the target, where it is."""
        if self._is_routed(task.full_name) and should_use_fallback(
            task.routed_threshold, float(group.tokens), self._all_tokens()
        ):
            return f"only {group.tokens} calibration tokens were routed here"
        if alpha is None and task.alpha == "auto":
            some = "no target was better on the held-out rows"
            return some if group.held_out else "no held-out row was routed here"
        return ""


def _check_rank(task: EPMQ, H: torch.Tensor, tokens: int) -> None:
    rank = numerical_rank(H)
    if rank < H.shape[0]:
        raise EPMQNumericalError(
            f"`{task.full_name}`: alpha = 0 leaves the objective singular: the Gram has rank "
            f"{rank} of {H.shape[0]} (from {tokens} tokens).",
            module=task.full_name,
            code="EPMQ-F29",
            subject=f"module `{task.full_name}`",
            remedy="Set `alpha` above 0 or give more varied calibration rows.",
        )


def check_merged(task: EPMQ, W_m: torch.Tensor) -> None:
    """Raise :class:`EPMQNumericalError` if the merged weight holds a NaN or an infinity."""
    check_finite(
        W_m,
        f"`{task.full_name}`: the merged weight",
        module=task.full_name,
        code="EPMQ-F09",
        remedy="Merge again, or quantize a merge that is finite.",
    )


def _keep_merged(task: EPMQ, reason: str) -> None:
    task.report.target, task.report.reason = "merged", reason


def _taken(
    statistics: Statistics,
    tasks: list[EPMQ],
    merged: Mapping[EPMQ, torch.Tensor],
    device: torch.device,
) -> dict[EPMQ, Moments]:
    """The moments of every layer on one device; they were counted where the forward passes ran."""
    H, here = statistics.gram(), {}
    for task in tasks:
        one = statistics.take(task.full_name, H, merged[task].to(statistics.device))
        here[task] = one._replace(H=H.to(device)).to(device)
        H = here[task].H if statistics.device == device else H
    return here


def _summed(
    parts: Mapping[str, dict[EPMQ, Moments]], weights: Mapping[str, float]
) -> dict[EPMQ, Moments]:
    """The moments of all experts together; those of the parts are used up."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    # A routed module may be reached by an expert's held-out rows alone.
    factors = [weights.get(name, 1.0) for name in parts]
    first = next(iter(parts.values()))
    grams = [next(iter(part.values())).H for part in parts.values()]
    H = sum(factor * one for factor, one in zip(factors, grams, strict=True))
    return {task: combined([p[task] for p in parts.values()], factors, H) for task in first}


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, number in one.items():
            total[name] = total.get(name, 0) + number
    return total
