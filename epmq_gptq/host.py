"""The one door to GPTQModel: what we hook, what private things we lean on, and the probe for both.

``install()`` wraps the host's loading, quantizing and saving, and adds ``push_to_hub``. Each hands
over to E-PMQ where there is an :class:`EPMQConfig` and is the host's own otherwise; nothing else of
the host is changed.
"""

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel import DEVICE_THREAD_POOL, GPTQModel
from gptqmodel.looper import gptq_checkpoint
from gptqmodel.looper.checkpoint import CheckpointExtension
from gptqmodel.looper.checkpoint_store import CheckpointStore
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.looper.module_looper import ModuleLooper
from gptqmodel.models import loader as host_loader
from gptqmodel.models.base import BaseQModel
from gptqmodel.quantization import gptq_cuda
from gptqmodel.quantization.gptq import GPTQ, SharedHessianFactorCache
from gptqmodel.utils.structure import LazyTurtle

from .checkpoints import Checkpoint, check_folder, hashing_meanwhile, resolve_source
from .config import EPMQConfig
from .errors import EPMQHostError, EPMQInputError, EPMQWarning
from .experts import Experts
from .hub import parse_hub_id
from .kernels.rounding import triton_rounds
from .linears import Linear
from .model_linears import check_architecture, check_head, quantizable_linears
from .models import register
from .options import exists
from .out_of_memory import given_up
from .output import check_space
from .phases import PHASES, Phases, peak_memory
from .preflight import Preflight
from .preflight.estimates import committed
from .preflight.runs import run_preflight
from .preparing import planned, recording_of, settle_alpha, trajectories_of
from .processor import EPMQProcessor
from .provenance import provenance, requantized
from .publishing import push_model
from .recorded.bundle import Bundle
from .recorded.processor import RecordedProcessor
from .recorded.recording import about_run
from .recorded.requantize import check_linears
from .remote_code import distrusted
from .resume.adapter import EPMQCheckpointAdapter, total_spent
from .resume.digests import remembered
from .resume.identity import run_identity
from .resume.session import (
    Resumable,
    check_checkpoint,
    check_root,
    resumable,
    stopping_when_told,
)
from .run_report import QuantizationReport
from .saving import save_whole
from .weighting import Weighting

# Runs share the host's workers and the kernels that it looks up, so they take turns in a process.
_ONE_RUN = threading.RLock()

TESTED = ((7, 6), (7, 7))  # first and last minor version of GPTQModel

