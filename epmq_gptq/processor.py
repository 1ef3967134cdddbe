"""E-PMQ inside GPTQModel's layer loop: its processor and its per-layer task, with our statistics.

The host runs the layers, calls the hooks, rounds and packs. What changes: inputs are counted per
expert and per shared input, and between the forward passes of a subset and its rounding every layer
gets W* as its weight and H_E as its Hessian (``task.py``).
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from gptqmodel.looper.gptq_processor import GPTQProcessor, clone_gptq_config_for_module
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.models.base import BaseQModel
from gptqmodel.quantization.gptq import SharedHessianFactorCache
from gptqmodel.utils.fallback import should_use_fallback

from .calibration import CalibrationPlan
from .errors import EPMQHostError, EPMQInputError, EPMQNumericalError
from .experts import Experts, check_finite
from .report import ModuleReport
from .statistics import GroupStatistics, WeightDelta, data_free_gram
from .target import add_anchor_, anchor_strength, expert_target, numerical_rank
from .task import EPMQ
from .weighting import Weighting


@dataclass
class SharedInput:
    """The linear layers of one subset that read one input, and the sums over it.

    Attributes:
        names: the layers, relative to their decoder layer; the first one's hook counts for all.
        statistics: one per device that ran forward passes.
        error: the first trouble met while counting; nothing more is counted then.
    """

    names: list[str]
    statistics: dict[torch.device, GroupStatistics] = field(default_factory=dict)
    error: Exception | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class EPMQProcessor(GPTQProcessor):
    """The host's GPTQ processor, with expert-guided statistics and targets.

    Args:
        plan: the batches and the expert of each.
        experts: the experts' weights, already bound to the model's linear layers.
        weighting: β_i of every expert.
        is_routed: whether a module's full name is that of a routed (mixture-of-experts) module.
        host_arguments: what ``GPTQProcessor`` takes besides the calibration data.
    """

    def __init__(
        self,
        *,
        plan: CalibrationPlan,
        experts: Experts,
        weighting: Weighting,
        is_routed: Callable[[str], bool],
        **host_arguments,
    ):
        super().__init__(
            calibration=plan,
            prepare_dataset_func=lambda **_: plan.host_batches,
            calibration_concat_size=None,
            calibration_sort=None,
            calibration_concat_separator=None,
            **host_arguments,
        )
        self.plan = plan
        self.experts = experts
        self.weighting = weighting
        self.is_routed = is_routed
        self.reports: list[ModuleReport] = []
        self.failure: EPMQNumericalError | None = None
        self.stop_loop: Callable[[BaseException], None] = lambda error: None
        self.shared_groups = 0
        self.shared_layers = 0
        self._inputs: dict[str, SharedInput] = {}  # leader -> its group
        self._definition: BaseQModel | None = None  # the host's model, once the loop names it

    @staticmethod
    def _build_log_file_path(processor_name: str, current_time: str) -> Path:
        """The host would leave a `logs` folder in the working directory, which may be read-only."""
        return Path(os.devnull)

    # ---- one task per linear layer -----------------------------------------------------------

    def preprocess(self, module: NamedModule, fallback=None, **kwargs):
        """Create the layer's task, with `dynamic` overrides; what `dynamic` skips gets none."""
        qcfg = clone_gptq_config_for_module(self.qcfg, module.full_name, fallback=fallback)
        if qcfg is None:
            return
        self.qcfg_dynamic = qcfg
        task = EPMQ(module=module, qcfg=qcfg, region_timer=kwargs.get("region_timer"))
        if not isinstance(task.module, (torch.nn.Linear, transformers.Conv1D)):
            raise EPMQInputError(
                f"`{module.full_name}` is a {type(task.module).__name__}; E-PMQ quantizes linear "
                "layers only.",
                code="EPMQ-F38",
                subject=f"module `{module.full_name}`",
                remedy="Leave it out with `dynamic`.",
            )
        task.quantizer.configure(perchannel=True)
        self.tasks[module.name] = task

    def has_captured_input_ids(self, name: str) -> bool:
        """Always: ``end_shared_input_capture`` deals by name with a layer that saw no token."""
        return True

    # ---- counting ----------------------------------------------------------------------------

    def begin_shared_input_capture(
        self, model, subset_names: list[str], is_lm_head_module: bool = False
    ) -> dict[str, str]:
        """Group the subset's layers by the input they share. Returns ``{follower: leader}``.

        Raises:
            EPMQNumericalError: a worker met it in an earlier subset.
        """
        if self.failure is not None:
            raise self.failure
        self._definition = model
        shared: list[list[str]] = []
        if self.qcfg.hessian.dedup_shared_inputs and not is_lm_head_module:
            plan = self._resolve_shared_input_plan(model)
            for group in plan.shared_groups if plan else ():
                if group.explicit:
                    shared.append([name for name in subset_names if name in group.modules])
        grouped = {name for names in shared for name in names}
        shared += [[name] for name in subset_names if name not in grouped]

        leaders: dict[str, str] = {}
        with self.lock:
            self._inputs = {}
            for names in shared:
                names = [name for name in names if name in self.tasks]
                if not names:
                    continue
                self._inputs[names[0]] = SharedInput(names)
                leaders.update(dict.fromkeys(names[1:], names[0]))
            self._shared_input_leaders = leaders
            self._shared_input_capture_generation += 1
        return dict(leaders)

    def pre_process_fwd_hook(self, name: str):
        """The hook that counts a batch for the input ``name`` leads; followers count nothing."""
        group = self._inputs.get(name)

        def skip(module, inputs, output):
            return None

        def count(module, inputs, output):
            if group.error is None:
                self._guarded(group, lambda: self._count(group, inputs[0]))

        return skip if group is None else count

    def _count(self, group: SharedInput, X: torch.Tensor) -> None:
        index = self.current_batch_index()
        if index is None:
            raise EPMQHostError(
                "GPTQModel ran a calibration batch without naming it.",
                code="EPMQ-F49",
                subject="GPTQModel",
                remedy="Install a version that epmq_gptq was tested with.",
            )
        expert = self.plan.experts[index]
        keep = self._calibration_tokens(group.names[0])
        if torch.is_tensor(keep) and X.dim() >= 3 and keep.shape == X.shape[:2]:
            X = X[keep.to(device=X.device, dtype=torch.bool)]
        X = X.detach().reshape(-1, X.shape[-1])
        with group.lock:
            statistics = group.statistics.get(X.device)
            if statistics is None:
                statistics = group.statistics[X.device] = self._statistics(group, X.device)
            statistics.add(expert, X)

    def _calibration_tokens(self, name: str) -> torch.Tensor | None:
        """``(B, S)`` bool, the tokens that count in the running batch; None: all of them.

        A definition of ours says it for each layer, where a model reads more than one sequence;
        the host knows one mask for all layers.
        """
        of_layer = getattr(self._definition, "token_mask", None)
        if of_layer is not None:
            return of_layer(name)
        return getattr(getattr(self, "_mask_tls", None), "value", None)

    def _statistics(self, group: SharedInput, device: torch.device) -> GroupStatistics:
        tasks = {self.tasks[name].full_name: self.tasks[name] for name in group.names}

        def delta(member: str, expert: str) -> WeightDelta | None:
            task = tasks[member]
            difference = self.experts.delta(expert, member, task.merged_weight(device))
            # One reduction and one wait for two questions; who is to blame is asked only after.
            size = difference.size()
            if not math.isfinite(size):
                self.experts.check(expert, member)
                self._check_merged(task, task.merged_weight(device))
            return difference if size else None

        columns = next(iter(tasks.values())).columns
        return GroupStatistics(
            columns,
            {name: task.rows for name, task in tasks.items()},
            delta,
            device,
            weight=self.weighting.of,
            fold_once=self.weighting.needs_whole_gram,
        )

    @staticmethod
    def _guarded(group: SharedInput, step: Callable[[], None]) -> None:
        """Run a step of the counting and keep its trouble for the main thread.

        Forward passes on several devices run on the host's workers, where an exception ends the
        whole process.
        """
        try:
            step()
        except Exception as error:
            group.error = group.error or error

    # ---- targets -----------------------------------------------------------------------------

    def end_shared_input_capture(self, subset_names: list[str]) -> dict:
        """After a subset's forward passes, before any rounding: λ, H_E, factor and W* per input."""
        groups, self._inputs = self._inputs, {}
        leaders, self._shared_input_leaders = self._shared_input_leaders, {}
        for group in groups.values():
            start = time.perf_counter()
            self._solve(group)
            seconds = (time.perf_counter() - start) / len(group.names)
            for name in group.names:
                self.tasks[name].report.seconds += seconds
        self.shared_groups += len(set(leaders.values()))
        self.shared_layers += len(leaders)
        self.shared_input_dedup_count += len(leaders)
        self.shared_input_dedup_telemetry = {
            "enabled": bool(self.qcfg.hessian.dedup_shared_inputs),
            "expected_followers": len(leaders),
            "adopted_followers": len(leaders),
            "cumulative_adopted_followers": self.shared_input_dedup_count,
            "leader_count": len(set(leaders.values())),
            "follower_to_leader": dict(leaders),
            "subset_module_count": len(subset_names),
            "status": "verified",
        }
        return dict(self.shared_input_dedup_telemetry)

    def _solve(self, group: SharedInput) -> None:
        tasks = [self.tasks[name] for name in group.names]
        statistics = self._reduced(group, tasks)
        device = statistics.device
        merged = {}
        for task in tasks:
            merged[task] = task.merged_weight(device)
            # Nothing sensible can be made of a broken merge, whatever the policy.
            self._check_merged(task, merged[task])
            task.expect(
                target="experts",
                lam=0.0,
                tokens=dict(statistics.tokens),
                loss=None,
                excess=None,
                merge_excess=0.0,
                seconds=0.0,
            )
        if group.error is not None:
            if not isinstance(group.error, EPMQNumericalError):
                raise group.error
            for task in tasks:
                self._mark_bad(task, group.error)
            return
        H = statistics.gram()
        if statistics.total_tokens == 0 and all(self.is_routed(t.full_name) for t in tasks):
            # The limit of eq. 12 where only the anchor is left: ‖Q − W_m‖².
            H.fill_diagonal_(1.0)
            for task in tasks:
                self._keep_merged(task, "no calibration token was routed here")
                task.aim(merged[task], H, tokens=1)
            return
        if not bool(H.diagonal().any()):
            # Also where no token came at all: λ is 0 too, so nothing says how to round.
            for task in tasks:
                self._mark_bad(task, task.no_input(statistics.total_tokens))
            return
        D = {task: statistics.take_delta(task.full_name) for task in tasks}
        if self.weighting.data_free:
            # τ differs from layer to layer, so these have no Gram in common.
            for task in tasks:
                H_m, D[task] = self._with_data_free(task, merged[task], H, D[task])
                self._aim_cohort([task], merged, D, statistics.total_tokens, H_m, task.alpha)
            return
        cohorts: dict[float, list[EPMQ]] = {}
        for task in tasks:
            cohorts.setdefault(task.alpha, []).append(task)
        while cohorts:
            alpha, cohort = cohorts.popitem()
            H_E = H.clone() if cohorts else H
            self._aim_cohort(cohort, merged, D, statistics.total_tokens, H_E, alpha)

    def _with_data_free(
        self, task: EPMQ, W_m: torch.Tensor, H: torch.Tensor, D: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``H`` and ``D_m`` of one layer with the experts that have no calibration rows."""
        energy = float(H.diagonal().sum(dtype=torch.float64))
        H_m = H.clone()
        for expert, share in self.weighting.data_free.items():
            task_vector = self.experts.task_vector(expert, task.full_name, H.device)
            size = task_vector.size()
            if not math.isfinite(size):
                self.experts.check(expert, task.full_name)
                check_finite(
                    self.experts.base_weight(task.full_name),
                    f"`base`: weight of `{task.full_name}`",
                    module=task.full_name,
                    code="EPMQ-F09",
                )
            if not size:
                continue
            C = data_free_gram(task_vector, share * energy)
            H_m.add_(C)
            difference = self.experts.delta(expert, task.full_name, W_m)
            if difference.size():
                D = torch.zeros_like(W_m) if D is None else D
                difference.add_product_(D, C)
        return H_m, D

    @staticmethod
    def _check_merged(task: EPMQ, W_m: torch.Tensor) -> None:
        check_finite(
            W_m,
            f"`{task.full_name}`: the merged weight",
            module=task.full_name,
            code="EPMQ-F09",
            remedy="Merge again, or quantize a merge that is finite.",
        )

    def _reduced(self, group: SharedInput, tasks: list[EPMQ]) -> GroupStatistics:
        if not group.statistics:
            device = torch.device(tasks[0].module.weight.device)
            return self._statistics(group, device)
        # Always in the order of the devices' names, so that a rerun adds in the same order.
        first, *others = (group.statistics[d] for d in sorted(group.statistics, key=str))
        group.statistics = {}
        self._guarded(group, first.fold)
        for other in others:
            self._guarded(group, lambda other=other: first.merge_(other))
        return first

    def _aim_cohort(
        self,
        tasks: list[EPMQ],
        merged: dict[EPMQ, torch.Tensor],
        deltas: dict[EPMQ, torch.Tensor | None],
        tokens: int,
        H: torch.Tensor,
        alpha: float,
    ) -> None:
        """Give the layers of one input and one alpha their targets; ``H`` becomes ``H_E``."""
        if alpha == 0.0:
            rank = numerical_rank(H)
            if rank < H.shape[0]:
                raise EPMQNumericalError(
                    f"`{tasks[0].full_name}`: alpha = 0 leaves the objective singular: the Gram "
                    f"has rank {rank} of {H.shape[0]} (from {tokens} tokens).",
                    module=tasks[0].full_name,
                    code="EPMQ-F29",
                    subject=f"module `{tasks[0].full_name}`",
                    remedy="Set `alpha` above 0 or give more varied calibration rows.",
                )
        lam = anchor_strength(H, alpha)
        L, info = torch.linalg.cholesky_ex(add_anchor_(H, lam))
        if int(info) != 0:
            for task in tasks:
                self._mark_bad(task, task.not_positive_definite())
            return
        for task in tasks:
            D = deltas.pop(task)
            task.report.lam = lam
            if self.is_routed(task.full_name) and should_use_fallback(
                task.routed_threshold, float(tokens), self.total_calibration_tokens
            ):
                self._keep_merged(task, f"only {tokens} calibration tokens were routed here")
                D = None
            target = expert_target(merged.pop(task), D, L)
            try:
                check_finite(target.W, f"`{task.full_name}`: target W*", module=task.full_name)
            except EPMQNumericalError as error:
                self._mark_bad(task, error)
                continue
            task.report.merge_excess = target.merge_excess
            task.aim(target.W, H, tokens)
        if len(tasks) > 1:
            cache = SharedHessianFactorCache(
                self._shared_input_capture_generation, f"{tasks[0].name}@{alpha!r}"
            )
            for task in tasks:
                task.attach_shared_hessian_cache(cache)

    def _mark_bad(self, task: EPMQ, error: EPMQNumericalError) -> None:
        """On the main thread: stop here, or let the task round its merged weight to nearest."""
        if self.qcfg.on_bad_module == "raise":
            raise error
        task.bad = error

    @staticmethod
    def _keep_merged(task: EPMQ, reason: str) -> None:
        task.report.target, task.report.reason = "merged", reason

    # ---- rounding ----------------------------------------------------------------------------

    def process(self, module: NamedModule, *args, **kwargs):
        """Round one layer, the host's way, and keep its report."""
        task = self.tasks[module.name]
        super().process(module, *args, **kwargs)
        with self.lock:
            self.reports.append(task.report)
            first = task.failure is not None and self.failure is None
            if first:
                self.failure = task.failure
        if first:
            self.stop_loop(task.failure)
