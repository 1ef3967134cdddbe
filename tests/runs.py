"""Whole runs in this process, and what is compared of two of them."""

from __future__ import annotations

import tiny
from gptqmodel.quantization.gar import (
    compose_final_perm,
    compute_global_perm,
    compute_local_perms,
)
from judge import codes


def run(merged, config, rows, out, **options):
    """Load, quantize, save; returns what ``quantize`` returned."""
    model = tiny.load(merged, config)
    result = model.quantize(rows, **({"batch_size": 4} | options))
    model.save(str(out))
    return result


def differing(one, other) -> float:
    """The share of codes that differ between two checkpoints."""
    first, second = codes(one), codes(other)
    assert first.keys() == second.keys()
    count = sum(int((first[m] != second[m]).sum()) for m in first)
    return count / sum(code.numel() for code in first.values())


def gar_order(H, group_size=32):
    """The order in which GPTQModel's default (act_group_aware) rounds the columns."""
    diagonal = H.diagonal().float()
    local, values = compute_local_perms(diagonal, group_size, return_values=True)
    return compose_final_perm(
        local, compute_global_perm(diagonal, group_size, precomputed_values=values), group_size
    )
