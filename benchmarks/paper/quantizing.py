"""One quantization of a merged model, by our method or by one of GPTQModel's own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Quantization:
    """What is asked for.

    Attributes:
        method: "RTN", "GPTQ", "AWQ", "E-PMQ" (the paper's) or "E-PMQ-best".
        alpha: of the paper's E-PMQ.
        dtype: that the model is loaded in.
    """

    method: str
    bits: int
    group_size: int
    batch_size: int
    device: str
    alpha: float = 0.01
    dtype: torch.dtype = torch.float32


def quantize(
    wanted: Quantization,
    merged: Path,
    experts: Mapping[str, Path],
    rows: Mapping[str, Sequence[Any]],
    out: Path,
) -> float:
    """Quantize ``merged``, save it to ``out``, and return the seconds of the quantization alone.

    All methods see the same rows; the baselines see them pooled, in the order of the tasks. All
    options that are not of :class:`Quantization` are the host's defaults.
    """
    # Ours first: it settles how many workers the host may start and adds our model definitions.
    from epmq_gptq import EPMQConfig  # isort: skip
    from gptqmodel import BACKEND, AWQConfig, GPTQConfig, GPTQModel, RTNConfig

    common = {"bits": wanted.bits, "group_size": wanted.group_size, "offload_to_disk": False}
    pooled: Any = [row for task in experts for row in rows.get(task, ())]
    data, options, dtype = pooled, {}, wanted.dtype
    if wanted.method == "RTN":
        config, data = RTNConfig(**common), None  # it reads none, and refuses to be given some
    elif wanted.method == "GPTQ":
        config = GPTQConfig(**common)
    elif wanted.method == "AWQ":
        # 7.6 knows AWQ in half precision only, and on a CPU in bfloat16 with its torch kernel.
        config, dtype = AWQConfig(**common), torch.bfloat16
        options = {"backend": BACKEND.AWQ_TORCH}
    else:
        folders = {task: str(folder) for task, folder in experts.items()}
        best = wanted.method == "E-PMQ-best"
        own = {"profile": "best"} if best else {"profile": "paper", "alpha": wanted.alpha}
        config = EPMQConfig(**common, experts=folders, **own)
        data = {task: list(rows[task]) for task in experts}
    model = GPTQModel.load(str(merged), config, dtype=dtype, device=wanted.device)
    start = time.perf_counter()
    model.quantize(data, batch_size=wanted.batch_size, **options)
    seconds = time.perf_counter() - start
    model.save(str(out))
    return seconds
