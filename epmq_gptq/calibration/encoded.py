"""Rows as a merged model takes them, whatever their form: counted, cut, and joined to batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..errors import EPMQWarning
from .draws import RowSet
from .rows import RowForm
from .sources import check_names

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RowCounts:
    """What became of one expert's calibration.

    Attributes:
        asked: rows (with ``concat``: blocks) that `samples` asks for; None: all there are.
        available: rows that the sources have.
        used: rows of which something is used.
        sequences: rows and blocks that the model gets.
        blocks: how many of these were joined from rows.
        tokens: in all sequences, hidden ones left out.
        cut: rows that were longer than allowed and lost their rest.
        dropped: tokens that were read and are in no block.
        blank: empty rows of a dataset that were passed over in the draw.
    """

    asked: int | None
    available: int
    used: int
    sequences: int
    blocks: int = 0
    tokens: int = 0
    cut: int = 0
    dropped: int = 0
    blank: int = 0

    @classmethod
    def of(cls, one: RowSet, rows: Sequence[Any], tokens: int, cut: int = 0) -> RowCounts:
        """Those of a source whose rows are used one by one."""
        return cls(
            asked=one.source.samples,
            available=one.available,
            used=len(rows),
            sequences=len(rows),
            tokens=tokens,
            cut=cut,
            blank=one.blank,
        )

    def __add__(self, other: RowCounts) -> RowCounts:
        mine, its = asdict(self), asdict(other)
        both = {
            name: None if None in (mine[name], its[name]) else mine[name] + its[name]
            for name in mine
        }
        return RowCounts(**both)


@dataclass(frozen=True)
class EncodedCalibration:
    """Every expert's rows: what ``model.quantize`` takes from whoever has read them already.

    Attributes:
        rows: expert → its ``TokenRow``, ``ImageRow`` or ``PairRow`` each.
        counts: expert → what became of its rows.
        form: "text", "images" or "pairs".
    """

    rows: dict[str, list[Any]]
    counts: dict[str, RowCounts]
    form: str = "text"

    @property
    def tokens(self) -> dict[str, int]:
        """Expert → tokens."""
        return {name: counts.tokens for name, counts in self.counts.items()}

    def check_experts(self, experts: Sequence[str], data_free: Sequence[str] = ()) -> None:
        """Refuse to be the calibration of other experts.

        Raises:
            EPMQInputError: naming both sets.
        """
        check_names(self.rows, [name for name in experts if name not in data_free])


class InputRules:
    """What a merged model asks of its inputs; one subclass for each form of rows."""

    form: ClassVar[RowForm]
    positions = 1  # tokens of an image

    def encode(self, sets: Mapping[str, Sequence[RowSet]]) -> EncodedCalibration:
        """Every expert's rows as the model takes them.

        Warns:
            EPMQWarning: rows were cut because the model takes no more (F25).

        Raises:
            EPMQInputError: a row is nothing that the model can take.
        """
        rows, counts = {}, {}
        for name, each in sets.items():
            parts = [self._encoded(one, name) for one in each]
            rows[name] = [row for part, _ in parts for row in part]
            first, *others = (count for _, count in parts)
            counts[name] = sum(others, first)
        return EncodedCalibration(rows, counts, self.form.name)

    def _encoded(self, one: RowSet, expert: str) -> tuple[list[Any], RowCounts]:
        raise NotImplementedError

    def batches(
        self, rows: Sequence[Any], batch_size: int, *, pad: bool = True, masked: bool = True
    ) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """Inputs of the model, and how many tokens of each batch are calibration.

        Args:
            rows: of one expert, encoded.
            batch_size: rows per batch, at most.
            pad: of text: whether rows of different lengths may share a batch. Routed modules see no
                attention mask, so a padding token would count as data there.
            masked: of text: whether the model takes an attention mask; else rows go one by one.
        """
        raise NotImplementedError


class Limit:
    """The most tokens of a row, by its source and its model; counts the rows that are longer.

    Attributes:
        allowed: tokens; None: any number.
        cut: rows that were longer.
    """

    def __init__(self, one: RowSet, context: int | None):
        wanted = one.source.limit
        self._context = context
        self.allowed = min((each for each in (wanted, context) if each is not None), default=None)
        # A cut that was asked for is none to warn of.
        self._aloud = wanted is None or (self.allowed is not None and self.allowed < wanted)
        self.cut = 0

    def exceeded_by(self, length: int) -> bool:
        """Whether a row of so many tokens is to be cut; then it counts."""
        longer = self.allowed is not None and length > self.allowed
        self.cut += longer
        return longer

    def warn(self, expert: str, total: int, rows: str) -> None:
        """Say that rows were cut because the model takes no more."""
        if self.cut and self._aloud:
            warnings.warn(
                EPMQWarning(
                    f"calibration of expert `{expert}`: {self.cut} of {total} {rows} were cut to "
                    f"the model's {self._context} tokens.",
                    code="EPMQ-F25",
                ),
                stacklevel=5,
            )


def in_turn(rows: Sequence[Any], batch_size: int) -> Iterator[Sequence[Any]]:
    """Groups of rows one after another."""
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def alike(rows: Sequence[Any], batch_size: int) -> Iterator[Sequence[Any]]:
    """Groups of rows of one length, the longest first."""
    by_length: dict[int, list[Any]] = {}
    for row in rows:
        by_length.setdefault(row.length, []).append(row)
    for length in sorted(by_length, reverse=True):
        yield from in_turn(by_length[length], batch_size)


class Padded(NamedTuple):
    """Rows of tokens filled up to one length: ``(B, S)`` ids (int64) and mask (bool)."""

    ids: torch.Tensor
    mask: torch.Tensor


def padded(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    *,
    left: bool = False,
    masks: Sequence[Sequence[int] | None] | None = None,
) -> Padded:
    """Rows of tokens as one batch; the mask hides what was filled up.

    Args:
        rows: token ids.
        pad_id: the token that fills up.
        left: whether it does so in front of the row.
        masks: 0 or 1 for each token of a row, where some are hidden.
    """
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        own = slice(width - len(row), None) if left else slice(len(row))
        ids[index, own] = torch.tensor(row, dtype=torch.long)
        hides = None if masks is None else masks[index]
        mask[index, own] = True if hides is None else torch.tensor(hides, dtype=torch.bool)
    return Padded(ids, mask)