# What we call or override, with the parameters we count on. tests/test_host.py reads this table.
LEANED_ON: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "dispatch": (
        BaseQModel,
        "_quantize_with_calibration",
        (
            "calibration",
            "calibration_concat_size",
            "calibration_sort",
            "batch_size",
            "backend",
            "calibration_concat_separator",
            "embed_quant_config",
            "checkpoint",
        ),
    ),
    "entry": (BaseQModel, "quantize", ("calibration",)),
    "load": (GPTQModel, "load", ("model_id_or_path", "quantize_config")),
    "load merged": (GPTQModel, "from_pretrained", ("model_id_or_path", "quantize_config")),
    "save": (BaseQModel, "save", ("save_dir",)),
    "definition": (BaseQModel, "simple_layer_modules", ("model_config", "quantize_config")),
    "names": (LazyTurtle, "_checkpoint_tensor_candidates", ("module_path", "rel_name")),
    "source of names": (
        LazyTurtle,
        "maybe_create",
        (
            "model_local_path",
            "config",
            "module_tree",
            "hf_conversion_map_reversed",
            "target_model",
        ),
    ),
    "renamings": (BaseQModel, "resolve_hf_conversion_map_reversed", ("target_model",)),
    "towers": (
        BaseQModel,
        "_resolve_effective_module_tree",
        ("model", "quantize_config", "detector"),
    ),
    "replay": (
        BaseQModel,
        "prepare_layer_replay_kwargs",
        ("layer", "layer_input", "additional_inputs", "target_device"),
    ),
    "after a layer": (
        BaseQModel,
        "update_layer_replay_kwargs_from_output",
        ("layer", "layer_output", "layer_input_kwargs", "target_device"),
    ),
    "first inputs": (BaseQModel, "run_input_capture", ("example", "use_cache", "data_device")),
    "tokenizer": (host_loader, "load_hf_tokenizer", ()),
    "remote code": (
        host_loader,
        "prepare_remote_model_init_compat",
        ("model_id_or_path", "config"),
    ),
    "root tensors": (host_loader, "load_checkpoint_in_model_then_tie_weights", ("model",)),
    "loop": (ModuleLooper, "__init__", ("model", "processors", "extensions")),
    "end of the loop": (ModuleLooper, "wait_dangling_threads", ()),
    "may go on": (gptq_checkpoint, "validate_checkpoint_support", ("model",)),
    "identity of options": (gptq_checkpoint, "_checkpoint_identity_value", ("value",)),
    "state": (gptq_checkpoint.QuantizationCheckpointAdapter, "capture", ()),
    "going on": (
        gptq_checkpoint.QuantizationCheckpointAdapter,
        "restore",
        ("state", "artifacts"),
    ),
    "state of a processor": (GPTQProcessor, "continuation_state_dict", ()),
    "end of a layer": (CheckpointExtension, "on_boundary", ("boundary",)),
    "objects": (CheckpointStore, "object_path", ("digest",)),
    "contents": (CheckpointStore, "get", ("digest",)),
    "generations": (CheckpointStore, "_current", ()),
    "stop": (ModuleLooper, "_request_loop_stop", ("exc",)),
    "task": (GPTQ, "quantize", ("blocksize",)),
    "factor": (GPTQ, "hessian_inverse", ("H",)),
    "nearest": (GPTQ, "_fallback_quantize", ("strategy", "blocksize", "target_device")),
    "factor cache": (SharedHessianFactorCache, "__init__", ("generation", "cohort")),
    "preprocess": (GPTQProcessor, "preprocess", ("module", "fallback")),
    "hook": (GPTQProcessor, "pre_process_fwd_hook", ("name",)),
    "group": (GPTQProcessor, "begin_shared_input_capture", ("model", "subset_names")),
    "solve": (GPTQProcessor, "end_shared_input_capture", ("subset_names",)),
    "no inputs": (GPTQProcessor, "verify_calibration_dataset", ("processor_index",)),
    "events": (ModuleLooper, "_subset_event_dispatch", ("stage", "module_names")),
    "telemetry": (GPTQProcessor, "_close_device_smi_handles", ()),
    "pack": (GPTQProcessor, "submodule_finalize", ("module", "model")),
    "plan": (GPTQProcessor, "_resolve_shared_input_plan", ("model",)),
    "rounding kernel": (
        gptq_cuda,
        "gptq_block_update",
        (
            "work",
            "hinv",
            "scale",
            "zero",
            "column_group",
            "quantized",
            "errors",
            "losses",
            "maxq",
        ),
    ),
    "rounding kernel there": (gptq_cuda, "block_update_available", ()),
    "batch": (GPTQProcessor, "current_batch_index", ()),
}


def probe() -> None:
    """Refuse a GPTQModel that E-PMQ was not tested with.

    Raises:
        EPMQHostError: another version, or a method that moved or lost a parameter.
    """
    installed = version("gptqmodel")
    minor = tuple(int(part) for part in installed.split(".")[:2])
    supported = f"epmq_gptq supports GPTQModel {TESTED[0][0]}.{TESTED[0][1]}–" + (
        f"{TESTED[1][0]}.{TESTED[1][1]}"
    )
    if not TESTED[0] <= minor <= TESTED[1]:
        raise EPMQHostError(
            f"{supported}, got {installed}.",
            code="EPMQ-F49",
            subject="GPTQModel",
            remedy="Install one of these versions.",
        )
    for owner, name, parameters in LEANED_ON.values():
        method = getattr(owner, name, None)
        have = inspect.signature(method).parameters if method is not None else {}
        missing = [parameter for parameter in parameters if parameter not in have]
        if method is None or missing:
            what = f"`{owner.__name__}.{name}`"
            raise EPMQHostError(
                f"{supported}; the installed {installed} has "
                + (f"{what} without {missing}." if method is not None else f"no {what}."),
                code="EPMQ-F49",
                subject="GPTQModel",
                remedy="Install a version as it was released.",
            )


