"""What was merged and how, for the provenance of whatever is made from the merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import __version__
from ..io.checkpoints import Checkpoint, Source
from .inputs import Inputs
from .method import MergeMethod

RECORD_NAME = "epmq_merge.json"
RECORD_FORMAT = 1
# Two computations bear the name TIES: FusionBench ranks the entries of the whole model, mergekit
# those of each tensor. The merged weights differ.
_TRIM = {"ties": "whole model", "ties_per_tensor": "per tensor"}


def build_record(
    method: MergeMethod,
    inputs: Inputs,
    tensors: int,
    device: torch.device,
    tick: Callable[[str], None],
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What was merged and how, in words that may be published: no path of this machine.

    Args:
        calibration: rows and tokens of every expert, and which layers they decided upon.
    """

    def describe(checkpoint: Checkpoint, source: Source) -> dict[str, Any]:
        digest = checkpoint.digest()
        tick(f"digest of {checkpoint.what}")
        return {"name": source.name, "revision": source.revision, "digest": digest}

    trim = _TRIM.get(method.name)
    return {
        "format": RECORD_FORMAT,
        "method": method.name,
        **({"trim": trim} if trim else {}),
        "parameters": method.parameters(),
        "title": method.title,
        "reference": method.reference_url,
        "base": describe(*inputs.base) if inputs.base else None,
        "experts": {name: describe(*pair) for name, pair in inputs.experts.items()},
        **({"calibration": dict(calibration)} if calibration else {}),
        "tensors": tensors,
        "device": device.type,
        "epmq_gptq": __version__,
    }
