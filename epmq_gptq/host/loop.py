"""One run inside the host's layer loop: everything is checked, then the loop does the rest."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gptqmodel import DEVICE_THREAD_POOL
from gptqmodel.looper import stage_layer
from gptqmodel.looper.module_looper import ModuleLooper
from gptqmodel.models.base import BaseQModel
from gptqmodel.quantization import gptq_cuda

from ..calibration.batches import CalibrationPlan
from ..checks import Preflight
from ..checks.check import run_preflight
from ..checks.estimates import committed
from ..config import EPMQConfig
from ..errors import EPMQError, EPMQWarning
from ..experts.experts import Experts
from ..experts.linears import Linear
from ..io.checkpoints import Checkpoint, hashing_meanwhile
from ..io.declared import conflict
from ..io.output import check_space, ran_full
from ..io.phases import PHASES, Phases, peak_memory
from ..kernels.rounding import triton_rounds
from ..method.chunks import given_up
from ..method.weighting import Weighting
from ..run_report import QuantizationReport
from .failures import disk_error
from .model_linears import check_architecture, check_head, quantizable_linears
from .preparing import device_of, planned, recording_of, settle_alpha, trajectories_of
from .processor import EPMQProcessor
from .provenance import provenance, requantized
from .recorded.bundle import Bundle
from .recorded.recording import about_run
from .recorded.requantize import check_linears
from .recorded.source import RecordedSource
from .resume.adapter import EPMQCheckpointAdapter, total_spent
from .resume.digests import remembered
from .resume.identity import run_identity
from .resume.session import Resumable, check_checkpoint, check_root, resumable, stopping_when_told

# Runs share the host's workers and the kernels that it looks up, so they take turns in a process.
_ONE_RUN = threading.RLock()


def _in_turn(function):
    @functools.wraps(function)
    def alone(*arguments, **options):
        # The host draws random numbers, to no effect; whoever calls us may want them.
        with _ONE_RUN, torch.random.fork_rng(devices=[]):
            return function(*arguments, **options)

    return alone


@_in_turn
def quantize_with_experts(
    model: BaseQModel,
    *,
    calibration,
    batch_size: int,
    calibration_sort: str | None = None,
    calibration_concat_size: int | None = None,
    backend=None,
    checkpoint=None,
    **host_options,
) -> dict[str, Any]:
    """Run E-PMQ (Algorithm 1) in the host's layer loop.

    Everything that can be refused is refused before the first forward pass.

    Args:
        checkpoint: the host's ``CheckpointConfig``: where finished layers are committed, and gone
            on from; see :class:`~epmq_gptq.host.resume.Resumable`.

    Returns:
        The host's log per processor, and under ``"epmq"`` a :class:`QuantizationReport`, which is
        also left in ``model.epmq_report``.
    """
    start = time.perf_counter()
    config: EPMQConfig = model.quantize_config
    _check_host_options(host_options)
    check_architecture(model)
    check_head(model)
    _start_workers()
    if isinstance(calibration, Bundle):
        _check_host_options({"checkpoint": checkpoint})
        return _quantize_recorded(model, calibration, backend, start)
    with contextlib.ExitStack() as stack:
        run = _open(model, checkpoint, start, stack)
        plan, checked, batch_size = _plan(
            run, calibration, batch_size, calibration_sort, calibration_concat_size
        )
        processor = _processor(run, plan, batch_size, stack)
        recording = processor.recording
        run.phases.add("prepare", time.perf_counter() - start)
        try:
            with hashing_meanwhile([run.merged, *run.experts.checkpoints]):
                log = _loop(model, processor, backend, run.device, run.extension)
        except BaseException:
            if recording is not None:
                recording.recorder.close()
            raise
        report = _report(processor, run.linears, checked)
        _finish(model, report, run.phases, start, run.device, run.extension)
        report.provenance = provenance(run.merged, config, run.experts, report)
    config.meta["epmq"] = report.provenance
    model.epmq_report = report
    if recording is not None:
        recording.recorder.finish(about_run(report, config.settled_options(), run.dtype))
        model.epmq_statistics = recording.recorder
    return {**log, "epmq": report}


@dataclass(frozen=True)
class _Run:
    """What is open for as long as a run lasts; ``start`` is when it was called."""

    model: BaseQModel
    config: EPMQConfig
    merged: Checkpoint
    experts: Experts
    linears: list[Linear]
    device: str
    dtype: torch.dtype
    phases: Phases
    start: float
    extension: Resumable | None


def _open(model: BaseQModel, checkpoint: Any, start: float, stack: contextlib.ExitStack) -> _Run:
    config: EPMQConfig = model.quantize_config
    # Opened now, though only its digest is wanted at the end: what cannot be described is
    # refused before the work, not after it.
    merged = Checkpoint(str(model.model_local_path), what="the merged model")
    experts = Experts(config.experts, base=config.base, require_pinned=config.require_pinned)
    stack.callback(experts.close)
    model.epmq_sources = {"merged model": merged.path} | experts.folders
    device = device_of(config)
    phases, extension = Phases(device), None
    if checkpoint is not None:
        extension = stack.enter_context(_resumable(model, checkpoint, phases))
    linears = list(quantizable_linears(model))
    settle_alpha(config, merged)
    dtype = next(model.model.parameters()).dtype
    return _Run(model, config, merged, experts, linears, device, dtype, phases, start, extension)


def _plan(
    run: _Run, calibration: Any, batch_size: int, sort: str | None, concat_size: int | None
) -> tuple[CalibrationPlan, Preflight, int]:
    """The batches, what the preflight says of them, and the size of a batch."""
    extension, first_size = run.extension, batch_size
    if extension is not None:
        first_size, batch_size = extension.batch_sizes(batch_size)
    plan = planned(run.model, run.experts, calibration, sort, first_size, concat_size)
    checked = run_preflight(
        run.config,
        run.merged,
        run.experts,
        run.linears,
        plan.tokens,
        device=run.device,
        dtype_bytes=run.dtype.itemsize,
    )
    if extension is None:
        return plan, checked, batch_size
    _check_room(extension, checked, run.config)
    with remembered(extension.store.root, [run.merged, *run.experts.checkpoints]):
        identity = run_identity(run.config, run.merged, run.experts, plan, run.dtype, run.device)
    extension.check(identity)
    extension.adapter = EPMQCheckpointAdapter(
        identity, (first_size, batch_size), lambda: _spent(run.model, run.phases, run.start)
    )
    return plan.split(batch_size), checked, batch_size


def _processor(
    run: _Run, plan: CalibrationPlan, batch_size: int, stack: contextlib.ExitStack
) -> EPMQProcessor:
    config = run.config
    trajectories = trajectories_of(
        run.model, run.merged, run.experts, plan, run.linears, run.phases
    )
    if trajectories is not None:
        stack.callback(trajectories.close)
    weighting = Weighting(config.weighting, plan.tokens, config.expert_weights, config.data_free)
    own = trajectories is not None
    return EPMQProcessor(
        plan=plan,
        experts=run.experts,
        trajectories=trajectories,
        recording=recording_of(config, run.experts, weighting, run.linears, own),
        weighting=weighting,
        is_routed=run.model.is_moe_module,
        phases=run.phases,
        tokenizer=run.model.tokenizer,
        qcfg=config,
        batch_size=batch_size,
    )


def _resumable(
    model: BaseQModel, checkpoint, phases: Phases
) -> contextlib.AbstractContextManager[Resumable]:
    config = model.quantize_config
    checkpoint = check_checkpoint(checkpoint, config, model.model.config.model_type)
    check_root(Path(checkpoint.path), model.epmq_sources)
    return resumable(checkpoint, config, phases)


def _check_room(extension: Resumable, checked: Preflight, config: EPMQConfig) -> None:
    """Whether the disk has room for what will be committed, beside what is committed already."""
    objects = extension.store.root / "objects"
    needed = committed(checked.estimates["disk"], checked.estimates["memory"], config.runs_experts)
    held = sum(file.stat().st_size for file in objects.iterdir())
    check_space(objects, max(0, needed - held), option="checkpoint")


def _spent(model: BaseQModel, phases: Phases, start: float) -> dict[str, Any]:
    """Seconds of this attempt, and of its phases."""
    seconds = time.perf_counter() - start
    timer = getattr(model, "quant_region_timer", None)
    return {
        "seconds": seconds,
        "phases": phases.result(seconds, timer.snapshot() if timer else None),
    }


def _quantize_recorded(model: BaseQModel, bundle: Bundle, backend, start: float) -> dict[str, Any]:
    """The same from statistics that an earlier run kept: nothing is run, only solved and rounded.

    Args:
        bundle: in the place of calibration rows; its experts of the configuration's names count.
        start: when the call began.
    """
    config: EPMQConfig = model.quantize_config
    model.epmq_sources = {
        "merged model": Path(str(model.model_local_path)),
        "statistics": bundle.folder,
    }
    linears = list(quantizable_linears(model))
    check_linears(bundle, linears)
    names = list(config.experts)
    tokens = {name: bundle.tokens[name] for name in names}
    device = device_of(config)
    phases = Phases(device)
    weighting = Weighting(config.weighting, tokens, config.expert_weights)
    processor = EPMQProcessor(
        plan=CalibrationPlan(),
        experts=None,
        source=RecordedSource(bundle, names, weighting, watches=bool(config.regret_rows)),
        weighting=weighting,
        is_routed=model.is_moe_module,
        phases=phases,
        tokenizer=model.tokenizer,
        qcfg=config,
        batch_size=1,
    )
    phases.add("prepare", time.perf_counter() - start)
    others = model.subset_callback

    def solve_first(*, stage: str, module_names: list[str], **event) -> None:
        # The host's last word on its main thread before the workers round.
        if stage == "quant_start":
            processor.solve_subset(module_names)
        if others is not None:
            others(stage=stage, module_names=module_names, **event)

    model.subset_callback = solve_first
    try:
        log = _loop(model, processor, backend, device)
    finally:
        model.subset_callback = others
    report = _report(processor, linears, None)
    report.rows = {name: bundle.index["rows"].get(name, 0) for name in names}
    report.tokens = tokens
    _finish(model, report, phases, start, device)
    report.provenance = requantized(bundle.index, config, report)
    config.meta["epmq"] = report.provenance
    model.epmq_report = report
    return {**log, "epmq": report}


def _finish(
    model: BaseQModel,
    report: QuantizationReport,
    phases: Phases,
    start: float,
    device: str,
    extension: Resumable | None = None,
) -> None:
    """Where the time and the memory of a run went."""
    spent = _spent(model, phases, start)
    if extension is not None:
        spent = total_spent(extension.adapter.before, spent)
        report.attempts = extension.adapter.attempts
    report.seconds, report.phases = spent["seconds"], spent["phases"]
    report.phase_memory = {name: phases.memory[name] for name in PHASES if phases.memory.get(name)}
    report.peak_memory = peak_memory(device)


def _report(
    processor: EPMQProcessor, linears: list[Linear], checked: Preflight | None
) -> QuantizationReport:
    order = {linear.name: index for index, linear in enumerate(linears)}
    plan, trajectories = processor.plan, processor.trajectories
    return QuantizationReport(
        modules=sorted(processor.reports, key=lambda m: order.get(m.module, len(order))),
        rows=plan.rows,
        tokens=plan.tokens,
        calibration=plan.calibration,
        preflight={} if checked is None else checked.to_dict(),
        shared_groups=processor.shared_groups,
        shared_layers=processor.shared_layers,
        left={} if trajectories is None else {n: str(e) for n, e in trajectories.left.items()},
    )


# Options of the host's quantize() that cannot go with experts, and what to do instead.
_REFUSED_OPTIONS = {
    "embed_quant_config": "Quantize embeddings in a later run.",
    "checkpoint": "Requantizing takes no forward pass: start it again.",
}


def _check_host_options(host_options: dict[str, Any]) -> None:
    for option, value in host_options.items():
        if value is not None:
            remedy = _REFUSED_OPTIONS.get(option, "Leave it out.")
            raise conflict(option, "cannot be used with EPMQConfig", remedy)


_BUILD_FOLDER = "GPTQMODEL_TORCH_EXTENSIONS_DIR"


def _find_build_folder() -> None:
    """Where the host shall compile its kernels, if it may not below HOME."""
    place = Path(os.path.expanduser("~")) / ".cache"
    while not place.exists():
        place = place.parent
    if os.environ.get(_BUILD_FOLDER) or os.access(place, os.W_OK | os.X_OK):
        return
    # A name that nobody can guess: what lies there is loaded as code.
    folder = tempfile.mkdtemp(prefix="gptqmodel-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_BUILD_FOLDER] = folder
    warnings.warn(
        EPMQWarning(
            f"`{place}` cannot be written, so GPTQModel's kernels are compiled in a temporary "
            f"folder, in every process again; {_BUILD_FOLDER} names another one.",
            code="EPMQ-F45",
        ),
        stacklevel=2,
    )


@contextlib.contextmanager
def _fast_rounding(device: str) -> Iterator[None]:
    """Within: where the host's CUDA kernel cannot be compiled, Triton rounds in its place."""
    if torch.device(device).type != "cuda":
        yield
        return
    _find_build_folder()
    if gptq_cuda.block_update_available():
        yield
        return
    if not triton_rounds(torch.device(device)):
        warnings.warn(
            EPMQWarning(
                "neither nvcc nor a Triton that rounds exactly was found, so columns are rounded "
                "by a loop of torch operations: the same result, in more time.",
                code="EPMQ-H01",
            ),
            stacklevel=2,
        )
        yield
        return
    from ..kernels.rounding_triton import triton_block_update

    before = gptq_cuda.block_update_available, gptq_cuda.gptq_block_update
    gptq_cuda.block_update_available = lambda: True
    gptq_cuda.gptq_block_update = triton_block_update
    try:
        yield
    finally:
        gptq_cuda.block_update_available, gptq_cuda.gptq_block_update = before


