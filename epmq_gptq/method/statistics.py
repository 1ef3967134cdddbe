"""Additive statistics of one shared input: what the objective needs to know of the calibration.

For linear layers ``m`` that read the same input, with ``x`` the inputs that expert ``i``'s rows
produce in the partially quantized merged model, ``z`` the inputs that the same rows produce in
expert ``i`` itself, and ``T_i`` what layer ``m`` shall give:

    T_i = W_i (η z + (1 − η) x) + b_i  [+ ρ (r_i − r) where m writes to the residual stream]
    H   = Σ_i Σ x xᵀ                                                             (eq. 14)
    D_m = Σ_i Σ (T_i − b_m − W_m x) xᵀ
        = Σ_i [(W_i − W_m) H_i + η W_i C_i + (b_i − b_m) s_iᵀ + ρ E_i]
    H_i = Σ x xᵀ,  C_i = Σ (z − x) xᵀ,  s_i = Σ x,  E_i = Σ (r_i − r) xᵀ

η = ρ = 0 without biases is the paper: ``D_m = Σ (W_i − W_m) H_i`` (the delta form of eq. 15).

With weights per expert β_i all sums run over β_i times their terms. All are plain sums over tokens
and experts: statistics(A) + statistics(B) == statistics(A ∪ B), whatever the order. ``D`` and not
``R = Σ W_i H_i + λ W_m``, because it is 10–300x closer to float64 and exactly zero where an expert
equals the merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..errors import EPMQInputError, EPMQNumericalError
from ..io.phases import Phases
from ..kernels.gram import ROWS, gram_update, mirror_
from ..kernels.product import cross_update, in_parts, product_update, torch_product_update
from .deltas import WeightDelta
from .expert_error import RowSample
from .nonfinite import Origin
from .staging import Rows, Stage

# (expert, diag(H_i): (d,)) -> β_i. See `EPMQConfig.weighting`.
Weight = Callable[[str, torch.Tensor], float]


class ExpertReader:
    """What is asked of the experts while rows are counted; here they differ in nothing."""

    def delta(self, member: str, expert: str) -> WeightDelta | None:
        """``W_i − W_m`` of one layer, or None where it is exactly zero."""
        return None

    def bias(self, member: str, expert: str) -> torch.Tensor | None:
        """``b_i − b_m: (out,)`` fp32 of one layer, or None where it is zero."""
        return None

    def blame(self, expert: str, *, own_pass: bool) -> tuple[Origin, str] | None:
        """The first token of an expert that is not finite, or else its largest, and that in words.

        Args:
            own_pass: look among the inputs of the expert's own pass.
        """
        return None


class TargetForm(NamedTuple):
    """Which T_i the sums are for.

    Attributes:
        eta: share of the expert's own inputs z in the target; 0 needs no z.
        rho: share of the gap between the residual streams; 0 needs no r.
        biases: count b_i − b_m, and keep what a bias is refitted from.
    """

    eta: float = 0.0
    rho: float = 0.0
    biases: bool = False


PAPER = TargetForm()


class Moments(NamedTuple):
    """What is left of the calibration of one linear layer; everything fp32 and weighted by β_i.

    Attributes:
        H: ``(d, d)`` Σ x xᵀ, shared by the layers of one input.
        D: ``(out, d)`` Σ (T − b_m − W_m x) xᵀ, or None where it is exactly zero.
        inputs: ``(d,)`` Σ x, or None where no bias is wanted.
        outputs: ``(out,)`` Σ (T − b_m − W_m x), or None likewise.
        count: Σ β_i n_i.
    """

    H: torch.Tensor
    D: torch.Tensor | None
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    count: float = 0.0

    def to(self, device: torch.device) -> Moments:
        """The same there."""
        return Moments(*(one.to(device) if torch.is_tensor(one) else one for one in self))


def combined(parts: Sequence[Moments], weights: Sequence[float], H: torch.Tensor) -> Moments:
    """The moments of one layer over several sets of rows; D of the first set is used up.

    Args:
        parts: of each set.
        weights: what each counts.
        H: their Grams, added up in the same way.
    """
    D = inputs = outputs = None
    for part, weight in zip(parts, weights, strict=True):
        if part.inputs is not None:
            # Never in place: layers of one input hold one and the same sum of it.
            inputs = weight * part.inputs + (0 if inputs is None else inputs)
            outputs = weight * part.outputs + (0 if outputs is None else outputs)
    for part, weight in zip(parts, weights, strict=True):
        if part.D is not None and D is None:
            D = part.D if weight == 1 else part.D * weight
        elif part.D is not None:
            D.add_(part.D, alpha=weight)
    count = sum(weight * part.count for part, weight in zip(parts, weights, strict=True))
    return Moments(H, D, inputs, outputs, count)


class _Sums:
    """Sums over tokens of one shared input, of one expert or of all; what is unused is None.

    Attributes:
        H, C: ``(d, d)`` Σ x xᵀ (of which the upper triangle means anything) and Σ (z − x) xᵀ.
        s, t: ``(d,)`` Σ x and Σ (z − x).
        count: tokens.
    """

    def __init__(self) -> None:
        self.H: torch.Tensor | None = None
        self.C: torch.Tensor | None = None
        self.s: torch.Tensor | None = None
        self.t: torch.Tensor | None = None
        self.count = 0.0

    _TENSORS = ("H", "C", "s", "t")

    def add(self, rows: Rows, *, vectors: bool) -> None:
        """Count rows.

        Args:
            vectors: with ``s`` and ``t``.
        """
        X, ahead = rows.X, rows.ahead
        if self.H is None:
            self.H = X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float32)
        if ahead is not None and self.C is None:
            self.C = torch.zeros_like(self.H)
        s = X.sum(0, dtype=torch.float32) if vectors else None
        t = ahead.sum(0) if vectors and ahead is not None else None
        gram_update(self.H, X)
        if ahead is not None:
            cross_update(self.C, ahead, X)
        self.s, self.t = _sum(self.s, s, X.device), _sum(self.t, t, X.device)
        self.count += len(X)

    def scale_(self, factor: float) -> None:
        """Multiply everything."""
        for name in self._TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                tensor.mul_(factor)
        self.count *= factor

    def take_(self, other: _Sums, device: torch.device) -> None:
        """Add ``other``; what is new here becomes ours without a copy."""
        for name in self._TENSORS:
            setattr(self, name, _sum(getattr(self, name), getattr(other, name), device))
        self.count += other.count


def _sum(
    mine: torch.Tensor | None, theirs: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    if theirs is None:
        return mine
    theirs = theirs.to(device)
    return theirs if mine is None else mine.add_(theirs)


class GroupStatistics:
    """``H`` and every ``D_m`` of linear layers that share one input, on one device.

    Holds one ``(d, d)`` Gram of the current expert, one ``(d, d)`` sum, and one ``(out, d)`` buffer
    per member, all fp32, however many experts there are; with η as much again for the ``C_i``, and
    with ρ one more ``(out, d)`` buffer for each member that writes to the residual stream; and the
    last rows, ``ROWS`` at most. Feeding the experts one after the other costs one fold each; any
    other order gives the same sums with more folds.

    A fold costs 2 · out · d² per member as ``(W_i − W_m) H_i``. An expert of less than d/2 rows is
    folded as ``((W_i − W_m) X) Xᵀ``, for 4 · out · d · n, and has no ``H_i`` of its own.

    Args:
        columns: d, the width of the shared input.
        members: full names of the linear layers, mapped to their number of outputs.
        experts: reads what the experts' weights differ by.
        device: where the sums live.
        weight: β_i, asked once per fold; None for 1 (raw sums, as in the paper).
        fold_once: β_i depends on the whole of ``H_i``, so a second fold of an expert is an error.
        form: which targets; the paper's by default.
        phases: where the time is counted.
        sample: keeps some rows, for figures per expert; None for none.
    """

    def __init__(
        self,
        columns: int,
        members: Mapping[str, int],
        experts: ExpertReader,
        device: torch.device | str = "cpu",
        *,
        weight: Weight | None = None,
        fold_once: bool = False,
        form: TargetForm = PAPER,
        phases: Phases | None = None,
        sample: RowSample | None = None,
    ):
        self.columns = columns
        self.members = dict(members)
        self.device = torch.device(device)
        self.form = form
        self.sample = sample
        self.tokens: dict[str, int] = {}
        self.folds = 0
        self._experts = experts
        self._weight = weight
        self._fold_once = fold_once
        self._phases = phases or Phases()
        self._folded: set[str] = set()
        self._expert: str | None = None
        self._stage: Stage | None = None  # rows of the current expert that are in no sum yet
        self._current: _Sums | None = None  # of the current expert, once its rows fill the stage
        self._gaps: dict[str, torch.Tensor] = {}  # member -> E_i of the current expert
        self._gap_sums: dict[str, torch.Tensor] = {}  # member -> Σ (r_i − r) of it
        self._total = _Sums()
        self._moved: torch.Tensor | None = None  # what W_i − W_m is multiplied by, in a fold
        self._deltas: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}

    @property
    def total_tokens(self) -> int:
        """Tokens seen so far, over all experts."""
        return sum(self.tokens.values())

    # ---- counting ----------------------------------------------------------------------------

    def add(
        self,
        expert: str,
        X: torch.Tensor,
        Z: torch.Tensor | None = None,
        gaps: Mapping[str, torch.Tensor] | None = None,
        kept: torch.Tensor | None = None,
    ) -> None:
        """Count the rows ``X: (n, d)`` as inputs of ``expert``.

        Args:
            Z: ``(n, d)`` the same tokens in the expert's own pass; None where they are ``X``.
            gaps: member → ``(n, out)`` r_i − r, of those that write to the residual stream.
            kept: ``(k,)`` int64 rows that the sample keeps; None for none.
        """
        if X.shape[0] == 0:
            return
        if expert != self._expert:
            self.fold()
            self._expert = expert
        rows = self._rows_of(X, Z, gaps)
        self.tokens[expert] = self.tokens.get(expert, 0) + len(X)
        if self.sample is not None and kept is not None:
            self._keep(rows, kept)
        if self._stage is not None and not self._stage.fits(rows):
            self._count_staged()
        if len(X) >= ROWS:
            self._count(rows)
        else:
            self._put_on_stage(rows)

    def _rows_of(
        self, X: torch.Tensor, Z: torch.Tensor | None, gaps: Mapping[str, torch.Tensor] | None
    ) -> Rows:
        X = X.to(self.device)
        own = self.form.eta and Z is not None
        # The difference first: H_i would cancel most of Σ z xᵀ.
        ahead = Z.to(self.device, torch.float32) - X if own else None
        known = gaps or {} if self.form.rho else {}
        gaps = {name: gap.to(self.device, torch.float32) for name, gap in known.items()}
        return Rows(X, ahead, gaps)

    def _keep(self, rows: Rows, kept: torch.Tensor) -> None:
        kept = kept.to(rows.X.device)
        self.sample.add(rows.of([tensor[kept] for tensor in rows.tensors()]))

    def _put_on_stage(self, rows: Rows) -> None:
        if self._stage is None or self._stage.kinds != rows.kinds:
            self._stage = Stage(rows)
        self._stage.add(rows)

    def _count_staged(self) -> None:
        if self._stage is not None and self._stage.count:
            self._count(self._stage.take())

    def _count(self, rows: Rows) -> None:
        """Add rows to the sums of the current expert."""
        for member in rows.gaps:
            if member not in self._gaps:
                self._gaps[member] = self._zeros(self.members[member], self.columns)
        of_gaps = {m: gap.sum(0) for m, gap in rows.gaps.items()} if self.form.biases else {}
        if self._current is None:
            self._current = _Sums()
        self._current.add(rows, vectors=self.form.biases)
        for member, gap in rows.gaps.items():
            cross_update(self._gaps[member], gap, rows.X)
        for member, total in of_gaps.items():
            self._gap_sums[member] = _sum(self._gap_sums.get(member), total, self.device)

    # ---- folding -----------------------------------------------------------------------------

    def fold(self) -> None:
        """Move the current expert's sums into the totals; nothing happens where there are none.

        Raises:
            EPMQNumericalError: the Gram is not finite, so some activation (or its square) is not.
        """
        staged = 0 if self._stage is None else self._stage.count
        if self._current is None and not staged:
            return
        with self._phases.measure("fold"):
            if self._current is None and 2 * staged < self.columns:
                self._fold_rows(self._stage.take())
            else:
                with self._phases.measure("gram"):
                    self._count_staged()
                self._fold_sums()
        if self.sample is not None:
            self.sample.done()
        self._expert = None
        self.folds += 1

    def _fold_sums(self) -> None:
        expert, current = self._expert, self._current
        assert expert is not None and current is not None
        diagonal = current.H.diagonal()
        self._check_finite(expert, diagonal, None if current.C is None else current.C.sum(1))
        self._count_fold(expert)
        factor = self._factor(expert, diagonal)
        if factor != 1:
            current.scale_(factor)
            for tensor in (*self._gaps.values(), *self._gap_sums.values()):
                tensor.mul_(factor)
        for member in self.members:
            self._fold_member(member, expert)
        self._moved = None
        for member in self._gaps:
            self._fold_gap(member)
        # The first expert's Gram becomes the sum: one buffer less until a second one comes.
        self._total.take_(current, self.device)
        self._current, self._gaps, self._gap_sums = None, {}, {}

    def _fold_member(self, member: str, expert: str) -> None:
        current, delta = self._current, self._read(member, expert)
        b = self._bias_of(member, expert)
        if delta is not None:
            if self._moved is None:
                self._moved = mirror_(current.H)
                if current.C is not None:
                    # W_i = (W_i − W_m) + W_m: the second part is that of all experts, `take`.
                    self._moved = torch.add(self._moved, current.C, alpha=self.form.eta)
            D = self._buffer(member)
            if self.form.biases:
                vector, output = current.s, self._output(member)
                if current.t is not None:
                    vector = torch.add(current.s, current.t, alpha=self.form.eta)
                of_delta = delta.outputs(vector[None])[0]
            delta.add_product_(D, self._moved)
            if self.form.biases:
                output.add_(of_delta)
        if self.form.biases:
            self._fold_bias(member, b, current.s, current.count)

    def _fold_gap(self, member: str) -> None:
        D = self._buffer(member)
        if self.form.biases:
            self._output(member).add_(self._gap_sums[member], alpha=self.form.rho)
        D.add_(self._gaps[member], alpha=self.form.rho)

    def _fold_rows(self, rows: Rows) -> None:
        expert = self._expert
        assert expert is not None
        # The diagonal of the Gram, as a sum of squares: what is not finite shows there.
        diagonal = torch.linalg.vector_norm(rows.X, dim=0, dtype=torch.float32).square_()
        self._check_finite(expert, diagonal, None if rows.ahead is None else rows.ahead.sum(0))
        self._count_fold(expert)
        factor = self._factor(expert, diagonal)
        with self._phases.measure("gram"):
            self._add_rows(rows, factor)
        for member in self.members:
            self._fold_rows_of(member, expert, rows, factor)
        self._moved = None

    def _add_rows(self, rows: Rows, factor: float) -> None:
        sums = self._total if factor == 1 else _Sums()
        sums.add(rows, vectors=self.form.biases)
        if sums is not self._total:
            sums.scale_(factor)
            self._total.take_(sums, self.device)

    def _fold_rows_of(self, member: str, expert: str, rows: Rows, factor: float) -> None:
        X, gap, delta = rows.X.to(torch.float32), rows.gaps.get(member), self._read(member, expert)
        b = self._bias_of(member, expert)
        outputs = None
        if delta is not None:
            if self._moved is None:
                self._moved = rows.moved(self.form.eta)
            outputs = delta.outputs(self._moved)
        parts = [(outputs, factor), (gap, factor * self.form.rho)]
        parts = [(part, weight) for part, weight in parts if part is not None]
        D = self._buffer(member) if parts else None
        if self.form.biases:
            of_rows, sums = X.sum(0).mul_(factor), [part.sum(0) for part, _ in parts]
            output = self._output(member) if parts else None
            for (_, weight), total in zip(parts, sums, strict=True):
                output.add_(total, alpha=weight)
        for part, weight in parts:
            in_parts(torch_product_update, D, part.t(), X, weight)
        if self.form.biases:
            self._fold_bias(member, b, of_rows, factor * len(X))

    def _fold_bias(
        self, member: str, b: torch.Tensor | None, inputs: torch.Tensor, count: float
    ) -> None:
        if b is not None:
            b = b.to(self.device)
            self._buffer(member).addr_(b, inputs)
            self._output(member).add_(b, alpha=count)

    def _read(self, member: str, expert: str) -> WeightDelta | None:
        with self._phases.measure("expert_reading"):
            delta = self._experts.delta(member, expert)
        if self.sample is not None:
            with self._phases.measure("deviation"):
                self.sample.fold(member, expert, delta, self._bias_of(member, expert))
        return delta

    def _bias_of(self, member: str, expert: str) -> torch.Tensor | None:
        return self._experts.bias(member, expert) if self.form.biases else None

    def _factor(self, expert: str, diagonal: torch.Tensor) -> float:
        return 1.0 if self._weight is None else self._weight(expert, diagonal)

    def _check_finite(
        self, expert: str, diagonal: torch.Tensor, ahead: torch.Tensor | None
    ) -> None:
        # Entry jj is a sum of squares: any non-finite activation of channel j shows there, and
        # d entries are read instead of d².
        finite, own_pass = torch.isfinite(diagonal), False
        where = "the activations at the input"
        if bool(finite.all()) and ahead is not None:
            finite, own_pass = torch.isfinite(ahead), True
            where = "in that expert's own pass, the activations at the input"
        if bool(finite.all()):
            return
        channel = int((~finite).nonzero()[0])
        module = next(iter(self.members))
        origin, place = self._experts.blame(expert, own_pass=own_pass) or (None, "")
        what = f"{where} of `{module}` are not finite"
        since = f"; the first is {place}" if place else ""
        remedy = (
            "Check that expert's calibration rows and the merged weights of earlier layers; load "
            "in bfloat16 or float32 if float16 overflowed."
        )
        if origin is not None and math.isfinite(origin.largest):
            what = f"{where} of `{module}` are finite, but their squares are too large for float32"
            since = f"; the largest is {origin.largest:.3g}, at {place}"
            remedy = "Look at what makes them so large, or leave the layer out with `dynamic`."
        raise EPMQNumericalError(
            f"expert `{expert}`: {what} ({int((~finite).sum())} of {self.columns} channels, the "
            f"first is {channel}{since}).",
            module=module,
            expert=expert,
            code="EPMQ-F27",
            subject=f"expert `{expert}`, inputs of `{module}`",
            remedy=remedy,
        )

    def merge_(self, other: GroupStatistics) -> None:
        """Add what ``other`` counted (same members, any device), emptying it."""
        assert other.columns == self.columns and other.members == self.members
        self.fold()
        other.fold()
        for expert in other._folded:
            self._count_fold(expert)
        self._total.take_(other._total, self.device)
        for mine, theirs in ((self._deltas, other._deltas), (self._outputs, other._outputs)):
            for member, tensor in theirs.items():
                mine[member] = _sum(mine.get(member), tensor, self.device)
        for expert, tokens in other.tokens.items():
            self.tokens[expert] = self.tokens.get(expert, 0) + tokens
        self.folds += other.folds
        if self.sample is not None and other.sample is not None:
            self.sample.merge_(other.sample)
        other._stage = None
        other._total, other._deltas, other._outputs = _Sums(), {}, {}
        other.tokens, other._folded = {}, set()

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

    # ---- results -----------------------------------------------------------------------------

    def gram(self) -> torch.Tensor:
        """``H: (d, d)`` fp32, zero where nothing was counted. The statistics give it away."""
        self.fold()
        self._stage = None  # room that is not needed any more
        if self._total.H is None:
            return self._zeros(self.columns, self.columns)
        mirror_(self._total.H)
        total, self._total.H = self._total.H, None
        return total

    def take_delta(self, member: str, W_m: torch.Tensor | None = None) -> torch.Tensor | None:
        """``D_m: (out, d)`` fp32, or None where it is exactly zero. Given away, as the Gram is.

        Args:
            W_m: ``(out, d)`` fp32 the merged weight, needed where η is not 0.
        """
        self.fold()
        if self._total.C is not None:
            product_update(self._buffer(member), W_m, self._total.C, self.form.eta)
        return self._deltas.pop(member, None)

    def take(self, member: str, H: torch.Tensor, W_m: torch.Tensor) -> Moments:
        """All that is known of one member, ``H`` being :meth:`gram`."""
        D = self.take_delta(member, W_m)
        if not self.form.biases:
            return Moments(H, D, count=self._total.count)
        outputs, t = self._outputs.pop(member, None), self._total.t
        if outputs is None:
            outputs = self._zeros(self.members[member])
        if t is not None:
            outputs = outputs.add_(torch.mv(W_m, t), alpha=self.form.eta)
        inputs = self._zeros(self.columns) if self._total.s is None else self._total.s
        return Moments(H, D, inputs, outputs, self._total.count)

    def _buffer(self, member: str) -> torch.Tensor:
        if member not in self._deltas:
            self._deltas[member] = self._zeros(self.members[member], self.columns)
        return self._deltas[member]

    def _output(self, member: str) -> torch.Tensor:
        if member not in self._outputs:
            self._outputs[member] = self._zeros(self.members[member])
        return self._outputs[member]

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)
