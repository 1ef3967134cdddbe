"""What is kept beside the sums: Σ‖Δ x‖² from D = Δ H, whole or of low rank."""

from __future__ import annotations

import pytest
import torch

from epmq_gptq.host.recorded.recording import _lack
from epmq_gptq.method.deltas import WeightDelta


@pytest.mark.parametrize("parts", ["dense", "low rank", "both", "none"])
def test_what_the_merge_lacks_follows_from_d(parts):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 12, generator=generator)
    dense = torch.randn(7, 12, generator=generator) if parts in ("dense", "both") else None
    low_rank = None
    if parts in ("low rank", "both"):
        low_rank = (
            torch.randn(7, 3, generator=generator),
            torch.randn(3, 12, generator=generator),
        )
    whole = torch.zeros(7, 12)
    if dense is not None:
        whole = whole + dense
    if low_rank is not None:
        whole = whole + low_rank[0] @ low_rank[1]
    D = None if parts == "none" else whole @ X.T @ X
    expected = float((X @ whole.T).double().square().sum())
    assert _lack(WeightDelta(dense, low_rank), D) == pytest.approx(expected, rel=1e-5)
