"""E-PMQ in GPTQModel's layer loop without a forward pass: the sums come from a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...calibration.batches import CalibrationPlan
from ...errors import EPMQNumericalError
from ...method.statistics import ExpertReader, GroupStatistics
from ..processor import EPMQProcessor
from ..task import EPMQ
from .bundle import PARTS, Bundle, RecordedGroup, RecordedLayer
from .recording import recorded
from .sums import ExpertSums
from .watch import RecordedWatch


class RecordedProcessor(EPMQProcessor):
    """The processor of a run whose statistics are recorded ones.

    Args:
        bundle: the statistics.
        names: the experts that count.
        others: what :class:`~epmq_gptq.host.processor.EPMQProcessor` takes beside a plan.
    """

    def __init__(self, *, bundle: Bundle, names: Sequence[str], **others):
        super().__init__(plan=CalibrationPlan(), **others)
        self.execution_config = replace(
            self.execution_config, require_fwd=False, fwd_replay_after_process=False
        )
        self.total_calibration_tokens = sum(bundle.tokens[name] for name in names)
        self._bundle, self._names = bundle, list(names)

    def verify_calibration_dataset(self, processor_index: int) -> bool:
        """There is none, so the host captures no inputs."""
        return False

    def solve_subset(self, names: Sequence[str]) -> None:
        """Give the layers of one subset their targets, before the host rounds them.

        Args:
            names: as the host names them within their layer.

        Raises:
            EPMQNumericalError: numbers cannot be trusted, now or on a worker before.
        """
        if self.failure is not None:
            raise self.failure
        groups: dict[int, tuple[RecordedGroup, list[EPMQ]]] = {}
        for name in names:
            task = self.tasks.get(name)
            if task is not None:
                group = self._bundle.layers[task.full_name]
                groups.setdefault(id(group), (group, []))[1].append(task)
        self._shared_input_capture_generation += 1
        for group, tasks in groups.values():
            with self.phases.measure("solve"):
                self._solve_group(group, tasks)
            self.shared_groups += len(tasks) > 1
            self.shared_layers += len(tasks) - 1

    def _solve_group(self, group: RecordedGroup, tasks: list[EPMQ]) -> None:
        device = torch.device(tasks[0].module.weight.device)
        with self.phases.measure("expert_reading"):
            sums = self._bundle.sums(group, self._names)
        parts = [
            {
                name: recorded(name, one, self.weighting, device)
                for name, one in sums.get(part, {}).items()
            }
            for part in PARTS
        ]
        fitted, held_out = parts if parts[0] else (parts[1], {})
        about = {task: group.layers[task.full_name] for task in tasks}
        error = next((_missed(task, one) for task, one in about.items() if one.bad), None)
        if not fitted:
            members = {task.full_name: task.rows for task in tasks}
            fitted = {"": GroupStatistics(group.columns, members, ExpertReader(), device)}
        self._give_targets(
            tasks,
            fitted,
            held_out,
            error,
            lambda task, W_m: self._watch(sums, task.full_name, W_m, about[task]),
        )
        for task, one in about.items():
            task.report.eta, task.report.rho = one.eta, one.rho

    def _watch(
        self,
        sums: dict[str, dict[str, ExpertSums]],
        layer: str,
        W_m: torch.Tensor,
        about: RecordedLayer,
    ) -> RecordedWatch | None:
        lacks = [lack for part in about.lacks.values() for lack in part.values()]
        if not self.qcfg.regret_rows or not lacks or None in lacks:
            return None
        return RecordedWatch(list(sums.values()), layer, W_m)


def _missed(task: EPMQ, layer: RecordedLayer) -> EPMQNumericalError:
    return EPMQNumericalError(
        f"`{task.full_name}`: its statistics were not recorded ({layer.bad.rstrip('.')}).",
        module=task.full_name,
        code="EPMQ-F55",
        subject=f"module `{task.full_name}`",
        remedy='Set `on_bad_module="rtn"` to round such layers to nearest, or leave them out with '
        "`dynamic`.",
    )
