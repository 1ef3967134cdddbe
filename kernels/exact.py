"""Which of several kernels is used on a GPU: the first that is exact there, in a fixed order.

What a device and its libraries can do does not follow from a version number, so every kernel is
compared with its reference on the device itself, once, and one that is missing or not exact is
never used. The order is fixed and no race is run, so that two runs on one machine give the same
bits.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch

from ..errors import EPMQWarning

# What a sum of products may differ from float64, relative to the norms of its factors. Tensor cores
# truncate what they add up: of 2048 rows that costs 6e-6 (measured on an H200), as much as torch's
# own fp32 product loses there at times, and a hundredth of what the smallest anchor adds.
TOLERANCE = 1e-5


def has_triton() -> bool:
    """Whether Triton is installed; it is imported by those who use it alone."""
    return importlib.util.find_spec("triton") is not None


def first_exact(
    ways: Sequence[Callable[..., None]],
    reference: Callable[..., None],
    agrees: Callable[[Callable[..., None]], bool],
    *,
    what: str,
) -> Callable[..., None]:
    """The first way that agrees with the reference, else the reference, with a warning.

    Args:
        ways: the fastest first.
        reference: needs no check.
        agrees: whether one is right; raising counts as no.
        what: for the warning.
    """
    for way in ways:
        try:
            if agrees(way):
                return way
        except Exception:  # whatever is missing here: another way will do
            continue
    warnings.warn(
        EPMQWarning(
            f"no fast kernel for {what} is exact on this device, so torch's fp32 is used: the same "
            "result, in more time.",
            code="EPMQ-H01",
        ),
        stacklevel=2,
    )
    return reference


def random(*shape: int, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    """Numbers to check a kernel with; the generators of the user are left alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)
