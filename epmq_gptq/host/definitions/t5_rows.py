"""Pairs of texts → batches for GPTQModel's own methods (GPTQ, AWQ, …)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gptqmodel.models.base import BaseQModel

from ...calibration.batches import input_rules
from ...calibration.draws import read_calibration
from ...calibration.pairs import PairRow, PairRules
from ...io.declared import bad_option, conflict, is_count

_NAME = "calibration"


def batches_of_pairs(
    model: BaseQModel, rows: Any, batch_size: int, **concat: Any
) -> list[dict[str, torch.Tensor]]:
    """Batches in which the host's processors leave padding out, though they know one mask only.

    That mask is the source's, and they take it wherever its shape fits. So the targets of a batch
    are of one length, which needs no mask, and its padded sources of another.

    Args:
        rows: pairs in any form that calibration has.
        concat: options of the host that join rows: a pair is not joined with another.

    Raises:
        EPMQInputError: as of reading and encoding rows; or one of ``concat`` is set.
    """
    for option, value in concat.items():
        if value is not None:
            cause = f"cannot be used with pairs of texts, got {value!r}"
            raise conflict(option, cause, "Leave it out.")
    if not is_count(batch_size):
        raise bad_option("batch_size", "a positive integer", batch_size)
    rules = input_rules(model)
    sets = read_calibration({_NAME: rows}, [_NAME], form=rules.form)
    return [
        _with_other_width(batch, rules)
        for group in _alike(rules.encode(sets).rows[_NAME], batch_size)
        for batch, _ in rules.batches(group, batch_size)
    ]


def _alike(rows: Sequence[PairRow], batch_size: int) -> Iterator[list[PairRow]]:
    """Groups of pairs whose targets are equally long, sources of similar length together."""
    by_length: dict[int, list[PairRow]] = {}
    for row in rows:
        by_length.setdefault(len(row.decoder_ids), []).append(row)
    for length in sorted(by_length, reverse=True):
        group = sorted(by_length[length], key=lambda row: len(row.ids), reverse=True)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _with_other_width(batch: dict[str, torch.Tensor], rules: PairRules) -> dict[str, torch.Tensor]:
    """One more column of padding where the mask of the sources has the shape of the targets."""
    mask = batch["attention_mask"]
    if mask.all() or mask.shape != batch["decoder_input_ids"].shape:
        return batch
    pad = torch.nn.functional.pad
    return batch | {
        "input_ids": pad(batch["input_ids"], (0, 1), value=rules.pad_id),
        "attention_mask": pad(mask, (0, 1), value=False),
    }