@contextlib.contextmanager
def _moving_with(processor: EPMQProcessor, network: torch.nn.Module) -> Iterator[None]:
    """Within: a finished layer for which the disk has no room stops the run, not the process."""
    move = stage_layer.offload_to_disk

    def moved(model, module, **options):
        if model is not network:  # of a run of the host's own beside this one
            move(model=model, module=module, **options)
            return
        processor.offload(move, model, module, **options)

    stage_layer.offload_to_disk = moved
    try:
        yield
    finally:
        stage_layer.offload_to_disk = move


def _start_workers() -> None:
    """Start the host's workers before anything is computed: here it is told of a lack of threads.

    They would start with the first layer, and again with whoever waits for them after a failure.
    """
    with given_up("starting the workers", "cpu"):
        DEVICE_THREAD_POOL.wait()


def _loop(
    model: BaseQModel,
    processor: EPMQProcessor,
    backend,
    device: str,
    extension: Resumable | None = None,
) -> dict[str, Any]:
    config = model.quantize_config
    options: dict[str, Any] = {}
    stopping = contextlib.nullcontext()
    if extension is not None:
        options["extensions"] = (extension,)
        stopping = stopping_when_told(extension)
    if "disk_write_expected" in inspect.signature(ModuleLooper.__init__).parameters:  # 7.7
        options["disk_write_expected"] = bool(config.offload_to_disk)
    told = given_up("a forward pass of the merged model", device)
    looper = None
    try:
        with given_up("preparing the layer loop", "cpu"):
            looper = ModuleLooper(model, processors=[processor], **options)
        processor.stop_loop = looper._request_loop_stop
        moving = _moving_with(processor, model.model)
        with _fast_rounding(device), moving, told, stopping:
            log = looper.loop(backend=backend, fallback=config.fallback)
        if processor.failure is not None:
            raise processor.failure
    except BaseException as error:
        # Half of the layers may be packed: this object is neither the merge nor a result.
        model.quantized = False
        first = processor.failure
        if first is not None and error is not first and isinstance(error, Exception):
            raise first from error  # a lost device fails everywhere; where it began is told
        if isinstance(error, Exception) and not isinstance(error, EPMQError) and ran_full(error):
            raise disk_error(error, "before the first layer") from error
        raise
    finally:
        # However it ended: nobody may be left that writes into the folder of this attempt, and a
        # worker within C++ would have the whole process abort at its end.
        DEVICE_THREAD_POOL.wait()
        if looper is not None:
            looper.wait_dangling_threads()
        processor.leave()
    return log
