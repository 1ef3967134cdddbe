"""Additive statistics of one shared input: what eq. 12 needs to know of the calibration data.

For linear layers ``m`` that read the same input, with ``X_i`` the inputs that expert ``i``'s rows
produce in the partially quantized merged model:

    H   = Σ_i H_i,  H_i = X_i X_iᵀ                        (eq. 14)
    D_m = Σ_i (W_i,m − W_m) H_i                           (the delta form of eq. 15)

With weights per expert β_i both sums run over β_i H_i. All are plain sums over tokens and experts:
statistics(A) + statistics(B) == statistics(A ∪ B), whatever the order. ``D`` and not
``R = Σ W_i H_i + λ W_m``, because it is 10–300x closer to float64 and exactly zero where an expert
equals the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from .errors import EPMQInputError, EPMQNumericalError
from .kernels.gram import torch_gram_update

# Rows of a low-rank difference that are built at once.
_ROWS = 1024


class WeightDelta(NamedTuple):
    """A difference of two weights, ``dense + B A``; all fp32.

    Attributes:
        dense: ``(out, d)``, or None where that part is zero.
        low_rank: ``(B: (out, r), A: (r, d))``, or None. Never multiplied out.
    """

    dense: torch.Tensor | None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None

    def size(self) -> float:
        """Σ|dense| + Σ|B| Σ|A|: zero where nothing differs, not finite where something is not."""
        # The norm, for `abs()` would be one more matrix of this size.
        total = 0.0 if self.dense is None else float(torch.linalg.vector_norm(self.dense, 1))
        if self.low_rank is not None:
            B, A = self.low_rank
            total += float(B.abs().sum() * A.abs().sum())
        return total

    def add_product_(self, D: torch.Tensor, H: torch.Tensor) -> None:
        """``D += (dense + B A) H`` with ``D: (out, d)``, ``H: (d, d)``, as ``B (A H)``."""
        if self.dense is not None:
            D.addmm_(self.dense, H)
        if self.low_rank is not None:
            B, A = self.low_rank
            D.addmm_(B, A @ H)


# (member, expert) -> W_expert − W_m of that member, or None where it is exactly zero.
ReadDelta = Callable[[str, str], WeightDelta | None]
# (expert, H_i) -> β_i. See `EPMQConfig.weighting`.
Weight = Callable[[str, torch.Tensor], float]


def data_free_gram(task_vector: WeightDelta, energy: float) -> torch.Tensor:
    """A stand-in for ``H_i`` where there is no calibration: τᵀτ, scaled to a trace.

    What fine-tuning changed most is what its inputs excited most: a gradient step adds multiples of
    the inputs to the rows of τ = W_i − W_0. WUDI (arXiv 2503.08099) merges with the same proxy.

    Args:
        task_vector: τ, ``(out, d)``; at least one of its parts.
        energy: tr(H_i) that it shall have.

    Returns:
        ``(d, d)`` fp32; zero where τ is zero.
    """
    dense, low_rank = task_vector
    if dense is None:
        B, A = low_rank
        C = A.mT @ ((B.mT @ B) @ A)
    else:
        C = torch.zeros(dense.shape[1], dense.shape[1], device=dense.device)
        for start in range(0, dense.shape[0], _ROWS):
            rows = dense[start : start + _ROWS]
            if low_rank is not None:
                rows = rows + low_rank[0][start : start + _ROWS] @ low_rank[1]
            torch_gram_update(C, rows)
    trace = float(C.diagonal().sum(dtype=torch.float64))
    return C.mul_(energy / trace) if trace > 0 else C.zero_()


class GroupStatistics:
    """``H`` and every ``D_m`` of linear layers that share one input, on one device.

    Holds one ``(d, d)`` Gram of the current expert, one ``(d, d)`` sum, and one ``(out, d)`` buffer
    per member, all fp32, however many experts there are. Feeding the experts one after the other
    costs one fold each; any other order gives the same sums with more folds.

    Args:
        columns: d, the width of the shared input.
        members: full names of the linear layers, mapped to their number of outputs.
        delta: reads ``W_i − W_m`` of one member for one expert.
        device: where the sums live.
        weight: β_i, asked once per fold; None for 1 (raw sums, as in the paper).
        fold_once: β_i depends on the whole of ``H_i``, so a second fold of an expert is an error.
    """

    def __init__(
        self,
        columns: int,
        members: Mapping[str, int],
        delta: ReadDelta,
        device: torch.device | str = "cpu",
        *,
        weight: Weight | None = None,
        fold_once: bool = False,
    ):
        self.columns = columns
        self.members = dict(members)
        self.device = torch.device(device)
        self.tokens: dict[str, int] = {}
        self.folds = 0
        self._delta = delta
        self._weight = weight
        self._fold_once = fold_once
        self._folded: set[str] = set()
        self._expert: str | None = None
        self._current: torch.Tensor | None = None
        self._pending = 0
        self._total: torch.Tensor | None = None
        self._deltas: dict[str, torch.Tensor] = {}

    @property
    def total_tokens(self) -> int:
        """Tokens seen so far, over all experts."""
        return sum(self.tokens.values())

    def add(self, expert: str, X: torch.Tensor) -> None:
        """Count the rows ``X: (n, d)`` as inputs of ``expert``."""
        if X.shape[0] == 0:
            return
        if expert != self._expert:
            self.fold()
            self._expert = expert
        if self._current is None:
            self._current = self._zeros(self.columns, self.columns)
        torch_gram_update(self._current, X)
        self._pending += X.shape[0]
        self.tokens[expert] = self.tokens.get(expert, 0) + X.shape[0]

    def fold(self) -> None:
        """Move the current expert's Gram into the sums; nothing happens where there is none.

        Raises:
            EPMQNumericalError: the Gram is not finite, so some activation (or its square) is not.
        """
        if self._pending == 0:
            return
        expert, H_i = self._expert, self._current
        assert expert is not None and H_i is not None
        # Entry jj is a sum of squares: any non-finite activation of channel j shows there, and
        # d entries are read instead of d².
        finite = torch.isfinite(H_i.diagonal())
        if not bool(finite.all()):
            channel = int((~finite).nonzero()[0])
            module = next(iter(self.members))
            raise EPMQNumericalError(
                f"expert `{expert}`: the activations at the input of `{module}` are not finite "
                f"({int((~finite).sum())} of {self.columns} channels, the first is {channel}).",
                module=module,
                expert=expert,
                code="EPMQ-F27",
                subject=f"expert `{expert}`, inputs of `{module}`",
                remedy="Check that expert's calibration rows and the merged weights of earlier "
                "layers; load in bfloat16 or float32 if float16 overflowed.",
            )
        self._count_fold(expert)
        if self._weight is not None:
            H_i.mul_(self._weight(expert, H_i))
        for member, rows in self.members.items():
            delta = self._delta(member, expert)
            if delta is None:
                continue
            D = self._deltas.get(member)
            if D is None:
                D = self._deltas[member] = self._zeros(rows, self.columns)
            delta.add_product_(D, H_i)
        if self._total is None:
            # The first expert's Gram becomes the sum: one buffer less until a second one comes.
            self._total, self._current = H_i, None
        else:
            self._total.add_(H_i)
            H_i.zero_()
        self._expert, self._pending = None, 0
        self.folds += 1

    def merge_(self, other: GroupStatistics) -> None:
        """Add what ``other`` counted (same members, any device), emptying it."""
        assert other.columns == self.columns and other.members == self.members
        self.fold()
        other.fold()
        for expert in other._folded:
            self._count_fold(expert)
        if other._total is not None:
            self._total = self._sum(self._total, other._total)
        for member, D in other._deltas.items():
            self._deltas[member] = self._sum(self._deltas.get(member), D)
        for expert, tokens in other.tokens.items():
            self.tokens[expert] = self.tokens.get(expert, 0) + tokens
        self.folds += other.folds
        other._total, other._deltas, other.tokens, other._folded = None, {}, {}, set()

    def _count_fold(self, expert: str) -> None:
        if self._fold_once and expert in self._folded:
            raise EPMQInputError(
                f'`weighting="trace"` needs the whole Gram of expert `{expert}` at once, got it in '
                "parts (its batches ran on several devices, or between another expert's).",
                code="EPMQ-O03",
                subject="`weighting`",
                remedy='Use one device, or `weighting="token"`.',
            )
        self._folded.add(expert)

    def gram(self) -> torch.Tensor:
        """``H: (d, d)`` fp32, zero where nothing was counted. The statistics give it away."""
        self.fold()
        self._current = None
        total, self._total = self._total, None
        return self._zeros(self.columns, self.columns) if total is None else total

    def take_delta(self, member: str) -> torch.Tensor | None:
        """``D_m: (out, d)`` fp32, or None where it is exactly zero. Given away, as the Gram is."""
        self.fold()
        return self._deltas.pop(member, None)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _sum(self, mine: torch.Tensor | None, theirs: torch.Tensor) -> torch.Tensor:
        theirs = theirs.to(self.device)
        return theirs if mine is None else mine.add_(theirs)
