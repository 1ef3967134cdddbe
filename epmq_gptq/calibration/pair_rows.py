"""Pairs of texts → the tokens of an encoder and a decoder, and their batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import EPMQInputError, EPMQWarning
from .image_rows import pad_right
from .row_checks import Row, bad_row
from .row_forms import PAIRS
from .row_sets import RowSet
from .tokens import (
    EncodedCalibration,
    RowCounts,
    TokenRules,
    check_vocabulary,
    counted,
    encode_text,
)


class PairRow(NamedTuple):
    """One pair.

    Attributes:
        ids: what the encoder reads.
        decoder_ids: what the decoder reads: the start token, and the answer without its last token.
    """

    ids: list[int]
    decoder_ids: list[int]

    @property
    def tokens(self) -> int:
        """Of both."""
        return len(self.ids) + len(self.decoder_ids)


@dataclass(frozen=True)
class PairRules:
    """What a merged source-and-target model asks of its tokens.

    Attributes:
        text: rules of its tokens.
        start: id of the token that the decoder starts with.
        pad_id: what fills a batch up, hidden by the masks.
    """

    text: TokenRules
    start: int
    pad_id: int

    form = PAIRS

    @classmethod
    def of(cls, config: Any, tokenizer: Any) -> PairRules:
        """Those of a model, from its configuration.

        Raises:
            EPMQInputError: it does not say what its decoder starts with.
        """
        start = getattr(config, "decoder_start_token_id", None)
        if not isinstance(start, int):
            raise EPMQInputError(
                f"the merged model: `decoder_start_token_id` should be a token id, got {start!r}.",
                code="EPMQ-F04",
                subject="the merged model",
                remedy="Add it to its config.json.",
            )
        pad = getattr(config, "pad_token_id", None)
        return cls(TokenRules.of_config(config, tokenizer), start, pad if pad is not None else 0)

    def encode(self, sets: Mapping[str, Sequence[RowSet]]) -> EncodedCalibration:
        """Tokens of every expert's pairs, cut to the source's `seqlen` on both sides.

        Warns:
            EPMQWarning: pairs were cut because the model takes no more (F25).

        Raises:
            EPMQInputError: a row has no token, or one that the model has no embedding of.
        """
        rows, counts = {}, {}
        for name, each in sets.items():
            parts = [self._encoded(one, name) for one in each]
            rows[name] = [row for part, _ in parts for row in part]
            counts[name] = counted(count for _, count in parts)
        return EncodedCalibration(rows, counts, self.form.name)

    def batches(
        self, rows: Sequence[PairRow], batch_size: int
    ) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """Inputs of the model, and how many tokens of each batch are calibration."""
        for start in range(0, len(rows), batch_size):
            group = rows[start : start + batch_size]
            source = pad_right([row.ids for row in group], self.pad_id)
            target = pad_right([row.decoder_ids for row in group], self.pad_id)
            batch = {
                "input_ids": source.ids,
                "attention_mask": source.mask,
                "decoder_input_ids": target.ids,
                "decoder_attention_mask": target.mask,
            }
            yield batch, int(source.mask.sum() + target.mask.sum())

    def _encoded(self, one: RowSet, expert: str) -> tuple[list[PairRow], RowCounts]:
        wanted, context = one.source.limit, self.text.context
        allowed = min((limit for limit in (wanted, context) if limit is not None), default=None)
        rows = []
        cut = too_long = 0
        for row in one.rows:
            ids, labels = self._tokenised(row, expert)
            longest = max(len(ids), len(labels))
            if allowed is not None and longest > allowed:
                cut += 1
                too_long += wanted is None or allowed < wanted
                ids, labels = ids[:allowed], labels[:allowed]
            rows.append(PairRow(ids, [self.start, *labels[:-1]]))
        if too_long:
            warnings.warn(
                EPMQWarning(
                    f"calibration of expert `{expert}`: {too_long} of {len(rows)} pairs were cut "
                    f"to the model's {context} tokens.",
                    code="EPMQ-F25",
                ),
                stacklevel=4,
            )
        return rows, RowCounts(
            asked=one.source.samples,
            available=one.available,
            used=len(rows),
            sequences=len(rows),
            tokens=sum(row.tokens for row in rows),
            cut=cut,
            blank=one.blank,
        )

    def _tokenised(self, row: Row, expert: str) -> tuple[list[int], list[int]]:
        if row.kind == "text":
            ids = encode_text(row.value, row.place, self.text, expert)
            labels = encode_text(row.target, row.place, self.text, expert, answer=True)
        else:
            ids, labels = row.value, row.target
            check_vocabulary(row, ids, self.text, expert)
            check_vocabulary(row, labels, self.text, expert)
        if not labels:
            cause = "the merged model's tokenizer makes no token of the target"
            raise bad_row(row.place, cause, f"expert `{expert}`", "Take it out.")
        return ids, labels