def install() -> None:
    """Make ``EPMQConfig`` known to the host; safe to call again."""
    if getattr(BaseQModel._quantize_with_calibration, "_epmq", False):
        return
    probe()
    register()
    if (os.cpu_count() or 1) <= 2:
        # There the host's own default, one worker, makes its thread pool refuse to start.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    host_quantize, host_save = BaseQModel._quantize_with_calibration, BaseQModel.save
    host_validate = gptq_checkpoint.validate_checkpoint_support

    host_entry = BaseQModel.quantize

    @functools.wraps(host_entry)
    def enter(self, *arguments, **options):
        if isinstance(self.quantize_config, EPMQConfig):
            _refuse_again(self)  # the host would say so with an OSError
        return host_entry(self, *arguments, **options)

    @functools.wraps(host_quantize)
    def quantize(self, **arguments):
        if isinstance(self.quantize_config, EPMQConfig):
            # The host draws random numbers, to no effect; whoever calls us may want them.
            with _ONE_RUN, torch.random.fork_rng(devices=[]):
                return quantize_with_experts(self, **arguments)
        return host_quantize(self, **arguments)

    @functools.wraps(host_save)
    def save(self, save_dir, *arguments, overwrite: bool = False, **options):
        if isinstance(self.quantize_config, EPMQConfig):
            write = functools.partial(host_save, self)
            return save_whole(self, write, save_dir, *arguments, overwrite=overwrite, **options)
        return host_save(self, save_dir, *arguments, **options)

    @functools.wraps(host_validate)
    def validate_checkpoint_support(model, **options):
        # What the host refuses (other families, `dynamic`, a head) its own adapter cannot restore.
        if not isinstance(model.quantize_config, EPMQConfig):
            host_validate(model, **options)

    for name in ("load", "from_pretrained"):
        setattr(GPTQModel, name, classmethod(_checked_loader(getattr(GPTQModel, name).__func__)))
    quantize._epmq = True
    BaseQModel._quantize_with_calibration, BaseQModel.save = quantize, save
    gptq_checkpoint.validate_checkpoint_support = validate_checkpoint_support
    BaseQModel.quantize = enter
    BaseQModel.push_to_hub = _push_to_hub(BaseQModel.__dict__.get("push_to_hub"))


def _refuse_again(model: BaseQModel) -> None:
    if model.quantized:
        raise EPMQInputError(
            "`quantize` was called on a model that is quantized already.",
            code="EPMQ-F52",
            subject="`quantize`",
            remedy="Load the merged model again.",
        )


def _push_to_hub(host_push) -> property:
    """``push_to_hub`` of models with an ``EPMQConfig``; of others it stays what it is.

    A property, because the host has none of its own (7.6): what it does not know it looks up in
    the model that it wraps, and an AttributeError from here leads there as before.
    """

    def push_to_hub(self):
        if isinstance(self.__dict__.get("quantize_config"), EPMQConfig):
            return functools.partial(push_model, self)
        if host_push is None:
            raise AttributeError(f"`{type(self).__name__}` has no attribute `push_to_hub`")
        return host_push.__get__(self, type(self))

    return property(push_to_hub)


