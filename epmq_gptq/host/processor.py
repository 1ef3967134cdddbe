"""E-PMQ inside GPTQModel's layer loop: its processor, with statistics and targets of our own.

The host runs the layers, calls the hooks, rounds and packs. It calls us in this order, within a
layer subset by subset (q/k/v, then o, then gate/up, then down):

    preprocess                      a task for every linear layer of the decoder layer
    begin_shared_input_capture      which layers share an input; the experts run theirs
    pre_process_fwd_hook            the hook that counts, run for every calibration batch
    end_shared_input_capture        main thread, all batches counted: fold, solve, aim every task
    process                         a worker rounds one layer towards W* with curvature H_E
    submodule_finalize              a worker packs it
    offload                         a worker moves it to disk
    continuation_state_dict         at the end of a layer, where the run can go on after a kill
    leave                           at the end of the run, however it ended

A run from recorded sums (``source``) has no batches: in place of the three lines on inputs it is
called with ``solve_subset``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gptqmodel.looper.gptq_processor import GPTQProcessor, clone_gptq_config_for_module
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.models.base import BaseQModel

from ..calibration.batches import CalibrationPlan
from ..config import EPMQConfig
from ..errors import EPMQHostError, EPMQInputError, EPMQNumericalError
from ..experts.experts import Experts
from ..experts.linears import is_linear
from ..experts.passes.residual import first_states
from ..experts.passes.trajectories import ExpertTrajectories
from ..io.output import ran_full
from ..io.phases import Phases
from ..method.deltas import WeightDelta
from ..method.expert_error import LayerWatch, RowSample, sampled_rows
from ..method.nonfinite import Origin, Peaks, first_bad
from ..method.statistics import ExpertReader, GroupStatistics, TargetForm
from ..method.weighting import Weighting
from ..run_report import ModuleReport
from .failures import disk_error, within
from .recorded.recording import Recording, Watched
from .recorded.source import RecordedSource
from .solver import InputSums, TargetSolver, check_merged
from .task import EPMQ

# Parts of the host's state that are numbers and words only.
_TEXTS = ("log", "results", "statistics")


@dataclass
class SharedInput:
    """The linear layers of one subset that read one input, and the sums over it.

    Attributes:
        names: the layers, relative to their decoder layer; the first one's hook counts for all.
        statistics: one per device that ran forward passes; apart from the others the rows that are
            held out, and every expert where its weight is chosen by its sums ("" where it is not).
        error: the first trouble met while counting; nothing more is counted then.
        peaks: to find the token to blame for sums that are not finite.
        own_inputs: whether the inputs of the experts' own passes were counted.
        written: full names of the layers whose residual stream was counted.
    """

    names: list[str]
    statistics: dict[tuple[torch.device, bool, str], GroupStatistics] = field(default_factory=dict)
    error: Exception | None = None
    peaks: Peaks = field(default_factory=Peaks)
    own_inputs: bool = False
    written: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


class EPMQProcessor(GPTQProcessor):
    """The host's GPTQ processor, with expert-guided statistics and targets.

    Args:
        plan: the batches and the expert of each; none where nothing is run.
        experts: the experts' weights, already bound to the model's linear layers.
        weighting: β_i of every expert.
        is_routed: whether a module's full name is that of a routed (mixture-of-experts) module.
        trajectories: the experts' own passes; None where no target needs them.
        recording: keeps the sums of every expert; None where they are not kept.
        source: sums that an earlier run kept; then nothing is run, only solved and rounded.
        phases: where the time is counted.
        host_arguments: what ``GPTQProcessor`` takes besides the calibration data.
    """

    def __init__(
        self,
        *,
        plan: CalibrationPlan,
        experts: Experts,
        weighting: Weighting,
        is_routed: Callable[[str], bool],
        trajectories: ExpertTrajectories | None = None,
        recording: Recording | None = None,
        source: RecordedSource | None = None,
        phases: Phases | None = None,
        **host_arguments,
    ):
        super().__init__(
            calibration=plan if len(plan) else None,
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
        self.trajectories = trajectories
        self.recording = recording
        self.source = source
        if source is not None:
            self.execution_config = replace(
                self.execution_config, require_fwd=False, fwd_replay_after_process=False
            )
            self.total_calibration_tokens = source.total_tokens
        self.phases = phases or Phases()
        config: EPMQConfig = self.qcfg
        own = trajectories is not None
        self.form = TargetForm(
            config.eta if own else 0.0, config.rho if own else 0.0, biases=config.bias_refit
        )
        self._solver = TargetSolver(
            experts=experts,
            weighting=weighting,
            anchor=config.anchor,
            is_routed=is_routed,
            on_bad=self._mark_bad,
            all_tokens=lambda: self.total_calibration_tokens,
            phases=self.phases,
        )
        self._batches = Counter(plan.experts)  # expert -> batches
        self._streams = threading.local()  # tap -> r of the batch that this thread runs
        self._taps: list[torch.utils.hooks.RemovableHandle] = []
        self.reports: list[ModuleReport] = []
        self.failure: Exception | None = None  # the first trouble of a worker
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
        if not is_linear(task.module):
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
            Exception: a worker met it in an earlier subset.
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
        if self.trajectories is not None and self._inputs:
            self._enter_layer(model)
        return dict(leaders)

    def _enter_layer(self, model: BaseQModel) -> None:
        """Have the experts run the layer of this subset, and watch the merge's residual stream."""
        name = next(iter(self._inputs))
        layer = self.tasks[name].full_name.removesuffix(name).removesuffix(".")
        if not self.trajectories.enter(layer):
            return
        members = {self.tasks[n].full_name for group in self._inputs.values() for n in group.names}
        taps = {tap for member, tap in self.trajectories.taps.items() if member in members}
        if not self.form.rho or not taps:
            return
        running = model.model.get_submodule(layer)
        for tap in taps:

            def keep(module, arguments, options, tap=tap):
                setattr(self._streams, tap, first_states(arguments, options))

            handle = running.get_submodule(tap).register_forward_pre_hook(keep, with_kwargs=True)
            self._taps.append(handle)

    def pre_process_fwd_hook(self, name: str):
        """The hook that counts a batch for the input ``name`` leads; followers count nothing."""
        group = self._inputs.get(name)

        def skip(module, inputs, output):
            return None

        def count(module, inputs, output):
            if group.error is None:
                with self.phases.in_hook("gram"):
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
        if index == 0 or self.plan.experts[index - 1] != expert:
            # Read from disk while this expert's batches run, for the fold that comes after them.
            self.experts.prefetch(expert, [self.tasks[name].full_name for name in group.names])
        keep = self._calibration_tokens(group.names[0])
        rows, Z, gaps = self._rows_of(group, index, X, keep)
        kept = sampled_rows(
            len(rows),
            self.qcfg.regret_rows,
            batch=index,
            place=index - self.plan.experts.index(expert),
            batches=self._batches[expert],
        )
        apart = expert if self.weighting.keeps_apart or self.recording else ""
        key = X.device, self.plan.held_out[index], apart
        with group.lock:
            statistics = group.statistics.get(key)
            if statistics is None:
                statistics = group.statistics[key] = self._statistics(group, X.device)
            statistics.add(expert, rows, Z, gaps, kept)

    def _rows_of(
        self, group: SharedInput, batch: int, X: torch.Tensor, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """The rows of a batch that count, with z and r_i − r of them, all where ``X`` is."""
        Z, gaps = self._of_expert(group, batch, X, keep)
        rows = _rows(X, keep)
        group.peaks.add(self.plan.experts[batch], batch, X, keep)
        return rows, Z, gaps

    def _of_expert(
        self, group: SharedInput, batch: int, X: torch.Tensor, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """z and r_i − r of a batch, for the layers that have them (routed modules have none)."""
        members = [self.tasks[name].full_name for name in group.names]
        own = None if self.trajectories is None else self.trajectories.inputs(members[0], batch)
        if own is None or own.numel() != X.numel():
            return None, {}
        group.own_inputs = True
        Z = _rows(own.to(X.device), keep) if self.form.eta else None
        gaps = {}
        for member in members if self.form.rho else ():
            theirs = self.trajectories.stream(member, batch)
            if theirs is not None:
                ours = self._stream(member).detach().to(X.device).float()
                theirs = theirs.to(X.device).float()
                gaps[member] = _rows(theirs.reshape(ours.shape) - ours, keep)
                group.written.add(member)
        return Z, gaps

    def _stream(self, member: str) -> torch.Tensor:
        ours = getattr(self._streams, self.trajectories.taps[member], None)
        if ours is None:
            raise EPMQHostError(
                f"`{member}`: GPTQModel ran a copy of its layer without our hooks, so the residual "
                "stream before it is not known.",
                code="EPMQ-F49",
                subject=f"module `{member}`",
                remedy="Use one device, or set `rho=0`.",
            )
        return ours

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
        members = {name: task.rows for name, task in tasks.items()}
        sample = None
        if self.qcfg.regret_rows:
            sample = RowSample(members, eta=self.form.eta, rho=self.form.rho)
        return GroupStatistics(
            next(iter(tasks.values())).columns,
            members,
            _Reader(self, group.peaks, tasks, device),
            device,
            weight=None if self.recording else self.weighting.of,
            fold_once=self.weighting.needs_whole_gram and not self.recording,
            form=self.form._replace(biases=any(task.refits_bias for task in tasks.values())),
            phases=self.phases,
            sample=sample,
        )

    def _guarded(self, group: SharedInput, step: Callable[[], None]) -> None:
        """Run a step of the counting and keep its trouble for the main thread.

        Forward passes on several devices run on the host's workers, where an exception ends the
        whole process.
        """
        try:
            step()
        except Exception as error:
            task = self.tasks[group.names[0]]
            group.error = group.error or within(error, task, "counting its inputs")

    # ---- targets -----------------------------------------------------------------------------

    def end_shared_input_capture(self, subset_names: list[str]) -> dict:
        """After a subset's forward passes, before any rounding: λ, H_E, factor and W* per input."""
        groups, self._inputs = self._inputs, {}
        leaders, self._shared_input_leaders = self._shared_input_leaders, {}
        for handle in self._taps:
            handle.remove()
        self._taps = []
        for group in groups.values():
            start = time.perf_counter()
            with self.phases.measure("solve"):
                self._solve(group)
            seconds = (time.perf_counter() - start) / len(group.names)
            group.statistics.clear()  # the host keeps the hook, and with it the group, for a while
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
        fitted, held_out = (self._reduced(group, held_out=apart) for apart in (False, True))
        if not fitted:
            device = torch.device(tasks[0].module.weight.device)
            fitted = {"": self._statistics(group, device)}
        samples = [
            one.sample for one in (*fitted.values(), *held_out.values()) if one.sample is not None
        ]
        if self.recording is not None:
            fitted, held_out = self._recorded(group, tasks, fitted, held_out)
        shares = {task: self._shares(group, task) for task in tasks}

        def watch(task: EPMQ, W_m: torch.Tensor) -> LayerWatch | None:
            return LayerWatch(samples, task.full_name, W_m) if samples else None

        self._give_targets(InputSums(fitted, held_out, shares, watch, group.error))

    def _give_targets(self, sums: InputSums) -> None:
        """:meth:`TargetSolver.solve`, with the layer's name in what goes wrong."""
        try:
            self._solver.solve(sums, self._shared_input_capture_generation)
        except Exception as met:
            told = within(met, next(iter(sums.shares)), "its target")
            raise told from told.__cause__
        for task, (eta, rho) in sums.shares.items():
            task.report.eta, task.report.rho = eta, rho

    def solve_subset(self, names: Sequence[str]) -> None:
        """Give the layers of one subset their targets from recorded sums, before they are rounded.

        Args:
            names: as the host names them within their layer.

        Raises:
            EPMQNumericalError: numbers cannot be trusted, now or on a worker before.
        """
        if self.failure is not None:
            raise self.failure
        self._shared_input_capture_generation += 1
        tasks = [self.tasks[name] for name in names if name in self.tasks]
        for sums in self.source.inputs(tasks, self.phases):
            with self.phases.measure("solve"):
                self._give_targets(sums)
            self.shared_groups += len(sums.shares) > 1
            self.shared_layers += len(sums.shares) - 1

    def verify_calibration_dataset(self, processor_index: int) -> bool:
        """With recorded sums there is none, so the host captures no inputs."""
        return self.source is None and super().verify_calibration_dataset(processor_index)

    def _shares(self, group: SharedInput, task: EPMQ) -> tuple[float, float]:
        """η and ρ in the target of one layer."""
        eta = self.form.eta if group.own_inputs else 0.0
        return eta, self.form.rho if task.full_name in group.written else 0.0

    def _recorded(
        self,
        group: SharedInput,
        tasks: list[EPMQ],
        fitted: dict[str, GroupStatistics],
        held_out: dict[str, GroupStatistics],
    ) -> tuple[dict, dict]:
        """The sums as they were stored; as they are where there is nothing to store."""
        device = next(iter(fitted.values())).device
        columns = tasks[0].columns
        if group.error is not None:
            # The solver deals with it.
            outputs = {task.full_name: task.rows for task in tasks}
            self.recording.miss(outputs, columns, str(group.error))
            return fitted, held_out
        layers = []
        for task in tasks:
            W_m = task.merged_weight(device)
            check_merged(task, W_m)
            layers.append(Watched(task.full_name, W_m, *self._shares(group, task)))
        empty = {name: one for name, one in fitted.items() if not one.total_tokens}
        kept = self.recording.keep(layers, columns, [fitted, held_out])
        return kept[0] or kept[1] or empty, kept[1] if kept[0] else {}

    def _reduced(self, group: SharedInput, *, held_out: bool) -> dict[str, GroupStatistics]:
        """The sums over all devices, by what is kept apart."""
        found: dict[str, GroupStatistics] = {}
        # Always in the order of the devices' names, so that a rerun adds in the same order.
        for key in sorted(group.statistics, key=lambda key: str(key[0])):
            _, is_held_out, expert = key
            if is_held_out != held_out:
                continue
            one = group.statistics[key]
            first = found.setdefault(expert, one)
            step = first.fold if first is one else functools.partial(first.merge_, one)
            self._guarded(group, step)
        return found

    def leave(self) -> None:
        """Take our hooks off the model, and forget what was counted, however the run ended."""
        for handle in self._taps:
            handle.remove()
        self._taps, self._inputs = [], {}
        self._close_device_smi_handles()  # each has a thread; the host forgets them in a failed run

    def _mark_bad(self, task: EPMQ, error: EPMQNumericalError) -> None:
        """On the main thread: stop here, or let the task round its merged weight to nearest."""
        if self.qcfg.on_bad_module == "raise":
            raise error
        task.bad = error

    # ---- rounding ----------------------------------------------------------------------------

    def process(self, module: NamedModule, *args, **kwargs):
        """Round one layer, the host's way, and keep its report."""
        task = self.tasks[module.name]
        try:
            with self.phases.measure("round"):
                super().process(module, *args, **kwargs)
        except Exception as error:  # on a worker, where it would end the whole process
            self._stop(within(error, task, "rounding it"))
            return
        with self.lock:
            self.reports.append(task.report)
        if task.failure is not None:
            self._stop(task.failure)

    def submodule_finalize(self, module: NamedModule, model: BaseQModel, **kwargs):
        """Pack one layer, the host's way; nothing of a run that has failed by then."""
        if self.failure is not None:
            return
        try:
            super().submodule_finalize(module, model, **kwargs)
        except Exception as error:  # on a worker, as above
            self._stop(within(error, self.tasks.get(module.name, module), "packing it"))

    def offload(
        self,
        move: Callable[..., None],
        model: torch.nn.Module,
        module: torch.nn.Module,
        **options: Any,
    ) -> None:
        """Move a finished layer to disk, the host's way; nothing of a run that has failed by then.

        Args:
            move: the host's function.
            model: the whole network.
            module: the layer, packed.
            options: of ``move``.
        """
        if self.failure is not None:
            return
        try:
            move(model=model, module=module, **options)
        except Exception as error:  # on a worker, as above
            named = model.named_modules()
            name = next((name for name, one in named if one is module), type(module).__name__)
            what = f"`{name}`: moving it to disk"
            self._stop(disk_error(error, what) if ran_full(error) else error)

    def _stop(self, error: Exception) -> None:
        """Have the main thread raise this, unless another worker was first."""
        with self.lock:
            first = self.failure is None
            if first:
                self.failure = error
        if first:
            self.stop_loop(error)

    # ---- going on after a kill -----------------------------------------------------------------

    def continuation_state_dict(self) -> dict[str, Any]:
        """What the layers that are left and the report depend on, at the end of a layer."""
        assert not self._inputs, "no sum is complete within a layer"
        state = super().continuation_state_dict()
        with self.lock:
            # The host's codec knows no number that is not finite, nor numpy's; JSON text has both.
            for key in _TEXTS:
                state[key] = json.dumps(state[key], default=float)
            state["epmq"] = {
                "reports": json.dumps(
                    [report.model_dump() for report in self.reports], default=float
                ),
                "shared": [self.shared_groups, self.shared_layers],
                "generation": self._shared_input_capture_generation,
                "rounded": {one.module: one.rounded for one in self.reports},
            }
        if self.recording is not None:
            state["epmq"]["recorded"] = json.dumps(self.recording.recorder.state())
        if self.trajectories is not None:
            state["epmq"]["trajectories"] = self.trajectories.continuation_state()
        return state

    def load_continuation_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`continuation_state_dict` was called."""
        own = state["epmq"]
        super().load_continuation_state_dict(
            state | {key: json.loads(state[key]) for key in _TEXTS}
        )
        self.reports = [ModuleReport.model_validate(one) for one in json.loads(own["reports"])]
        for report in self.reports:
            report.rounded = own["rounded"][report.module]
        self.shared_groups, self.shared_layers = own["shared"]
        self._shared_input_capture_generation = own["generation"]
        if self.recording is not None:
            self.recording.recorder.resume(json.loads(own["recorded"]))
        if self.trajectories is not None:
            self.trajectories.resume(own["trajectories"])


class _Reader(ExpertReader):
    """The experts of a run, for the layers of one input, on one device."""

    def __init__(
        self, processor: EPMQProcessor, peaks: Peaks, tasks: dict[str, EPMQ], device: torch.device
    ):
        self._experts, self._plan = processor.experts, processor.plan
        self._trajectories = processor.trajectories
        self._peaks, self._tasks, self._device = peaks, tasks, device

    def delta(self, member: str, expert: str) -> WeightDelta | None:
        task = self._tasks[member]
        difference = self._experts.delta(expert, member, task.merged_weight(self._device))
        self._experts.release(expert)
        # One reduction and one wait for two questions; who is to blame is asked only after.
        size = difference.size()
        if not math.isfinite(size):
            self._experts.check(expert, member)
            check_merged(task, task.merged_weight(self._device))
        return difference if size else None

    def bias(self, member: str, expert: str) -> torch.Tensor | None:
        task = self._tasks[member]
        if not task.refits_bias:
            return None
        b_m = task.module.bias.detach().to(self._device, torch.float32)
        difference = self._experts.bias(expert, member).to(b_m) - b_m
        return difference if bool(difference.any()) else None

    def blame(self, expert: str, *, own_pass: bool) -> tuple[Origin, str] | None:
        if own_pass:
            origin = self._in_own_pass(expert)
        else:
            origin = self._peaks.first_bad(expert) or self._peaks.largest(expert)
        if origin is None:
            return None
        ids = self._plan.batches[origin.batch].get("input_ids")
        return origin, origin.told(expert, self._plan.experts, ids)

    def _in_own_pass(self, expert: str) -> Origin | None:
        """The inputs of an expert's own pass are kept as long as this layer runs."""
        for batch, owner in enumerate(self._plan.experts):
            Z = None
            if owner == expert:
                Z = self._trajectories.inputs(next(iter(self._tasks)), batch)
            origin = None if Z is None else first_bad(batch, Z)
            if origin is not None:
                return origin
        return None


def _rows(X: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """``(n, d)``: the tokens of ``X: (B, S, d)`` or ``(B · S, d)`` that count.

    Args:
        keep: ``(B, S)`` bool, or None where all count.
    """
    rows = X.detach().reshape(-1, X.shape[-1])
    if torch.is_tensor(keep) and keep.numel() == len(rows):
        return rows[keep.to(device=X.device, dtype=torch.bool).reshape(-1)]
    return rows
