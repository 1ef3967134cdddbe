"""Pairs of texts → the tokens of an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import EPMQInputError
from .draws import RowSet
from .encoded import InputRules, Limit, RowCounts, in_turn, padded
from .rows import PAIRS, Row
from .text import TokenRules

if TYPE_CHECKING:
    import torch


class PairRow(NamedTuple):
    """One pair.

    Attributes:
        ids: what the encoder reads.
        decoder_ids: what the decoder reads: the start token, and the answer without its last token.
    """

    ids: list[int]
    decoder_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.ids) + len(self.decoder_ids)


@dataclass(frozen=True)
class PairRules(InputRules):
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

    def batches(
        self, rows: Sequence[PairRow], batch_size: int, **_: bool
    ) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """See :meth:`InputRules.batches`."""
        for group in in_turn(rows, batch_size):
            source = padded([row.ids for row in group], self.pad_id)
            target = padded([row.decoder_ids for row in group], self.pad_id)
            batch = {
                "input_ids": source.ids,
                "attention_mask": source.mask,
                "decoder_input_ids": target.ids,
                "decoder_attention_mask": target.mask,
            }
            yield batch, int(source.mask.sum() + target.mask.sum())

    def _encoded(self, one: RowSet, expert: str) -> tuple[list[PairRow], RowCounts]:
        """Both halves are cut to the source's `seqlen`."""
        limit = Limit(one, self.text.context)
        rows = []
        for row in one.rows:
            ids, labels = self._tokenised(row)
            if limit.exceeded_by(max(len(ids), len(labels))):
                ids, labels = ids[: limit.allowed], labels[: limit.allowed]
            rows.append(PairRow(ids, [self.start, *labels[:-1]]))
        limit.warn(expert, len(rows), "pairs")
        return rows, RowCounts.of(one, rows, sum(row.length for row in rows), limit.cut)

    def _tokenised(self, row: Row) -> tuple[list[int], list[int]]:
        if row.kind == "text":
            ids = self.text.tokens_of(row.value, row.where)
            return ids, self.text.tokens_of(row.target, row.where, answer=True)
        return self.text.known(row.value, row.where), self.text.known(row.target, row.where)