def _checked_loader(host_load):
    @functools.wraps(host_load)
    def load(cls, model_id_or_path, quantize_config=None, *arguments, **options):
        if isinstance(quantize_config, EPMQConfig):
            model_id_or_path = str(
                merged_folder(
                    model_id_or_path,
                    revision=options.pop("revision", None),
                    require_pinned=quantize_config.require_pinned,
                )
            )
            with distrusted(options.get("trust_remote_code") is not True):
                return host_load(cls, model_id_or_path, quantize_config, *arguments, **options)
        return host_load(cls, model_id_or_path, quantize_config, *arguments, **options)

    return load


def merged_folder(
    spec: str | Path, *, revision: str | None = None, require_pinned: bool = False
) -> Path:
    """The local folder of a merged model, if the host may open it.

    The host follows links and paths out of a checkpoint, converts pickle files on its own, and
    loads a quantized model as if that had been asked for.

    Raises:
        EPMQInputError: it cannot be had, or one of these would happen.
    """
    if revision is not None:
        asked = parse_hub_id(str(spec))
        if asked is None or asked.revision is not None or exists(Path(spec)):
            raise EPMQInputError(
                "the merged model: `revision` goes with a hub id without one of its own, got "
                f"{revision!r} with `{Path(spec).name}`.",
                code="EPMQ-O03",
                subject="`revision`",
                remedy="Leave it out.",
            )
        spec = asked.at(revision)
    source = resolve_source(spec, what="the merged model", require_pinned=require_pinned)
    check_folder(source.path, what="the merged model")
    merged = Checkpoint(source.path, what="the merged model")
    if "quantization_config" in merged.config() or (source.path / "quantize_config.json").is_file():
        raise EPMQInputError(
            f"the merged model: `{source.name}` is already quantized.",
            code="EPMQ-F07",
            subject="the merged model",
            remedy="Give the full-precision merge.",
        )
    merged.close()
    return source.path


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
            on from; see :class:`~epmq_gptq.resume.Resumable`.

    Returns:
        The host's log per processor, and under ``"epmq"`` a :class:`QuantizationReport`, which is
        also left in ``model.epmq_report``.
    """
    start = time.perf_counter()
    config: EPMQConfig = model.quantize_config
    _check_host_options(host_options)
    check_architecture(model)
    check_head(model)
    if isinstance(calibration, Bundle):
        _check_host_options({"checkpoint": checkpoint})
        return _quantize_recorded(model, calibration, backend, start)
    with contextlib.ExitStack() as stack:
        # Opened now, though only its digest is wanted at the end: what cannot be described is
        # refused before the work, not after it.
        merged = Checkpoint(str(model.model_local_path), what="the merged model")
        experts = Experts(config.experts, base=config.base, require_pinned=config.require_pinned)
        stack.callback(experts.close)
        model.epmq_sources = {"merged model": merged.path} | experts.folders
        device = getattr(config.device, "value", None) or str(config.device or "cpu")
        phases = Phases(device)
        extension = None
        if checkpoint is not None:
            extension = stack.enter_context(_resumable(model, checkpoint, phases))
        linears = list(quantizable_linears(model))
        settle_alpha(config, merged)
        plan = planned(
            model, experts, calibration, calibration_sort, batch_size, calibration_concat_size
        )
        dtype = next(model.model.parameters()).dtype
        checked = run_preflight(
            config,
            merged,
            experts,
            linears,
            plan.tokens,
            device=device,
            dtype_bytes=dtype.itemsize,
        )
        if extension is not None:
            root = extension.store.root
            needed = committed(
                checked.estimates["disk"], checked.estimates["memory"], config.runs_experts
            )
            held = sum(file.stat().st_size for file in (root / "objects").iterdir())
            check_space(root / "objects", max(0, needed - held), option="checkpoint")
            with remembered(extension.store.root, [merged, *experts.checkpoints]):
                identity = run_identity(config, merged, experts, plan, dtype, device)
            extension.check(identity)
            extension.adapter = EPMQCheckpointAdapter(
                identity, lambda: _spent(model, phases, start)
            )
        trajectories = trajectories_of(model, merged, experts, plan, linears, phases)
        if trajectories is not None:
            stack.callback(trajectories.close)
        weighting = Weighting(
            config.weighting, plan.tokens, config.expert_weights, config.data_free
        )
        recording = recording_of(config, experts, weighting, linears, trajectories is not None)
        processor = EPMQProcessor(
            plan=plan,
            experts=experts,
            trajectories=trajectories,
            recording=recording,
            weighting=weighting,
            is_routed=model.is_moe_module,
            phases=phases,
            tokenizer=model.tokenizer,
            qcfg=config,
            batch_size=batch_size,
        )
        phases.add("prepare", time.perf_counter() - start)
        try:
            with hashing_meanwhile([merged, *experts.checkpoints]):
                log = _loop(model, processor, backend, device, extension)
        except BaseException:
            if recording is not None:
                recording.recorder.close()
            raise
        report = _report(processor, linears, checked)
        _finish(model, report, phases, start, device, extension)
        report.provenance = provenance(merged, config, experts, report)
    config.meta["epmq"] = report.provenance
    model.epmq_report = report
    if recording is not None:
        recording.recorder.finish(about_run(report, config.settled_options(), dtype))
        model.epmq_statistics = recording.recorder
    return {**log, "epmq": report}


def _resumable(
    model: BaseQModel, checkpoint, phases: Phases
) -> contextlib.AbstractContextManager[Resumable]:
    config = model.quantize_config
    checkpoint = check_checkpoint(checkpoint, config, model.model.config.model_type)
    check_root(Path(checkpoint.path), model.epmq_sources)
    return resumable(checkpoint, config, phases)


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
    device = getattr(config.device, "value", None) or str(config.device or "cpu")
    phases = Phases(device)
    processor = RecordedProcessor(
        bundle=bundle,
        names=names,
        experts=None,
        weighting=Weighting(config.weighting, tokens, config.expert_weights),
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
    "calibration_concat_separator": "leave it out",
    "adapter_calibration_dataset": "leave it out",
    "embed_quant_config": "quantize embeddings in a later run",
    "checkpoint": "requantizing takes no forward pass: start it again",
}


def _check_host_options(host_options: dict[str, Any]) -> None:
    for option, value in host_options.items():
        if value is not None:
            remedy = _REFUSED_OPTIONS.get(option, "leave it out")
            raise EPMQInputError(
                f"`{option}` cannot be used with EPMQConfig.",
                code="EPMQ-O03",
                subject=f"`{option}`",
                remedy=f"{remedy[0].upper()}{remedy[1:]}.",
            )


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
    from .kernels.rounding_triton import triton_block_update

    before = gptq_cuda.block_update_available, gptq_cuda.gptq_block_update
    gptq_cuda.block_update_available = lambda: True
    gptq_cuda.gptq_block_update = triton_block_update
    try:
        yield
    finally:
        gptq_cuda.block_update_available, gptq_cuda.gptq_block_update = before


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
    looper = ModuleLooper(model, processors=[processor], **options)
    processor.stop_loop = looper._request_loop_stop
    try:
        told = given_up("a forward pass of the merged model", device)
        with _fast_rounding(device), told, stopping:
            log = looper.loop(backend=backend, fallback=config.fallback)
        if processor.failure is not None:
            raise processor.failure
    except BaseException as error:
        # Half of the layers may be packed: this object is neither the merge nor a result.
        model.quantized = False
        first = processor.failure
        if first is not None and error is not first and isinstance(error, Exception):
            raise first from error  # a lost device fails everywhere; where it began is told
        raise
    finally:
        # However it ended: nobody may be left that writes into the folder of this attempt, and a
        # worker within C++ would have the whole process abort at its end.
        DEVICE_THREAD_POOL.wait()
        looper.wait_dangling_threads()
        processor.leave()
    return log
