"""Radix selection against torch.kthvalue."""

import pytest
import torch

from epmq_gptq.merging.selection import MagnitudeSelector

TINY = torch.finfo(torch.float32).smallest_normal


def select(pieces, rank):
    selector = MagnitudeSelector()
    for piece in pieces:
        selector.first(piece)
    selector.narrow(rank)
    for piece in pieces:
        selector.second(piece)
    return selector.result()


def _numbers(kind):
    g = torch.Generator().manual_seed(1)
    normal = torch.randn(1000, generator=g)
    return {
        "normal": normal,
        "all equal": torch.full((257,), -0.5),
        "zeros of both signs": torch.cat([torch.zeros(50), -torch.zeros(50)]),
        "mostly zero": normal * (torch.rand(1000, generator=g) < 0.1),
        "few magnitudes": torch.randint(-3, 4, (999,), generator=g) / 7,
        "denormals": torch.arange(-300, 300) * 1e-45,
        "denormals and normals": torch.cat([TINY * torch.rand(200, generator=g), normal]),
        "neighbours in one bucket": 1 + torch.arange(100) * 2.0**-23,
        "extremes": torch.tensor([torch.finfo(torch.float32).max, -TINY, 1e-45, 0.0, -1e38]),
        "bf16": normal.bfloat16().float(),
        "one": torch.tensor([-2.5]),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "all equal",
        "zeros of both signs",
        "mostly zero",
        "few magnitudes",
        "denormals",
        "denormals and normals",
        "neighbours in one bucket",
        "extremes",
        "bf16",
        "one",
    ],
)
def test_equals_kthvalue(kind):
    numbers = _numbers(kind)
    size = len(numbers)
    for rank in sorted({1, 2, size // 5, size // 2, size - size // 5, size - 1, size} - {0}):
        if rank > size:
            continue
        want = numbers.abs().kthvalue(rank).values
        got = select(numbers.split(37), rank)
        assert got.value == want.item()
        assert got.larger == int((numbers.abs() > want).sum())


def test_shape_order_and_pieces_do_not_matter():
    numbers = torch.randn(12, 30, generator=torch.Generator().manual_seed(2))
    shuffled = numbers.reshape(-1)[torch.randperm(360)]
    want = select([numbers], 288)
    assert select(list(shuffled.split(11)), 288) == want
    assert select([numbers.T], 288) == want
    assert select([numbers, numbers[:0]], 288) == want
