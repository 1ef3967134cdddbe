"""Merging of safetensors checkpoints, streamed from disk to disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import EPMQInputError
from ..io.output import check_output, check_space, new_folder
from .calibrated import RegressionMerge, check_calibration, read_plan
from .companions import copy_companions
from .core import check_merge, run_method
from .inputs import Inputs, check_inputs, open_inputs
from .method import MergeMethod
from .record import RECORD_NAME, build_record
from .regmean import RegMean
from .shards import Entry, ShardWriter

# About 2 GB, so that a shard loads on a small machine.
MAX_SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        out: the folder.
        method: name of the merge method.
        parameters: all of its options, defaults included.
        record: what ``epmq_merge.json`` holds.
        tensors: how many tensors were written.
        bytes: of their data.
    """

    out: Path
    method: str
    parameters: dict[str, Any]
    record: dict[str, Any]
    tensors: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data; of the folder only its name, so that it can be published."""
        return {
            "checkpoint": self.out.name,
            "method": self.method,
            "parameters": dict(self.parameters),
            "record": dict(self.record),
            "tensors": self.tensors,
            "bytes": self.bytes,
        }


def merge(
    method: str,
    *,
    base: str | Path | None,
    experts: Mapping[str, str | Path],
    out: str | Path,
    parameters: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    device: str | torch.device = "cpu",
    calibration: Any = None,
    batch_size: int = 1,
    seed: int = 0,
    base_folder: str | Path = "",
) -> MergeResult:
    """Merge checkpoints into a new folder that is written whole or not at all.

    At any time one tensor name is in memory, K + 1 times as stored (mapped from disk on the CPU)
    and as one merged copy; fp32 lives in blocks. Every tensor of the models is read
    ``merge_methods()[method]["passes"]`` times, and every file once more for its digest. Methods
    with ``needs_calibration`` also run every expert's rows through the models, layer by layer: one
    layer is in memory and, on the CPU, the rows' hidden states.

    Args:
        method: name of a merge method, see :func:`epmq_gptq.merging.merge_methods`.
        base: folder or hub id of theta_0; ``average`` does without. Gives the output its dtypes,
            configuration and tokenizer; without it the first expert does.
        experts: expert name → folder or hub id of theta_i.
        out: the output folder.
        parameters: the method's options, over its defaults.
        max_shard_bytes: data bytes per shard; with more than one shard an index is written.
        overwrite: replace a non-empty ``out``.
        progress: called with (steps done, steps in all, what was done).
        device: where the arithmetic runs; a GPU pays for ``wudi`` and the methods with calibration.
        calibration: for these methods only: expert name → its rows, in any form that
            ``plan_for_folder`` reads, or a ``CalibrationPlan``. The
            RegMean papers and FusionBench take 256 rows of each expert's training data.
        batch_size: calibration rows per forward pass, at most.
        seed: of the drawing of calibration rows.
        base_folder: what relative paths within ``calibration`` are relative to.

    Raises:
        EPMQInputError: an option, input or output cannot be used; nothing was computed.
        EPMQNumericalError: a tensor holds NaN or Inf, or the merge left its dtype's range; nothing
            was written.
        EPMQError: the disk ran full; nothing is left of what was written.
    """
    built = check_merge(method, parameters, base is not None, list(experts))
    check_calibration(built, calibration)
    place = _check_options(experts, max_shard_bytes, device)
    with ExitStack() as stack:
        inputs = open_inputs(base, experts, stack)
        folders = {c.what: c.path for c, _ in inputs.all()}
        target = check_output(Path(out), folders, overwrite)
        reference = inputs.reference
        entries = [Entry(i.name, i.shape, i.dtype) for i in map(reference.info, reference)]
        copied = check_inputs(inputs)
        check_space(target, sum(entry.nbytes for entry in entries))
        names = [name for name in reference if name not in copied]
        rows = {"batch_size": batch_size, "seed": seed, "base_folder": Path(base_folder)}
        layers = _layers(built, inputs, names, place, calibration, **rows)
        steps = built.passes * len(names) + len(inputs.all()) + (layers.steps if layers else 0)
        tick = _Ticker(progress, steps)

        with new_folder(target) as folder:
            writer = ShardWriter(folder, entries, max_shard_bytes)
            solved = _write_layers(layers, writer, tick)
            run_method(
                built,
                [name for name in names if name not in solved],
                load=lambda name: inputs.stack(name, built.needs_base, place),
                write=writer.write,
                tick=tick,
            )
            for name in copied:
                writer.write(name, reference.read(name))
            writer.finish()
            copy_companions(reference, entries, folder)
            about = layers.about() if layers else None
            record = build_record(built, inputs, len(entries), place, tick, about)
            _write_record(record, folder)
    return MergeResult(target, method, built.parameters(), record, len(entries), writer.total_bytes)


def _layers(
    method: MergeMethod,
    inputs: Inputs,
    names: Sequence[str],
    place: torch.device,
    calibration: Any,
    **rows: Any,
) -> RegressionMerge | None:
    """What is merged layer by layer, if anything is; rows and models are checked by then."""
    if not method.needs_calibration:
        return None
    assert isinstance(method, RegMean)
    plan = read_plan(inputs, calibration, **rows)
    return RegressionMerge(method, inputs, plan, names, place)


def _write_record(record: Mapping[str, Any], folder: Path) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD_NAME).write_text(text, encoding="utf-8")


def _write_layers(
    layers: RegressionMerge | None, writer: ShardWriter, tick: Callable[[str], None]
) -> set[str]:
    """Write what is merged layer by layer; the names of these tensors."""
    solved: set[str] = set()
    for name, tensor in layers.tensors(tick) if layers else ():
        writer.write(name, tensor)
        solved.add(name)
        tick(name)
    return solved


class _Ticker:
    """Counts steps for ``progress``."""

    def __init__(self, progress: Callable[[int, int, str], None] | None, total: int):
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, what: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, what)


def _check_options(
    experts: Mapping[str, str | Path], max_shard_bytes: int, device: str | torch.device
) -> torch.device:
    for name in experts:
        # Names go into the record, which is published; a path of this machine must not.
        if not isinstance(name, str) or not name.strip() or name.startswith(("/", "~")):
            raise EPMQInputError(
                f"`experts` should have short names as keys, got {name!r}.",
                code="EPMQ-O01",
                subject="`experts`",
                remedy="Name them as in `experts={'math': 'models/math'}`.",
            )
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise EPMQInputError(
            f"`max_shard_bytes` should be a positive number of bytes, got {max_shard_bytes!r}.",
            code="EPMQ-O01",
            subject="`max_shard_bytes`",
            remedy=f"Leave it out for the default, {MAX_SHARD_BYTES}.",
        )
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).strip().partition("\n")[0]
        raise EPMQInputError(
            f"`device` should be one that torch can use, got {str(device)!r}: "
            f"{reason.rstrip('.')}.",
            code="EPMQ-O01",
            subject="`device`",
            remedy="Use 'cpu'.",
        ) from error
