"""What a run may not leave behind, whether it succeeds or fails."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gptqmodel.quantization import gptq_cuda

from epmq_gptq.host import door as host

# Seconds that threads which are about to end may take.
PATIENCE = 5
# The host's pools, which it makes at the first use and keeps for the process.
HOSTS_THREADS = ("DPWorker", "serial-worker", "logbar", "tqdm")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def state(model: Any = None) -> dict[str, Any]:
    """Everything that is global, and the hooks and patches of a model."""
    found = {
        "patched host": {
            name: getattr(owner, attribute)
            for name, (owner, attribute, _) in host.LEANED_ON.items()
            if owner is not gptq_cuda
        },
        "rounding kernel": (gptq_cuda.block_update_available, gptq_cuda.gptq_block_update),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warning filters": list(warnings.filters),
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "files there": sorted(os.listdir()),
        "temporary files": sorted(os.listdir(tempfile.gettempdir())),
        "random numbers": hash(tuple(torch.get_rng_state().tolist())),
    }
    if model is not None:
        found["hooks"] = {
            (name, kind): len(getattr(module, kind))
            for name, module in model.model.named_modules()
            for kind in HOOKS
            if getattr(module, kind, None)
        }
        found["callback"] = getattr(model, "subset_callback", None)
    return found


@contextlib.contextmanager
def nothing_left(
    model: Any, folder: Path, monkeypatch, but: tuple[str, ...] = ()
) -> Iterator[None]:
    """Within: a run of ``model``, which leaves nothing.

    Args:
        folder: an empty one, that is the system's folder of temporary files meanwhile.
        but: parts of :func:`state` that may change.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before, threads = state(model), set(threading.enumerate())
    yield
    gc.collect()
    deadline = time.monotonic() + PATIENCE
    for thread in set(threading.enumerate()) - threads:
        if not thread.name.startswith(HOSTS_THREADS):
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), thread
    after = state(model)
    changed = {
        name: (before[name], after[name])
        for name in before
        if name not in but and before[name] != after[name]
    }
    assert not changed, changed
