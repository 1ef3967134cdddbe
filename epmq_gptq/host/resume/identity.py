"""Which run a checkpoint is of: everything that a tensor of its result may depend on.

A mapping of plain words to plain data, so that an error can say what has changed. Models count by
their content: a folder may have moved, and another model may have been put in its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch
from gptqmodel.looper import gptq_checkpoint
from gptqmodel.quantization import gptq_cuda

from ...calibration.batches import CalibrationPlan
from ...config import EPMQConfig
from ...errors import EPMQInputError
from ...experts.experts import Expert, Experts
from ...io.checkpoints import Checkpoint, file_digest

SCHEMA = 1

# Kept beside the identity and not compared: a run that found no memory goes on in smaller batches.
BATCH_SIZES = "batch_sizes"

# Options that say where things are or what is told of a run; models are compared by content.
_NOT_COMPARED = (
    "experts",
    "base",
    "device",
    "meta",
    "telemetry",
    "offload_to_disk",
    "offload_to_disk_path",
    "_offload_temp_dir",
    "allow_duplicates",
    "require_pinned",
)


def run_identity(
    config: EPMQConfig,
    merged: Checkpoint,
    experts: Experts,
    plan: CalibrationPlan,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Any]:
    """What must be the same when a run goes on. Reads every byte of every model.

    Args:
        config: as it is settled.
        merged, experts: their weights.
        plan: the batches and the expert of each.
        dtype, device: of the forward passes.
    """
    from ... import __version__

    value = gptq_checkpoint._checkpoint_identity_value
    identity: dict[str, Any] = {
        "schema": SCHEMA,
        "order of the experts": experts.names,
        "merged model": merged.digest(),
        "configuration of the merged model": _config_digest(merged),
        "calibration rows": _rows_digest(plan),
        "experts of the batches": [[name, held] for name, held in _batches(plan)],
        "calibration tokens": plan.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "version of epmq_gptq": __version__,
        "version of gptqmodel": version("gptqmodel"),
    }
    if torch.device(device).type == "cuda":
        identity["compiled rounding"] = gptq_cuda.block_update_available()
    for name in experts.names:
        identity[f"expert `{name}`"] = _content(experts.expert(name))
    if experts.base is not None:
        identity["base"] = experts.base[0].digest()
    for field in fields(config):
        if field.name not in _NOT_COMPARED:
            identity[f"`{field.name}`"] = value(getattr(config, field.name))
    merged.close()
    experts.close()
    # As it will be read back.
    return json.loads(json.dumps(identity))


def _config_digest(merged: Checkpoint) -> str:
    file = merged.path / "config.json"
    return file_digest(file.resolve()) if file.is_file() else ""


def _content(expert: Expert) -> dict[str, Any]:
    content = {"weights": expert.store.digest()}
    if expert.adapter is not None:
        options = json.dumps(expert.adapter.options, sort_keys=True, default=str)
        content["adapter"] = expert.adapter.digest()
        content["adapter options"] = hashlib.sha256(options.encode()).hexdigest()
    return content


def _batches(plan: CalibrationPlan) -> list[tuple[str, bool]]:
    return list(zip(plan.experts, plan.held_out, strict=True))


def _rows_digest(plan: CalibrationPlan) -> str:
    total = hashlib.sha256()
    for batch in plan.batches:
        for name in sorted(batch):
            tensor = batch[name].contiguous()
            total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def refuse_another_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> None:
    """Refuse to go on with another run than the one that was begun.

    Args:
        before: what the checkpoint says.
        now: of this run.
        folder: name of the checkpoint.

    Raises:
        EPMQInputError: naming every field that differs.
    """
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if key not in before or key not in now or before[key] != now[key]
    ]
    if differing:
        raise another_run(
            [_change(key, before.get(key), now.get(key)) for key in differing], folder
        )


def another_run(changes: list[str], folder: str) -> EPMQInputError:
    """The error for a checkpoint of another run; ``changes`` in words."""
    return EPMQInputError(
        f"the checkpoint in `{folder}` is of another run: {'; '.join(changes)}.",
        code="EPMQ-F41",
        subject=f"checkpoint `{folder}`",
        remedy="Set that back to go on, or give a new folder to begin anew.",
    )


def _change(key: str, before: Any, now: Any) -> str:
    texts = [json.dumps(value) for value in (before, now)]
    if "`" in key and "expert" not in key and max(map(len, texts)) <= 60:
        return f"{key} was {texts[0]}, is {texts[1]}"
    if key.startswith("version") and before is not None:
        return f"{key} was {before}, is {now}"
    return f"{key} changed"
