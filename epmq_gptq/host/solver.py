"""What ``method/solve.py`` is asked for the layers of one input, and what becomes of its answers.

Runs on the main thread, after a subset's forward passes and before any of its layers is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from gptqmodel.quantization.gptq import SharedHessianFactorCache
from gptqmodel.utils.fallback import should_use_fallback

from ..errors import EPMQNumericalError
from ..experts.experts import Experts, check_finite
from ..io.phases import Phases
from ..method.expert_error import Watch
from ..method.solve import DataFree, LayerOptions, Solution, SolveOptions, Sums, solve
from ..method.statistics import GroupStatistics, Moments
from ..method.weighting import Weighting
from .recorded.sums import RecordedStatistics
from .task import EPMQ

Statistics = GroupStatistics | RecordedStatistics
WatchOf = Callable[[EPMQ, torch.Tensor], Watch | None]


class InputSums(NamedTuple):
    """The sums over one input, just counted or recorded by an earlier run.

    Attributes:
        fitted: expert → the sums that targets are solved from; of all experts together under one
            name, unless they are kept apart.
        held_out: the same of the rows that choose α; may be empty.
        shares: layer of this input → η and ρ in its target.
        watch: (layer, W_m) → what tells how far it lies from every expert, or None.
        error: the first trouble met while counting.
    """

    fitted: Mapping[str, Statistics]
    held_out: Mapping[str, Statistics]
    shares: Mapping[EPMQ, tuple[float, float]]
    watch: WatchOf
    error: Exception | None = None


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

    def solve(self, sums: InputSums, generation: int) -> None:
        """Aim every task of one input.

        Args:
            sums: over it.
            generation: of the host's cache of factors.
        """
        tasks, (fitted, held_out, _, watch, error) = list(sums.shares), sums
        counted = _added(one.tokens for part in (fitted, held_out) for one in part.values())
        device = next(iter(fitted.values())).device
        merged = [task.merged_weight(device) for task in tasks]
        for task, W_m in zip(tasks, merged, strict=True):
            # Nothing sensible can be made of a broken merge, whatever the policy.
            check_merged(task, W_m)
            task.expect(counted)
        if error is not None:
            if not isinstance(error, EPMQNumericalError):
                raise error
            for task in tasks:
                self._on_bad(task, error)
            return
        tokens = sum(counted.values())
        if tokens == 0 and all(self._is_routed(task.full_name) for task in tasks):
            # The limit of eq. 12 where only the anchor is left: ‖Q − W_m‖².
            only_anchor = Solution(
                H_E=torch.eye(tasks[0].columns, device=device),
                merged=True,
                reason="no calibration token was routed here",
            )
            for task, W_m in zip(tasks, merged, strict=True):
                task.aim(replace(only_anchor, W=W_m, alpha=task.report.alpha), tokens=1)
            return
        layers = [self._options(task, W_m, tokens) for task, W_m in zip(tasks, merged, strict=True)]
        moments = Sums(_moments(fitted, tasks, merged), _moments(held_out, tasks, merged))
        options = SolveOptions(layers, self._anchor, self._weighting.keeps_apart, self._phases)
        solutions = solve(moments, merged, options)
        for task, W_m, solution in zip(tasks, merged, solutions, strict=True):
            self._aim(task, W_m, solution, tokens, watch)
        self._share_factors(tasks, solutions, generation)

    def _options(self, task: EPMQ, W_m: torch.Tensor, tokens: int) -> LayerOptions:
        keep = ""
        if self._is_routed(task.full_name) and should_use_fallback(
            task.routed_threshold, float(tokens), self._all_tokens()
        ):
            keep = f"only {tokens} calibration tokens were routed here"
        data_free = _DataFreeExperts(self._experts, self._weighting.data_free, task.full_name, W_m)
        return LayerOptions(task.alpha, task.refits_bias, keep, data_free)

    def _aim(
        self, task: EPMQ, W_m: torch.Tensor, solution: Solution, tokens: int, watch: WatchOf
    ) -> None:
        if solution.fault:
            error = task.fault(solution, tokens)
            if solution.fault == "rank":
                raise error
            task.say(solution)
            self._on_bad(task, error)
            return
        with self._phases.measure("deviation"):
            watching = watch(task, W_m)
            if watching is not None:
                task.watch(watching, solution.W)
        task.aim(solution, tokens)

    @staticmethod
    def _share_factors(tasks: list[EPMQ], solutions: list[Solution], generation: int) -> None:
        """Layers with one curvature have it factorised once by the host."""
        alike: dict[int, list[EPMQ]] = {}
        for task, solution in zip(tasks, solutions, strict=True):
            if solution.H_E is not None:
                alike.setdefault(id(solution.H_E), []).append(task)
        for index, group in enumerate(alike.values()):
            if len(group) > 1:
                cache = SharedHessianFactorCache(generation, f"{group[0].name}@{index}")
                for task in group:
                    task.attach_shared_hessian_cache(cache)


class _DataFreeExperts:
    """The experts without rows, read one after the other when they are asked for."""

    def __init__(
        self, experts: Experts, shares: Mapping[str, float], module: str, W_m: torch.Tensor
    ):
        self._experts, self._shares, self._module, self._W_m = experts, shares, module, W_m

    def __bool__(self) -> bool:
        return bool(self._shares)

    def __iter__(self) -> Iterator[DataFree]:
        for expert, share in self._shares.items():
            task_vector = self._experts.task_vector(expert, self._module, self._W_m.device)
            size = task_vector.size()
            if not math.isfinite(size):
                self._experts.check(expert, self._module)
                check_finite(
                    self._experts.base_weight(self._module),
                    f"`base`: weight of `{self._module}`",
                    module=self._module,
                    code="EPMQ-F09",
                )
            if size:
                delta = self._experts.delta(expert, self._module, self._W_m)
                yield DataFree(share, task_vector, delta)


def check_merged(task: EPMQ, W_m: torch.Tensor) -> None:
    """Raise :class:`EPMQNumericalError` if the merged weight holds a NaN or an infinity."""
    check_finite(
        W_m,
        f"`{task.full_name}`: the merged weight",
        module=task.full_name,
        code="EPMQ-F09",
        remedy="Merge again, or quantize a merge that is finite.",
    )


def _moments(
    part: Mapping[str, Statistics], tasks: list[EPMQ], merged: list[torch.Tensor]
) -> dict[str, list[Moments]]:
    """The moments of every layer where its W_m is; they were counted where forward passes ran."""
    found = {}
    for name, statistics in part.items():
        counted = statistics.gram()
        H = counted.to(merged[0].device)
        found[name] = [
            statistics.take(task.full_name, counted, W_m.to(statistics.device))
            ._replace(H=H)
            .to(H.device)
            for task, W_m in zip(tasks, merged, strict=True)
        ]
    return found


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, number in one.items():
            total[name] = total.get(name, 0) + number
    return total
