"""From the sums over one input to what its layers are rounded towards: λ, H_E, factor, W*.

Runs on the main thread, after a subset's forward passes and before any of its layers is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from gptqmodel.quantization.gptq import SharedHessianFactorCache
from gptqmodel.utils.fallback import should_use_fallback

from .choice import choose_alpha
from .errors import EPMQNumericalError
from .experts import Experts, check_finite
from .statistics import GroupStatistics, Moments, data_free_gram
from .target import add_anchor_, anchor_strength, centred, expert_target, numerical_rank
from .task import EPMQ
from .weighting import Weighting

# Where the merged weight is the target, the curvature is damped as the host damps its own.
PLAIN_DAMPING = 0.05


class _Group(NamedTuple):
    """What the layers of one input have beside their moments.

    Attributes:
        merged: layer → W_m, given away.
        held_out: layer → moments of the rows that α was chosen with; empty where none was.
        tokens: calibration tokens that reached the input.
        generation: of the host's cache of factors.
    """

    merged: dict[EPMQ, torch.Tensor]
    held_out: dict[EPMQ, Moments]
    tokens: int
    generation: int


class TargetSolver:
    """Gives the tasks of one shared input their targets.

    Args:
        experts: their weights, bound to the model's linear layers.
        weighting: β_i of every expert.
        anchor: what λ multiplies, see :func:`~epmq_gptq.target.add_anchor_`.
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
    ):
        self._experts = experts
        self._weighting = weighting
        self._anchor = anchor
        self._is_routed = is_routed
        self._on_bad = on_bad
        self._all_tokens = all_tokens

    def solve(
        self,
        tasks: list[EPMQ],
        fitted: GroupStatistics,
        held_out: GroupStatistics | None,
        error: Exception | None,
        generation: int,
    ) -> None:
        """Aim every task.

        Args:
            tasks: the layers of one input.
            fitted: the sums that targets are solved from.
            held_out: of the rows that choose α; None where there are none.
            error: the first trouble met while counting.
            generation: of the host's cache of factors.
        """
        parts = [fitted] if held_out is None else [fitted, held_out]
        tokens = _added(part.tokens for part in parts)
        merged = {}
        for task in tasks:
            merged[task] = task.merged_weight(fitted.device)
            # Nothing sensible can be made of a broken merge, whatever the policy.
            check_merged(task, merged[task])
            task.expect(tokens)
        if error is not None:
            if not isinstance(error, EPMQNumericalError):
                raise error
            for task in tasks:
                self._on_bad(task, error)
            return
        grams = [part.gram() for part in parts]
        total = sum(tokens.values())
        if total == 0 and all(self._is_routed(t.full_name) for t in tasks):
            # The limit of eq. 12 where only the anchor is left: ‖Q − W_m‖².
            grams[0].fill_diagonal_(1.0)
            for task in tasks:
                _keep_merged(task, "no calibration token was routed here")
                task.aim(merged[task], grams[0], tokens=1)
            return
        if not any(bool(gram.diagonal().any()) for gram in grams):
            # Also where no token came at all: λ is 0 too, so nothing says how to round.
            for task in tasks:
                self._on_bad(task, task.no_input(total))
            return
        moments = [
            {task: part.take(task.full_name, gram, merged[task]) for task in tasks}
            for part, gram in zip(parts, grams, strict=True)
        ]
        alphas = self._alphas(tasks, moments)
        whole = moments[0]
        for other, gram in zip(moments[1:], grams[1:], strict=True):
            grams[0].add_(gram)  # what was held out is calibration, too
            whole = {task: _with(whole[task], other[task]) for task in tasks}
        apart = moments[1] if len(moments) > 1 else {}
        self._aim(tasks, whole, alphas, _Group(merged, apart, total, generation))

    # ---- α -------------------------------------------------------------------------------------

    def _alphas(
        self, tasks: list[EPMQ], moments: list[dict[EPMQ, Moments]]
    ) -> dict[EPMQ, float | None]:
        """A number for every "auto", one for all layers of an input, so that they share a factor.

        None: on the held-out rows, no target was better than the merged weight.
        """
        auto = [task for task in tasks if task.alpha == "auto"]
        alphas = {task: task.alpha for task in tasks if task.alpha != "auto"}
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
            task.report.held_out = {f"{value:g}": gain for value, gain in gains.items()}
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
        H, D = known.H, known.D
        energy = float(H.diagonal().sum(dtype=torch.float64))
        H_m = H.clone()
        for expert, share in self._weighting.data_free.items():
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
                continue
            C = data_free_gram(task_vector, share * energy)
            H_m.add_(C)
            difference = self._experts.delta(expert, task.full_name, W_m)
            if difference.size():
                D = torch.zeros_like(W_m) if D is None else D
                difference.add_product_(D, C)
        return known._replace(H=H_m, D=D)

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
        whole = dict(moments)
        if tasks[0].refits_bias:
            moments = moments | {task: centred(moments[task]) for task in tasks}
            H = moments[tasks[0]].H
        lam = anchor_strength(H, PLAIN_DAMPING if alpha is None else alpha)
        L, info = torch.linalg.cholesky_ex(add_anchor_(H, lam, self._anchor))
        if int(info) != 0:
            for task in tasks:
                self._on_bad(task, task.not_positive_definite())
            return
        for task in tasks:
            task.report.lam, task.report.alpha = lam, alpha
            W_m, D = group.merged.pop(task), moments[task].D
            why = self._why_merged(task, alpha, group)
            if why:
                _keep_merged(task, why)
                D = None
            target = expert_target(W_m, D, L)
            try:
                check_finite(target.W, f"`{task.full_name}`: target W*", module=task.full_name)
            except EPMQNumericalError as error:
                self._on_bad(task, error)
                continue
            task.report.merge_excess = target.merge_excess
            task.aim(target.W, H, group.tokens)
            if D is None:
                continue
            if task.refits_bias:
                task.aim_bias(W_m, whole[task])
            if task.alpha == "auto":
                task.guard(W_m, H, group.held_out[task])
        if len(tasks) > 1:
            cache = SharedHessianFactorCache(group.generation, f"{tasks[0].name}@{alpha!r}")
            for task in tasks:
                task.attach_shared_hessian_cache(cache)

    def _why_merged(self, task: EPMQ, alpha: float | None, group: _Group) -> str:
        """Why the merged weight is the target, where it is."""
        if self._is_routed(task.full_name) and should_use_fallback(
            task.routed_threshold, float(group.tokens), self._all_tokens()
        ):
            return f"only {group.tokens} calibration tokens were routed here"
        if alpha is None:
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


def _with(one: Moments, other: Moments) -> Moments:
    """The sums of both; ``one`` is used up, and its H has the other's already."""
    D = one.D if other.D is None else other.D if one.D is None else one.D.add_(other.D)
    if one.inputs is None:
        return one._replace(D=D, count=one.count + other.count)
    inputs, outputs = one.inputs + other.inputs, one.outputs + other.outputs
    return Moments(one.H, D, inputs, outputs, one.count + other.count)


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, number in one.items():
            total[name] = total.get(name, 0) + number
    return total
