"""The updates ``H += Xᵀ X`` and ``C += Yᵀ X``: what every faster version must agree with."""

from __future__ import annotations

import torch


def torch_gram_update(H: torch.Tensor, X: torch.Tensor) -> None:
    """Add the Gram of one batch of inputs, in place: ``H += Xᵀ X``.

    The products and the sum are fp32 whatever the inputs are: half-precision rows are widened
    first, which changes no bit of them.

    Args:
        H: ``(d, d)`` fp32, symmetric.
        X: ``(n, d)`` floating; one row per token, on the device of ``H``.
    """
    X = X.to(torch.float32)
    H.addmm_(X.t(), X)


def torch_cross_update(C: torch.Tensor, Y: torch.Tensor, X: torch.Tensor) -> None:
    """Add the products of two views of one batch, in place: ``C += Yᵀ X``.

    Args:
        C: ``(k, d)`` fp32.
        Y: ``(n, k)`` floating; one row per token.
        X: ``(n, d)`` floating; the same tokens.
    """
    C.addmm_(Y.to(torch.float32).t(), X.to(torch.float32))
