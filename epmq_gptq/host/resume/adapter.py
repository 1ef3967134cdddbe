"""The state of an E-PMQ run at the end of a layer, for GPTQModel's checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from gptqmodel.looper.checkpoint_devices import checkpoint_device_topology
from gptqmodel.looper.gptq_checkpoint import QuantizationCheckpointAdapter

from ...calibration.batches import split_rows
from ...errors import EPMQHostError
from ...experts.linears import is_transposed, name_in_layer
from ...experts.passes.layer_walk import split_state
from .identity import BATCH_SIZES

# Files of recorded statistics go beside the host's packed modules, whose names have no slash.
_STATISTICS = "statistics/"


class EPMQCheckpointAdapter(QuantizationCheckpointAdapter):
    """The host's adapter, for :class:`~epmq_gptq.host.processor.EPMQProcessor`.

    To what the host keeps (packed and dense tensors, the inputs of the next layer, generators of
    random numbers, placement) it adds the experts' own passes, the report, the recorded statistics
    and what a definition of ours knows (T5's position tables).

    Args:
        identity: of the run, see :func:`~epmq_gptq.host.resume.identity.run_identity`.
        batch_sizes: the one that the rows were batched with by the first attempt, and this one's.
        spent: what this attempt has spent so far: ``{"seconds": …, "phases": {…}}``.

    Attributes:
        before: what earlier attempts have spent; ``{}`` where this is the first.
        attempts: how many there were, this one included.
        layer: that has just ended.
    """

    def __init__(
        self,
        identity: Mapping[str, Any],
        batch_sizes: tuple[int, int],
        spent: Callable[[], dict[str, Any]],
    ):
        self._identity = dict(identity)
        self._batch_sizes = batch_sizes
        self._spent = spent
        self.before: dict[str, Any] = {}
        self.attempts = 1
        self.layer = -1
        self._recorded: dict[str, Path] = {}  # files of statistics that are in the store

    def bind(self, context) -> dict[str, Any]:
        """Take hold of a loop that begins. Returns the identity of the run."""
        from ..processor import EPMQProcessor

        if len(context.processors) != 1 or not isinstance(context.processors[0], EPMQProcessor):
            raise EPMQHostError(
                "GPTQModel runs E-PMQ with other processors than its own.",
                code="EPMQ-F49",
                subject="GPTQModel",
                remedy="Install a version that epmq_gptq was tested with.",
            )
        self.model, self.execution = context.model, context.execution
        self.processors = context.processors
        self.processor = context.processors[0]
        self.shared_state = context.shared_state
        self.offload = Path(self.model.quantize_config.offload_to_disk_path)
        self._artifacts: dict[str, Path] = {}
        return {
            "adapter_version": self.VERSION,
            "epmq": self._identity,
            BATCH_SIZES: list(self._batch_sizes),
            "device_topology": checkpoint_device_topology(self.execution.execution_device_pools()),
            "packed_kernel": str(self.model.qlinear_kernel),
            "runtime": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    # ---- committing --------------------------------------------------------------------------

    def capture(self) -> tuple[dict[str, Any], dict[str, bytes | Path]]:
        """Everything that the next layers and the report depend on; the loop stands still."""
        state, artifacts = super().capture()
        state["definition"] = _definition_state(self.model)
        state["spent"] = total_spent(self.before, self._spent())
        state["attempts"] = self.attempts
        state["layer"] = self.layer
        recording = self.processor.recording
        if recording is not None:
            for file in recording.recorder.files():
                artifacts[_STATISTICS + file.name] = self._recorded.get(file.name, file)
        return state, artifacts

    def committed(self, artifacts: Mapping[str, Path]) -> None:
        """What is in the store is not copied again."""
        modules, self._recorded = _apart(artifacts)
        super().committed(modules)

    # ---- going on ----------------------------------------------------------------------------

    def restore(self, state: dict[str, Any], artifacts: Mapping[str, Path]) -> None:
        """Put the loop where :meth:`capture` found it."""
        modules, self._recorded = _apart(artifacts)
        for name in state["specs"]:
            _name_sizes(self.model.model.get_submodule(name))
        _split_batches(state["processors"][0], self.processor.plan.batches)
        super().restore(state, modules)
        if state["definition"] is not None:
            self.model.load_continuation_state_dict(state["definition"])
        for name, file in self._recorded.items():
            # A plain name, whatever the checkpoint says: it is copied into that folder alone.
            shutil.copyfile(file, self.processor.recording.recorder.path / Path(name).name)
        self.before, self.attempts = state["spent"], state["attempts"] + 1
        told = getattr(self.model, "subset_callback", None)
        if told is not None and state["specs"]:
            # Whoever shows how far a run is hears of what was done before.
            told(
                stage="quant_complete",
                layer_idx=state["layer"],
                module_names=[name_in_layer(name) for name in state["specs"]],
            )


def _definition_state(model: Any) -> Any:
    get = getattr(type(model), "continuation_state_dict", None)
    return None if get is None else get(model)


def _split_batches(state: dict[str, Any], batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Bring what is kept of each batch to this attempt's batches, which may be smaller."""
    cache = state["cache"]
    rows = [len(next(iter(batch.values()))) for batch in batches]
    # Behind the last layer there are none, and nothing is left to run.
    if len(cache.layer_inputs) in (0, len(rows)):
        return
    pieces: list[list[int]] = []
    for inputs in cache.layer_inputs:
        pieces.append([])
        while sum(pieces[-1]) < len(inputs[0]):
            pieces[-1].append(rows.pop(0))
    for field in fields(cache):
        former = getattr(cache, field.name)
        if len(former or ()) == len(pieces):
            parts = [split_rows(one, sizes) for one, sizes in zip(former, pieces, strict=True)]
            setattr(cache, field.name, [part for each in parts for part in each])
    state["num_batches"] = len(batches)
    if "trajectories" in state["epmq"]:
        passes = state["epmq"]["trajectories"]
        passes["walk"] = split_state(passes["walk"], pieces)


def _apart(artifacts: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Packed modules by name, and files of statistics by name."""
    modules, recorded = {}, {}
    for name, path in artifacts.items():
        if name.startswith(_STATISTICS):
            recorded[name.removeprefix(_STATISTICS)] = path
        else:
            modules[name] = path
    return modules, recorded


def _name_sizes(module: torch.nn.Module) -> None:
    """The host compares sizes by the names that a linear layer has; GPT-2's have others."""
    if is_transposed(module):
        module.in_features, module.out_features = module.weight.shape


def total_spent(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What several attempts have spent together."""
    phases = dict(before.get("phases", {}))
    for name, seconds in now["phases"].items():
        phases[name] = phases.get(name, 0.0) + seconds
    return {"seconds": before.get("seconds", 0.0) + now["seconds"], "phases": phases}
