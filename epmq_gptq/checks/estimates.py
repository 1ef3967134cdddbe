"""Disk, memory and time of a run, from shapes and token counts; estimates, and said to be."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch

from ..experts.linears import Linear, resolve
from ..kernels.gram import ROWS
from ..method.choice import MOST, OUTPUTS
from ..method.chunks import is_out_of_memory
from ..method.half import packed_bytes
from .serving import Export

FP32 = 4
# Passes over a layer per batch: one for each of its inputs (q/k/v, o, gate/up, down: 2.04 of a
# whole pass for a Llama, because each stops where it has what it needs), and one that replays it.
PASSES = 3.0
# Per column of the rounding loop, whatever its length: measured on this project's 2-core test
# machine (0.17 to 0.37 ms with one thread) and, for GPUs, 14 launches a column without the host's
# fused kernel.
COLUMN_SECONDS = {"cpu": 3e-4, "cuda": 6e-5}
# Per layer: hooks, copies, reports. Measured: 1.3 s for the 14 layers of a model of width 64, of
# which everything else here explains a third.
MODULE_SECONDS = 0.03
# Codes that the CPU packs per second, measured: 0.4 to 0.6 s for 4096 x 4096.
PACKED_PER_SECOND = 3e7
# Everything that is not counted: Python, copies, attention, reading experts.
LOW, HIGH = 0.7, 3.0
# What projects the attention's output: of the same parent as q, k and v, and of another input.
_OF_ATTENTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o")
_LAYER = re.compile(r"\D*?\.\d+(?=\.)")
_LAST_INDEX = re.compile(r"\.\d+$")
# Seconds of a measurement of the device, of which there are two at most; sizes of its product.
_MEASURE_SECONDS, _MEASURE_SIZE = 0.15, {"cpu": 512, "cuda": 4096}


def disk(
    merged: Any, linears: Iterable[Linear], export: Export, dtype_bytes: int | None = None
) -> dict[str, int]:
    """Bytes of the checkpoint.

    Args:
        merged: headers of the merged model.
        linears: the layers that will be quantized.
        export: bits and groups.
        dtype_bytes: of what is not quantized; None for the bytes it has now.
    """
    quantized = scales = 0
    packed: set[str] = set()
    for linear in linears:
        settings = export.of(linear.name)
        if settings is None:
            continue
        stored = resolve(linear, merged)
        if stored is not None:
            packed.add(stored.tensor)
        d, out = linear.inputs, linear.outputs
        groups = 1 if settings.group_size <= 0 else -(-d // settings.group_size)
        quantized += d * out * settings.bits // 8
        # Scales fp16, zeros packed like codes, and the group of every input as int32.
        scales += groups * out * 2 + groups * out * settings.bits // 8 + d * 4
    rest = 0
    for name in merged:
        info = merged.info(name)
        if name not in packed:
            own = info.torch_dtype.itemsize if info.torch_dtype is not None else 4
            rest += info.numel * (own if dtype_bytes is None else dtype_bytes)
    return {
        "codes": quantized,
        "scales": scales,
        "unquantized": rest,
        "checkpoint": quantized + scales + rest,
    }


def recorded(linears: Iterable[Linear], parts: int) -> int:
    """Bytes of the statistics that ``save_statistics`` keeps.

    Args:
        parts: sets of rows that have sums of their own: experts, twice where some are held out.
    """
    inputs: dict[tuple[str, int], list[int]] = {}
    for linear in linears:
        parent, _, last = linear.name.rpartition(".")
        key = parent, last if last in _OF_ATTENTION else "", linear.inputs
        inputs.setdefault(key, []).append(linear.outputs)
    return parts * sum(packed_bytes(key[-1], outputs) for key, outputs in inputs.items())


def committed(disk: Mapping[str, int], memory: Mapping[str, int], runs_experts: bool) -> int:
    """Bytes that a run needs to be able to go on after a kill.

    The packed layers, once in the store and once where the host has moved them; what passes from
    layer to layer, of the experts' own passes as well, in the two generations that are kept and
    the one that is being written; the statistics so far.

    Args:
        disk: of :func:`disk`, with ``statistics`` where they are kept.
        memory: of :func:`memory`.
        runs_experts: whether the experts' own passes are kept as well.
    """
    passing = memory["activations"] // 2 * (2 if runs_experts else 1)
    return 2 * (disk["codes"] + disk["scales"]) + 3 * passing + disk.get("statistics", 0)


def groups(linears: Iterable[Linear]) -> dict[str, list[Linear]]:
    """Layers whose statistics are held at the same time → the layers.

    The parts of a module that read inputs of one width; all routed modules of a layer together.
    """
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        parent = linear.name.rpartition(".")[0]
        key = f"{_LAST_INDEX.sub('', parent)}:{linear.inputs}"
        found.setdefault(key, []).append(linear)
    return found


def memory(
    merged: Any,
    linears: Iterable[Linear],
    *,
    tokens: int,
    hidden: int,
    dtype_bytes: int,
    apart: int = 1,
    runs_experts: bool = False,
    chooses_alpha: bool = False,
) -> dict[str, int]:
    """Bytes at the peak, on the device and the host together.

    The model as it is loaded; two Grams, some rows and the factor of every shared input of the
    widest group, one D per layer of it, the merged and the target weight of its largest layer; the
    inputs of the current layer and its outputs for all tokens.

    Args:
        apart: experts whose sums are held apart from the others', each as much as all together.
        runs_experts: the experts' own inputs of all linear layers of one layer are held as well,
            one layer of one expert and what surrounds the layers, and two more Grams per input.
        chooses_alpha: the held-out rows have Grams and D of their own.
    """
    linears = list(linears)
    numel = sum(merged.info(name).numel for name in merged)
    statistics = 0
    for members in groups(linears).values():
        d = members[0].inputs
        inputs = len({li.name.rpartition(".")[0] for li in members})
        sums = (4 if runs_experts else 2) * inputs * d * d + sum(li.outputs * d for li in members)
        sums += (2 if runs_experts else 1) * inputs * min(ROWS, tokens) * d
        held = apart * (2 if chooses_alpha else 1) * sums + d * d
        held += 3 * max(li.outputs * d for li in members)
        statistics = max(statistics, held * FP32)
    model, activations = numel * dtype_bytes, 2 * tokens * hidden * dtype_bytes
    found = {"model": model, "statistics": statistics, "activations": activations}
    if runs_experts:
        found["experts"] = _of_expert_passes(numel, linears, tokens, hidden) * dtype_bytes
    return found | {"peak": sum(found.values())}


def _of_expert_passes(numel: int, linears: list[Linear], tokens: int, hidden: int) -> int:
    """Numbers that the experts' own passes hold; routed modules have none."""
    layers: dict[str, list[Linear]] = {}
    for linear in linears:
        layers.setdefault(layer_of(linear.name), []).append(linear)
    widest = 0
    for members in layers.values():
        inputs = {(li.name.rpartition(".")[0], li.inputs) for li in members if not _routed(li)}
        weights = sum(li.inputs * li.outputs for li in members if not _routed(li))
        # Beside them: the input of the attention's output (of the width of q's and with the same
        # parent), two streams, and what the layer before returned.
        widest = max(widest, tokens * (sum(d for _, d in inputs) + 4 * hidden) + weights)
    return widest + numel - sum(li.inputs * li.outputs for li in linears)


