"""The sums of an earlier run in the place of calibration: what a run is solved from without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ...errors import EPMQNumericalError
from ...io.phases import Phases
from ...method.statistics import ExpertReader, GroupStatistics
from ...method.weighting import Weighting
from ..solver import InputSums
from ..task import EPMQ
from .bundle import PARTS, Bundle, RecordedGroup, RecordedLayer
from .recording import recorded
from .sums import ExpertSums
from .watch import RecordedWatch


class RecordedSource:
    """Sums that are kept in a bundle.

    Args:
        bundle: the statistics.
        names: the experts that count.
        weighting: β_i of each; what is stored is without it.
        watches: report how far the outputs of a layer lie from every expert's.
    """

    def __init__(
        self, bundle: Bundle, names: Sequence[str], weighting: Weighting, *, watches: bool
    ):
        self.total_tokens = sum(bundle.tokens[name] for name in names)
        self._bundle, self._names = bundle, list(names)
        self._weighting, self._watches = weighting, watches

    def inputs(self, tasks: Sequence[EPMQ], phases: Phases) -> Iterator[InputSums]:
        """The sums of each input that some of these layers read."""
        groups: dict[int, tuple[RecordedGroup, list[EPMQ]]] = {}
        for task in tasks:
            group = self._bundle.layers[task.full_name]
            groups.setdefault(id(group), (group, []))[1].append(task)
        for group, members in groups.values():
            with phases.measure("expert_reading"):
                sums = self._bundle.sums(group, self._names)
            yield self._of_input(group, members, sums)

    def _of_input(
        self, group: RecordedGroup, tasks: list[EPMQ], sums: dict[str, dict[str, ExpertSums]]
    ) -> InputSums:
        device = torch.device(tasks[0].module.weight.device)
        parts = [
            {
                name: recorded(name, one, self._weighting, device)
                for name, one in sums.get(part, {}).items()
            }
            for part in PARTS
        ]
        fitted, held_out = parts if parts[0] else (parts[1], {})
        about = {task: group.layers[task.full_name] for task in tasks}
        if not fitted:
            members = {task.full_name: task.rows for task in tasks}
            fitted = {"": GroupStatistics(group.columns, members, ExpertReader(), device)}
        return InputSums(
            fitted,
            held_out,
            {task: (one.eta, one.rho) for task, one in about.items()},
            lambda task, W_m: self._watch(sums, task.full_name, W_m, about[task]),
            next((_missed(task, one) for task, one in about.items() if one.bad), None),
        )

    def _watch(
        self,
        sums: Mapping[str, Mapping[str, ExpertSums]],
        layer: str,
        W_m: torch.Tensor,
        about: RecordedLayer,
    ) -> RecordedWatch | None:
        lacks = [lack for part in about.lacks.values() for lack in part.values()]
        if not self._watches or not lacks or None in lacks:
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
