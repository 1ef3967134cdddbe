"""The one door to GPTQModel: what we hook, what private things we lean on, and the probe for both.

``install()`` wraps the host's loading, quantizing and saving, and adds ``push_to_hub``. Each hands
over to E-PMQ where there is an :class:`EPMQConfig` and is the host's own otherwise; nothing else of
the host is changed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptqmodel import GPTQModel
from gptqmodel.looper import gptq_checkpoint, stage_layer
from gptqmodel.looper.checkpoint import CheckpointExtension
from gptqmodel.looper.checkpoint_store import CheckpointStore
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.looper.module_looper import ModuleLooper
from gptqmodel.models import loader as host_loader
from gptqmodel.models.base import BaseQModel
from gptqmodel.quantization import gptq_cuda
from gptqmodel.quantization.gptq import GPTQ, SharedHessianFactorCache
from gptqmodel.utils.structure import LazyTurtle

from ..config import EPMQConfig
from ..errors import EPMQHostError, EPMQInputError
from ..experts.weights import refuse_quantized
from ..io.checkpoints import Checkpoint, check_folder, resolve_source
from ..io.hub import parse_hub_id
from ..io.yaml_files import exists
from ..publish.push import push_model
from .definitions import register
from .loop import quantize_with_experts
from .remote_code import distrusted
from .saving import save_whole

TESTED = ((7, 6), (7, 7))  # first and last minor version of GPTQModel

# What we call or override, with the parameters we count on; tests/host/test_host.py reads it.
LEANED_ON: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    what: (owner, name, tuple(parameters.split()))
    for what, owner, name, parameters in (
        (
            "dispatch",
            BaseQModel,
            "_quantize_with_calibration",
            "calibration calibration_concat_size calibration_sort batch_size backend "
            "calibration_concat_separator embed_quant_config checkpoint",
        ),
        ("entry", BaseQModel, "quantize", "calibration"),
        ("load", GPTQModel, "load", "model_id_or_path quantize_config"),
        ("load merged", GPTQModel, "from_pretrained", "model_id_or_path quantize_config"),
        ("save", BaseQModel, "save", "save_dir"),
        ("definition", BaseQModel, "simple_layer_modules", "model_config quantize_config"),
        ("names", LazyTurtle, "_checkpoint_tensor_candidates", "module_path rel_name"),
        (
            "source of names",
            LazyTurtle,
            "maybe_create",
            "model_local_path config module_tree hf_conversion_map_reversed target_model",
        ),
        ("renamings", BaseQModel, "resolve_hf_conversion_map_reversed", "target_model"),
        ("towers", BaseQModel, "_resolve_effective_module_tree", "model quantize_config detector"),
        (
            "replay",
            BaseQModel,
            "prepare_layer_replay_kwargs",
            "layer layer_input additional_inputs target_device",
        ),
        (
            "after a layer",
            BaseQModel,
            "update_layer_replay_kwargs_from_output",
            "layer layer_output layer_input_kwargs target_device",
        ),
        ("first inputs", BaseQModel, "run_input_capture", "example use_cache data_device"),
        ("tokenizer", host_loader, "load_hf_tokenizer", ""),
        ("remote code", host_loader, "prepare_remote_model_init_compat", "model_id_or_path config"),
        ("root tensors", host_loader, "load_checkpoint_in_model_then_tie_weights", "model"),
        ("loop", ModuleLooper, "__init__", "model processors extensions"),
        ("end of the loop", ModuleLooper, "wait_dangling_threads", ""),
        ("may go on", gptq_checkpoint, "validate_checkpoint_support", "model"),
        ("identity of options", gptq_checkpoint, "_checkpoint_identity_value", "value"),
        ("state", gptq_checkpoint.QuantizationCheckpointAdapter, "capture", ""),
        ("going on", gptq_checkpoint.QuantizationCheckpointAdapter, "restore", "state artifacts"),
        ("state of a processor", GPTQProcessor, "continuation_state_dict", ""),
        ("end of a layer", CheckpointExtension, "on_boundary", "boundary"),
        ("objects", CheckpointStore, "object_path", "digest"),
        ("contents", CheckpointStore, "get", "digest"),
        ("generations", CheckpointStore, "_current", ""),
        ("stop", ModuleLooper, "_request_loop_stop", "exc"),
        ("task", GPTQ, "quantize", "blocksize"),
        ("curvature", GPTQ, "finalize_hessian", "target_device"),
        ("factor", GPTQ, "hessian_inverse", "H"),
        ("nearest", GPTQ, "_fallback_quantize", "strategy blocksize target_device"),
        ("factor cache", SharedHessianFactorCache, "__init__", "generation cohort"),
        ("preprocess", GPTQProcessor, "preprocess", "module fallback"),
        ("hook", GPTQProcessor, "pre_process_fwd_hook", "name"),
        ("group", GPTQProcessor, "begin_shared_input_capture", "model subset_names"),
        ("solve", GPTQProcessor, "end_shared_input_capture", "subset_names"),
        ("no inputs", GPTQProcessor, "verify_calibration_dataset", "processor_index"),
        ("moving", stage_layer, "offload_to_disk", "model module disk_path"),
        ("events", ModuleLooper, "_subset_event_dispatch", "stage module_names"),
        ("telemetry", GPTQProcessor, "_close_device_smi_handles", ""),
        ("pack", GPTQProcessor, "submodule_finalize", "module model"),
        ("plan", GPTQProcessor, "_resolve_shared_input_plan", "model"),
        (
            "rounding kernel",
            gptq_cuda,
            "gptq_block_update",
            "work hinv scale zero column_group quantized errors losses maxq",
        ),
        ("rounding kernel there", gptq_cuda, "block_update_available", ""),
        ("batch", GPTQProcessor, "current_batch_index", ""),
    )
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
    with contextlib.closing(Checkpoint(source.path, what="the merged model")) as merged:
        refuse_quantized(merged, "the merged model")
    return source.path