def layer_of(module: str) -> str:
    """``model.layers.3.mlp.up_proj`` → ``model.layers.3``; a module in no layer is its own."""
    found = _LAYER.match(module)
    return found[0] if found else module


def _routed(linear: Linear) -> bool:
    return ".experts." in linear.name


def flops(
    linears: Iterable[Linear],
    *,
    tokens: int,
    experts: int,
    shares: Mapping[int, float],
    runs_experts: bool = False,
    chooses_alpha: bool = False,
) -> dict[str, float]:
    """Floating-point operations of every phase; tokens of all experts together."""
    forward = gram = fold = solve = 0.0
    for members in groups(linears).values():
        d = members[0].inputs
        outputs = sum(li.outputs for li in members)
        inputs = len({li.name.rpartition(".")[0] for li in members})
        reached = tokens * (shares.get(d, 1.0) if inputs > 1 else 1.0)
        forward += PASSES * 2 * reached * d * outputs
        # Of the triangle; the cross moments of the experts' passes are whole.
        gram += 9 / 8 * reached * d * d * inputs
        fold += 2 * experts * outputs * d * d
        # A factor for the rounding, one for the target, and the target.
        solve += (1 + 1 / 3) * d**3 * inputs + 2 * outputs * d * d
        if chooses_alpha:
            looked_at = sum(min(li.outputs, OUTPUTS) for li in members)
            solve += MOST * (d**3 / 3 * inputs + 4 * looked_at * d * d)
        if runs_experts:
            forward += 2 * reached * d * outputs
            gram += 2 * reached * d * d * inputs
    return {"forward": forward, "gram": gram, "fold": fold, "solve": solve}


def measure_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a square matrix product on this device, measured in 0.15 s, once a process."""
    size = _MEASURE_SIZE.get(torch.device(device).type, _MEASURE_SIZE["cpu"])
    while True:
        try:
            return _rate(size, device, dtype)
        except Exception as error:
            # No reason to refuse a run; of a smaller product it only says less.
            if not is_out_of_memory(error) or size < 2:
                raise
        size //= 2


# A device is as fast for the next run of the process.
@lru_cache
def _rate(size: int, device: str, dtype: torch.dtype) -> float:
    A = torch.randn(size, size, device=device).to(dtype)
    best, deadline = float("inf"), time.perf_counter() + _MEASURE_SECONDS
    while True:
        start = time.perf_counter()
        A @ A
        if A.is_cuda:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= deadline:
            return 2 * size**3 / best


def duration(
    linears: Iterable[Linear],
    *,
    tokens: int,
    experts: int,
    shares: Mapping[int, float],
    rate: float,
    forward_rate: float | None = None,
    device: str = "cpu",
    **targets: bool,
) -> dict[str, Any]:
    """Seconds, as a range: what was counted at the measured rate, times 0.7 to 3.

    Args:
        linears: the layers that will be quantized.
        tokens: calibration tokens of all experts.
        experts: how many.
        shares: width → share of the tokens that reach a layer (:func:`coverage.widths`).
        rate: FLOP/s in fp32, see :func:`measure_rate`.
        forward_rate: FLOP/s in the dtype of the forward passes; None for the same.
        device: for the cost per column of the rounding loop.
        targets: ``runs_experts`` and ``chooses_alpha``, as in :func:`memory`.
    """
    linears = list(linears)
    work = flops(linears, tokens=tokens, experts=experts, shares=shares, **targets)
    forward_rate = forward_rate or rate
    phases = {
        name: count / (forward_rate if name == "forward" else rate) for name, count in work.items()
    }
    column = COLUMN_SECONDS.get(torch.device(device).type, COLUMN_SECONDS["cpu"])
    phases["rounding"] = column * sum(li.inputs for li in linears)
    phases["overhead"] = MODULE_SECONDS * len(linears)
    phases["packing"] = sum(li.inputs * li.outputs for li in linears) / PACKED_PER_SECOND
    total = sum(phases.values())
    return {
        "phases": phases,
        "seconds": [LOW * total, HIGH * total],
        "flops_per_second": {"forward": forward_rate, "statistics": rate},
        "tokens": tokens,
    }
