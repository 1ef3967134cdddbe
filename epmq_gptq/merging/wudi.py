"""WUDI: merged task vectors that interfere least with each expert's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .method import Block, MergeMethod, Stack, add_up, add_update, is_number, option


@dataclass(frozen=True)
class Wudi(MergeMethod):
    """WUDI, data-free, per 2-D tensor (Cheng et al. 2025), as FusionBench computes it.

    For each 2-D tensor, embeddings included, tau starts at sum_i tau_i and takes ``iterations``
    Adam steps on

        L(tau) = sum_i ||(tau - tau_i) tau_i^T||_F^2 / ||tau_i||_F^2

    Other tensors take the mean of tau_i. theta = theta_0 + tau, unscaled. An expert whose tau_i is
    zero says nothing of L and is left out of it (0/0 in the source suite).

    The gradient is 2 sum_i (tau - tau_i) C_i with C_i = tau_i^T tau_i / ||tau_i||_F^2 (in, in).
    With tau* the start it is 2 (tau - tau*) C + G, where C = sum_i C_i and
    G = 2 sum_i (tau* - tau_i) C_i are computed once: a step costs out · in^2 whatever K. Written
    around tau* rather than as tau C - D, so that nothing large cancels: K = 1 has a gradient of
    exactly zero, and Adam, which looks at signs more than at sizes, is not fed rounding noise.

    Rows of tau do not depend on one another given C, so they are optimized block by block: beside
    the K + 1 stored tensors there are G (out, in), two (in, in) and a few blocks. One pass.
    """

    name: ClassVar[str] = "wudi"
    title: ClassVar[str] = (
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task "
        "Vectors"
    )
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2503.08099"

    iterations: int = option(
        400,
        doc="Adam steps for each 2-D tensor",
        rule="a whole number of at least 0",
        check=lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    )
    lr: float = option(
        1e-5,
        doc="Adam's step size",
        rule="a positive number",
        check=lambda value: is_number(value) and value > 0,
    )

    def merge(self, stack: Stack, state: Any = None) -> Tensor:
        """theta_0 + tau, see the class."""
        if len(stack.shape) != 2:
            return stack.map(lambda block: add_update(block.base, _mean(block.task_vectors())))
        curvature, offsets = _gradient_terms(stack)

        def formula(block: Block) -> Tensor:
            start = add_up(block.task_vectors())
            return add_update(block.base, self._descend(start, curvature, next(offsets)))

        return stack.map(formula)

    def _descend(self, start: Tensor, curvature: Tensor, offset: Tensor) -> Tensor:
        """Adam from ``start`` (rows, in); gradient (tau - start) curvature + offset."""
        tau = start.clone()
        adam = torch.optim.Adam([tau], lr=self.lr)
        for _ in range(self.iterations):
            tau.grad = torch.addmm(offset, tau - start, curvature)
            adam.step()
        return tau


def _mean(taus: list[Tensor]) -> Tensor:
    return add_up(taus) / len(taus)


def _gradient_terms(stack: Stack) -> tuple[Tensor, Iterator[Tensor]]:
    """2C (in, in) and the rows of G, block by block; see :class:`Wudi`.

    One expert's C_i at a time, as K of them would be 3 GB for in = 14336 and K = 4; the price, to
    cast the blocks K times, is small beside the products.
    """
    width = stack.shape[1]
    curvature = torch.zeros(width, width, device=stack.device)
    offsets: list[Tensor] = []
    for i in range(len(stack.experts)):
        gram = torch.zeros_like(curvature)
        for block in stack.blocks():
            tau = block.experts[i] - block.base
            gram.addmm_(tau.T, tau)
        squared_norm = gram.diagonal().sum()
        if squared_norm == 0:
            gram.zero_()
        else:
            gram *= 2 / squared_norm
        curvature += gram
        for j, block in enumerate(stack.blocks()):
            taus = block.task_vectors()
            term = (add_up(taus) - taus[i]) @ gram
            if i == 0:
                offsets.append(term)
            else:
                offsets[j] += term
    return curvature, iter(offsets)
