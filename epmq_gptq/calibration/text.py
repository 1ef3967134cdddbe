"""Rows of text → the merged model's token ids: cut or joined, never across experts or sources."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .draws import RowSet
from .encoded import InputRules, Limit, RowCounts, alike, in_turn, padded
from .rows import TEXT, Row, Where

if TYPE_CHECKING:
    import torch


class TokenRow(NamedTuple):
    """One row or block.

    Attributes:
        ids: its tokens.
        mask: 0 or 1 for each, where some in between are hidden; else None.
    """

    ids: list[int]
    mask: list[int] | None = None

    @property
    def visible(self) -> list[int]:
        """Those that are not hidden."""
        if self.mask is None:
            return self.ids
        return [token for token, kept in zip(self.ids, self.mask, strict=True) if kept]

    @property
    def length(self) -> int:
        """In tokens, hidden ones as well."""
        return len(self.ids)


@dataclass(frozen=True)
class TokenRules(InputRules):
    """What the merged model asks of its token ids.

    Attributes:
        tokenizer: of the merged model; None where there is none.
        context: the most tokens it takes at once, where its configuration says so.
        vocabulary: rows of its input embedding, where they are known.
    """

    tokenizer: Any = None
    context: int | None = None
    vocabulary: int | None = None

    form = TEXT

    @classmethod
    def of_config(cls, config: Any, tokenizer: Any, vocabulary: int | None = None) -> TokenRules:
        """Those of a configuration, where the rows of the embedding are known in particular."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        context = getattr(text, "max_position_embeddings", None)
        rows = vocabulary or getattr(text, "vocab_size", None)
        return cls(
            tokenizer,
            context if isinstance(context, int) and context > 0 else None,
            rows if isinstance(rows, int) and rows > 0 else None,
        )

    @property
    def pads_left(self) -> bool:
        """Whether the tokenizer pads on the left; then a row that is cut keeps its end."""
        return getattr(self.tokenizer, "padding_side", "right") == "left"

    @property
    def pad_id(self) -> int:
        """What fills a batch up; masked everywhere, but it must have an embedding."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if self._embedded(pad) else 0

    @property
    def separator(self) -> list[int]:
        """Tokens between joined rows: the end of text, where the tokenizer has one."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        return [end] if self._embedded(end) else []

    def _embedded(self, token: Any) -> bool:
        return isinstance(token, int) and 0 <= token < (self.vocabulary or token + 1)

    # ---- one text ------------------------------------------------------------------------------

    def tokens_of(self, text: str, where: Where, *, answer: bool = False) -> list[int]:
        """Tokens of a text, the tokenizer's special ones included.

        Args:
            text: of a row.
            where: the row was found.
            answer: whether it is the target of a pair.

        Raises:
            EPMQInputError: there is no tokenizer, or it makes something of the text that the model
                cannot read.
        """
        tokenizer = self._reader(where)
        if re.search("[\ud800-\udfff]", text):
            cause = "the text has half of a character in it, as after a cut inside of an emoji"
            raise where.bad(cause, "Correct the text.")
        if answer:
            # GPTQModel's wrapper of a tokenizer wants a first argument.
            ids = tokenizer(None, text_target=text, add_special_tokens=True)["input_ids"]
        else:
            ids = tokenizer(text, add_special_tokens=True)["input_ids"]
        if not ids:
            raise where.bad("the merged model's tokenizer makes no token of it", "Take it out.")
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            raise where._replace(subject="the merged model").bad(
                f"the merged model's tokenizer makes token id {max(ids)} of it, and the model has "
                f"{self.vocabulary} embeddings",
                "Give it the tokenizer that it was merged with.",
                "EPMQ-F05",
            )
        return list(ids)

    def _reader(self, where: Where) -> Any:
        if self.tokenizer is None:
            cause = "the merged model has no tokenizer to read text with"
            raise where.bad(cause, "Give token ids, or add the tokenizer to it.")
        return self.tokenizer

    def known(self, ids: list[int], where: Where) -> list[int]:
        """Token ids of a row as they are.

        Raises:
            EPMQInputError: the model has no embedding of one.
        """
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            raise where.bad(
                f"token id {max(ids)} has no embedding in the merged model, which has "
                f"{self.vocabulary}",
                "Make the ids with the merged model's tokenizer.",
            )
        return ids

    def _tokenised(self, rows: Iterable[Row]) -> Iterator[TokenRow]:
        for row in rows:
            if row.kind == "input_ids":
                yield TokenRow(self.known(row.value, row.where), row.mask)
            else:
                text = row.value if row.kind == "text" else self._chat(row)
                yield TokenRow(self.tokens_of(text, row.where))

    def _chat(self, row: Row) -> str:
        """As GPTQModel does it: the template makes a text of a chat."""
        tokenizer = self._reader(row.where)
        if getattr(tokenizer, "chat_template", None) is None:
            raise row.where.bad(
                "the row holds `messages`, and the merged model's tokenizer has no chat template",
                "Give `text` rows, or add the template to the merged model.",
            )
        contents = [message["content"] for message in row.value]
        try:
            text = tokenizer.apply_chat_template(
                row.value, tokenize=False, add_generation_prompt=False
            )
        except Exception as error:
            # Templates are programs: they raise what they like, mostly about the order of roles.
            cause = f"the merged model's chat template refuses it: {str(error).rstrip('.')}"
            raise row.where.bad(cause, "Correct the messages.") from error
        if any(isinstance(each, (list, Mapping)) and str(each) in text for each in contents):
            cause = "the merged model's chat template takes no `content` in parts"
            raise row.where.bad(cause, "Make each `content` one string.")
        return text

    # ---- a source ------------------------------------------------------------------------------

    def _encoded(self, one: RowSet, expert: str) -> tuple[list[TokenRow], RowCounts]:
        if one.source.concat:
            return self._joined(one, expert)
        limit = Limit(one, self.context)
        rows = []
        for row in self._tokenised(one.rows):
            if limit.exceeded_by(row.length):
                row = self._cut(row, limit.allowed)
            rows.append(row)
        limit.warn(expert, len(rows), "rows")
        tokens = sum(len(row.visible) for row in rows)
        return rows, RowCounts.of(one, rows, tokens, limit.cut)

    def _cut(self, row: TokenRow, length: int) -> TokenRow:
        kept = slice(-length, None) if self.pads_left else slice(length)
        mask = None if row.mask is None else row.mask[kept]
        return TokenRow(row.ids[kept], mask if mask is not None and 0 in mask else None)

    def _joined(self, one: RowSet, expert: str) -> tuple[list[TokenRow], RowCounts]:
        """Blocks of exactly ``seqlen`` tokens of a source's rows, one after another."""
        length, wanted = one.source.limit, one.source.samples
        if self.context is not None and length > self.context:
            raise Where(f"calibration of expert `{expert}`", "`seqlen`").bad(
                f"`seqlen` asks for blocks of {length} tokens, the model takes {self.context}",
                f"Set it to {self.context} or less.",
                "EPMQ-F25",
            )
        blocks: list[TokenRow] = []
        starts: list[int] = []  # of the rows, in the stream of all tokens
        stream: list[int] = []  # its end, what is in no block yet
        last = None
        for row in self._tokenised(one.rows):
            if last not in (None, self.separator):
                stream += self.separator
            starts.append(len(blocks) * length + len(stream))
            stream += row.visible
            last = stream[-1:]
            full = len(stream) // length
            if wanted is not None:
                full = min(full, wanted - len(blocks))
            blocks += [TokenRow(stream[i * length : (i + 1) * length]) for i in range(full)]
            stream = stream[full * length :]
            if len(blocks) == wanted:
                break
        _check_blocks(one, len(blocks), len(blocks) * length + len(stream), expert)
        return blocks, RowCounts(
            asked=wanted,
            available=one.available,
            used=sum(start < len(blocks) * length for start in starts),
            sequences=len(blocks),
            blocks=len(blocks),
            tokens=len(blocks) * length,
            dropped=len(stream),
        )

    # ---- batches -------------------------------------------------------------------------------

    def batches(
        self,
        rows: Sequence[TokenRow],
        batch_size: int,
        *,
        pad: bool = True,
        masked: bool = True,
    ) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """See :meth:`InputRules.batches`."""
        if pad:
            groups = in_turn(rows, batch_size if masked else 1)
        else:
            groups = alike(rows, batch_size)
        for group in groups:
            ids, masks = [row.ids for row in group], [row.mask for row in group]
            batch = padded(ids, self.pad_id, left=self.pads_left, masks=masks)
            inputs = {"input_ids": batch.ids} | ({"attention_mask": batch.mask} if masked else {})
            yield inputs, int(batch.mask.sum())


def _check_blocks(one: RowSet, made: int, tokens: int, expert: str) -> None:
    length, wanted = one.source.limit, one.source.samples
    if made >= (wanted or 1):
        return
    asked = "one block" if wanted is None else f"`samples` asks for {wanted} blocks"
    at = Where(f"calibration of expert `{expert}` ({one.source.label})", f"expert `{expert}`")
    raise at.bad(
        f"{asked} of {length} tokens, the {one.available} rows have {tokens} tokens, which make "
        f"{made}",
        "Add rows, or lower `samples` or `seqlen`.",
        "EPMQ-F24",
    )
