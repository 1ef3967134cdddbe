"""How far a layer's outputs lie from every expert's, on a sample of the calibration rows.

For a weight W in place of the merged one, and rows x of expert i as the partially quantized merged
model makes them (eq. 9):

    W x − W_i x = (W − W_m) x  +  (W_m − W_i) x
                  quantization     merging deviation

Over all rows that is tr[(W − W_i) H_i (W − W_i)ᵀ], which would need every expert's Gram until its
layers are rounded. Some hundred rows per expert tell it to a few percent, for little memory; with
as many rows as there are, and outputs, it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from ..run_report import AimError, ExpertError
from .deltas import WeightDelta
from .staging import Rows

# Outputs of each layer that are looked at, evenly spaced.
OUTPUTS = 256


def sampled_rows(rows: int, wanted: int, *, batch: int, place: int, batches: int):
    """Which rows of a batch are kept, ``(k,)`` int64, or None; the same ones in every run.

    Args:
        rows: that count in this batch.
        wanted: of the expert, over all its batches; about as many are kept.
        batch: number of the batch in the run: seeds the draw.
        place: of the batch among those of its expert, from 0.
        batches: of that expert.
    """
    if not wanted or place % -(-batches // wanted):
        return None
    # At random: every k-th would often be the same position of each sequence.
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(batch))
    return order[: -(-wanted // batches)]


class _Lack(NamedTuple):
    """What the merged layer lacks on some rows of one expert.

    Attributes:
        X: ``(m, d)`` the rows.
        ahead: ``(m, d)`` z − x, or None.
        own: ``(m, some outputs)`` (W_i − W_m) x.
        aim: the same of T_i − b_m − W_m x, but for η W_m (z − x); None where T_i is W_i x.
    """

    X: torch.Tensor
    ahead: torch.Tensor | None
    own: torch.Tensor
    aim: torch.Tensor | None

    def to(self, device: torch.device) -> _Lack:
        """The same there."""
        return _Lack(*(None if tensor is None else tensor.to(device) for tensor in self))


class RowSample:
    """Rows of the experts that are kept whole, for the linear layers of one input.

    Additive, as the statistics beside it are: filled between two folds, folded with them.

    Args:
        members: full names of the layers → outputs.
        eta, rho: of the target, see :class:`~epmq_gptq.method.statistics.TargetForm`.
        outputs: of each layer that are looked at.
    """

    def __init__(
        self,
        members: Mapping[str, int],
        *,
        eta: float = 0.0,
        rho: float = 0.0,
        outputs: int = OUTPUTS,
    ):
        self.eta, self.rho = eta, rho
        self._steps = {member: -(-count // outputs) for member, count in members.items()}
        self._new: list[Rows] = []
        self._lacks: dict[str, dict[str, list[_Lack]]] = {member: {} for member in members}

    def add(self, rows: Rows) -> None:
        """Keep these rows of the current expert; they are a copy already."""
        self._new.append(rows)

    def fold(
        self, member: str, expert: str, delta: WeightDelta | None, bias: torch.Tensor | None
    ) -> None:
        """Work out what one layer lacks on the rows added since the last :meth:`done`.

        Args:
            delta: W_i − W_m, or None where it is zero.
            bias: b_i − b_m, or None where it is zero or of no interest.
        """
        step, found = self._steps[member], []
        for rows in _joined(self._new):
            X = rows.X.to(torch.float32)
            own = self._outputs(member, delta, X)
            aim = None
            gap = rows.gaps.get(member)
            if rows.ahead is not None or gap is not None or bias is not None:
                aim = (
                    own
                    if rows.ahead is None
                    else self._outputs(member, delta, rows.moved(self.eta))
                )
                if gap is not None:
                    aim = torch.add(aim, gap[:, ::step], alpha=self.rho)
                if bias is not None:
                    aim = aim + bias[::step].to(aim.device)
            found.append(_Lack(rows.X, rows.ahead, own, aim))
        self._lacks[member].setdefault(expert, []).extend(found)

    def _outputs(self, member: str, delta: WeightDelta | None, X: torch.Tensor) -> torch.Tensor:
        step = self._steps[member]
        found = None if delta is None else delta.thinned(step).outputs(X)
        return X.new_zeros(len(X), 1).expand(-1, 1) if found is None else found

    def done(self) -> None:
        """All layers were folded: the next rows are another expert's."""
        self._new = []

    def merge_(self, other: RowSample) -> None:
        """Take what another sample of the same layers holds."""
        for member, lacks in other._lacks.items():
            for expert, found in lacks.items():
                self._lacks[member].setdefault(expert, []).extend(found)
        other._lacks = {member: {} for member in self._lacks}

    def take(self, member: str, W_m: torch.Tensor) -> dict[str, list[_Sampled]]:
        """Expert → its rows as one layer sees them, given away; ``W_m: (out, d)`` fp32."""
        step = self._steps[member]
        some = W_m[::step]
        return {
            expert: [_Sampled.of(lack.to(W_m.device), some, self.eta) for lack in found]
            for expert, found in self._lacks[member].items()
        }


