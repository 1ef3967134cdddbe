"""Packing in half precision: what comes back, what it costs, and what it may not lose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epmq_gptq.method.half import (
    pack_delta,
    pack_gram,
    packed_bytes,
    unpack_delta,
    unpack_gram,
)


def inputs(d: int, n: int, seed: int = 0) -> torch.Tensor:
    """Rows as language models have them: a spectrum that falls, a mean, and massive channels."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, d)
    X = X @ torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    X += 0.2 * torch.randn(1, d, generator=generator, dtype=torch.float64)
    X[:, :2] *= 50
    X[:: max(1, n // 16), :2] += 300
    return X


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 1000), st.integers(-12, 12))
def test_a_gram_comes_back(d, n, seed, power):
    X = inputs(d, n, seed) * 10.0**power
    H = (X.T @ X).float()
    packed = pack_gram(H)
    back = unpack_gram(packed)
    assert torch.equal(back, back.T)
    torch.testing.assert_close(back.diagonal(), H.diagonal(), rtol=1e-6, atol=0)
    norms = H.diagonal().sqrt()
    assert bool(((back - H).abs() <= 2**-11 * norms * norms[:, None] * 1.01).all())
    # What was packed once is not changed by packing it again.
    assert torch.equal(unpack_gram(pack_gram(back)), back)


def test_dead_channels_stay_zero():
    X = inputs(12, 30)
    X[:, 5] = 0
    H = (X.T @ X).float()
    back = unpack_gram(pack_gram(H))
    assert not bool(back[5].any()) and not bool(back[:, 5].any())
    D = (torch.randn(4, 30, dtype=torch.float64) @ X).float()
    packed = pack_delta(D, pack_gram(H).norms)
    assert not bool(unpack_delta(packed, pack_gram(H).norms)[:, 5].any())
    assert bool(unpack_delta(packed, pack_gram(H).norms).isfinite().all())


@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 1.0])
def test_what_is_lost_costs_next_to_nothing(alpha):
    d, out = 192, 48
    X = inputs(d, 2000)
    H = X.T @ X
    D = 0.02 * torch.randn(out, d, dtype=torch.float64) @ H
    gram = pack_gram(H.float())
    H16 = unpack_gram(gram).double()
    D16 = unpack_delta(pack_delta(D.float(), gram.norms), gram.norms).double()
    eye = torch.eye(d, dtype=torch.float64)
    H_E = H + alpha * H.diagonal().mean() * eye
    best = torch.linalg.solve(H_E, D.T).T
    got = torch.linalg.solve(H16 + alpha * H16.diagonal().mean() * eye, D16.T).T
    error = got - best
    excess = float(((error @ H_E) * error).sum())
    gained = float((best * D).sum())  # what the target gains over the merge
    assert 0 < excess < 1e-4 * gained
    assert float(torch.linalg.eigvalsh(H16).min()) > -1e-3 * float(H.diagonal().mean())


def test_bytes_are_what_is_stored():
    X = inputs(24, 50)
    gram = pack_gram((X.T @ X).float())
    deltas = [pack_delta(torch.randn(out, 24), gram.norms) for out in (10, 6)]
    stored = sum(t.nbytes for packed in (gram, *deltas) for t in packed)
    assert stored == packed_bytes(24, [10, 6])