def _joined(rows: Sequence[Rows]) -> Iterable[Rows]:
    """The same rows in as few pieces as their kinds allow."""
    kinds: dict[tuple, list[Rows]] = {}
    for one in rows:
        kinds.setdefault(one.kinds, []).append(one)
    for same in kinds.values():
        tensors = zip(*(one.tensors() for one in same), strict=True)
        yield same[0].of([torch.cat(list(pieces)) for pieces in tensors])


class _Sampled(NamedTuple):
    """Rows of one expert, with what the merged layer gives for them and what it lacks.

    Attributes:
        X: ``(m, d)``.
        given: ``(m, some outputs)`` W_m x.
        own: (W_i − W_m) x.
        aim: T_i − b_m − W_m x, or None where T_i is W_i x.
    """

    X: torch.Tensor
    given: torch.Tensor
    own: torch.Tensor
    aim: torch.Tensor | None

    @classmethod
    def of(cls, lack: _Lack, W_m: torch.Tensor, eta: float) -> _Sampled:
        given = lack.X.to(torch.float32) @ W_m.t()
        aim = lack.aim
        if lack.ahead is not None:
            aim = torch.addmm(aim.expand_as(given), lack.ahead, W_m.t(), alpha=eta)
        return cls(lack.X, given, lack.own, aim)


class Watch(Protocol):
    """Tells how far one layer's outputs lie from every expert's, before and after rounding."""

    def start(self, W_target: torch.Tensor) -> dict[str, ExpertError]:
        """The figures before rounding; without experts of which no row gives any output.

        Args:
            W_target: ``(out, d)`` fp32, what will be rounded.
        """

    def finish(
        self, Q: torch.Tensor, shift: torch.Tensor | None, errors: Mapping[str, ExpertError]
    ) -> None:
        """Fill in the figures after rounding.

        Args:
            Q: ``(out, d)`` fp32, the rounded weight.
            shift: ``(out,)`` what is added to the bias, or None.
            errors: those of :meth:`start`.
        """


class LayerWatch:
    """A :class:`Watch` by the rows of a sample.

    Args:
        samples: of the layer's input, from any number of devices; each is given away.
        member: the layer's full name.
        W_m: ``(out, d)`` fp32 the merged weight.
    """

    def __init__(self, samples: Sequence[RowSample], member: str, W_m: torch.Tensor):
        self._rows: dict[str, list[_Sampled]] = {}
        self._step = samples[0]._steps[member] if samples else 1
        # Outputs for each that is looked at.
        self._share = len(W_m) / len(W_m[:: self._step])
        for sample in samples:
            for expert, found in sample.take(member, W_m).items():
                self._rows.setdefault(expert, []).extend(found)

    def start(self, W_target: torch.Tensor) -> dict[str, ExpertError]:
        """See :class:`Watch`."""
        solved, found = self._after(W_target, None), {}
        for expert, rows in self._rows.items():
            count = sum(len(one.X) for one in rows)
            energy = _energy(one.given + one.own for one in rows)
            if not 0 < energy < math.inf:
                continue
            aim = None
            if all(one.aim is not None for one in rows):
                whole = _energy(one.given + one.aim for one in rows)
                if whole > 0:
                    aim = AimError(
                        merged=_energy(one.aim for one in rows) / whole,
                        solved=solved[expert][1] / whole,
                    )
            found[expert] = ExpertError(
                rows=count,
                energy=self._share * energy / count,
                merged=_energy(one.own.expand_as(one.given) for one in rows) / energy,
                solved=solved[expert][0] / energy,
                aim=aim,
            )
        return found

    def finish(
        self, Q: torch.Tensor, shift: torch.Tensor | None, errors: Mapping[str, ExpertError]
    ) -> None:
        """See :class:`Watch`."""
        rounded = self._after(Q, shift)
        for expert, error in errors.items():
            own, aim, change = rounded[expert]
            if not math.isfinite(own):  # JSON has no word for it
                continue
            energy = error.energy * error.rows / self._share
            error.rounded, error.quantization = own / energy, change / energy
            if error.aim is not None:
                whole = _energy(one.given + one.aim for one in self._rows[expert])
                error.aim.rounded = aim / whole
        self._rows = {}

    def _after(
        self, W: torch.Tensor, shift: torch.Tensor | None
    ) -> dict[str, tuple[float, float, float]]:
        """Expert → Σ‖(W − W_i) x‖², Σ‖T_i − b − W x‖² and Σ‖(W − W_m) x‖²."""
        some = W[:: self._step].to(torch.float32)
        found = {}
        for expert, rows in self._rows.items():
            own = aim = moved = 0.0
            for one in rows:
                change = one.X.to(torch.float32) @ some.t() - one.given
                own += _energy([change - one.own])
                moved += _energy([change])
                if one.aim is not None:
                    less = one.aim if shift is None else one.aim - shift[:: self._step]
                    aim += _energy([change - less])
            found[expert] = own, aim, moved
        return found


def _energy(pieces: Iterable[torch.Tensor]) -> float:
    return sum(float(piece.square().sum(dtype=torch.float64)) for piece in pieces)
