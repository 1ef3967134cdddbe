"""Rows → token ids, by the merged model's tokenizer: cut to length or joined into blocks, counted.

The ids are those that GPTQModel makes of the same rows. It would make them later, one flat list of
all experts, and drop and cut rows without a word.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..errors import EPMQInputError, EPMQWarning
from .names import check_names
from .row_checks import Row, bad_row
from .row_forms import TEXT
from .row_sets import RowSet


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

    def __add__(self, other: RowCounts) -> RowCounts:
        mine, its = asdict(self), asdict(other)
        both = {
            name: None if None in (mine[name], its[name]) else mine[name] + its[name]
            for name in mine
        }
        return RowCounts(**both)


@dataclass(frozen=True)
class TokenRules:
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
    def of(cls, model: Any) -> TokenRules:
        """Those of a model that GPTQModel loaded; its weights may still be on disk."""
        try:
            embedding = model.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            embedding = None
        rows = getattr(embedding, "num_embeddings", None)
        return cls.of_config(model.model.config, model.tokenizer, rows)

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

    def encode(self, sets: Mapping[str, Sequence[RowSet]]) -> EncodedCalibration:
        """:func:`encode_calibration` by these rules."""
        return encode_calibration(sets, self)

    @property
    def pads_left(self) -> bool:
        """Whether the tokenizer pads on the left; then a row that is cut keeps its end."""
        return getattr(self.tokenizer, "padding_side", "right") == "left"

    @property
    def pad_id(self) -> int:
        """What fills a batch up; masked everywhere, but it must have an embedding."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        usable = isinstance(pad, int) and 0 <= pad < (self.vocabulary or pad + 1)
        return pad if usable else 0

    @property
    def separator(self) -> list[int]:
        """Tokens between joined rows: the end of text, where the tokenizer has one."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        usable = isinstance(end, int) and 0 <= end < (self.vocabulary or end + 1)
        return [end] if usable else []


@dataclass(frozen=True)
class EncodedCalibration:
    """Every expert's rows: what ``model.quantize`` takes from whoever has read them already.

    Attributes:
        rows: expert → its rows and blocks (of images and pairs: ``ImageRow``, ``PairRow``).
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


def encode_calibration(
    sets: Mapping[str, Sequence[RowSet]], rules: TokenRules
) -> EncodedCalibration:
    """Tokenise, cut and join every expert's rows; no row meets one of another expert or source.

    Warns:
        EPMQWarning: rows were cut because the model takes no more (F25).

    Raises:
        EPMQInputError: a row has no token, or one that the model has no embedding of; a chat, and
            no template; too few tokens for the blocks that were asked for.
    """
    rows: dict[str, list[TokenRow]] = {}
    counts: dict[str, RowCounts] = {}
    for name, each in sets.items():
        parts = [(_joined if one.source.concat else _fitted)(one, rules, name) for one in each]
        rows[name] = [row for part, _ in parts for row in part]
        counts[name] = counted(count for _, count in parts)
    return EncodedCalibration(rows, counts)


def counted(parts: Iterable[RowCounts]) -> RowCounts:
    """What became of the rows of all of an expert's sources; there is at least one."""
    first, *others = parts
    return sum(others, first)


# ---- rows as they are --------------------------------------------------------------------------


def _fitted(one: RowSet, rules: TokenRules, expert: str) -> tuple[list[TokenRow], RowCounts]:
    """The rows of a source, none longer than allowed."""
    wanted, context = one.source.limit, rules.context
    allowed = min((limit for limit in (wanted, context) if limit is not None), default=None)
    rows = []
    cut = too_long = 0
    for row in _tokenised(one, rules, expert):
        if allowed is not None and len(row.ids) > allowed:
            cut += 1
            too_long += wanted is None or allowed < wanted
            row = _cut(row, allowed, rules.pads_left)
        rows.append(row)
    if too_long:
        warnings.warn(
            EPMQWarning(
                f"calibration of expert `{expert}`: {too_long} of {len(rows)} rows were cut to the "
                f"model's {context} tokens.",
                code="EPMQ-F25",
            ),
            stacklevel=4,
        )
    return rows, RowCounts(
        asked=one.source.samples,
        available=one.available,
        used=len(rows),
        sequences=len(rows),
        tokens=sum(len(row.visible) for row in rows),
        cut=cut,
        blank=one.blank,
    )


def _cut(row: TokenRow, length: int, keep_end: bool) -> TokenRow:
    kept = slice(-length, None) if keep_end else slice(length)
    mask = None if row.mask is None else row.mask[kept]
    return TokenRow(row.ids[kept], mask if mask is not None and 0 in mask else None)


def _tokenised(one: RowSet, rules: TokenRules, expert: str) -> Iterator[TokenRow]:
    for row in one.rows:
        ids = row.value if row.kind == "input_ids" else _token_ids(row, rules, expert)
        check_vocabulary(row, ids, rules, expert)
        yield TokenRow(ids, row.mask)


def _token_ids(row: Row, rules: TokenRules, expert: str) -> list[int]:
    """As GPTQModel does it: the template makes a text of a chat, and a text has special tokens."""
    tokenizer, text, subject = rules.tokenizer, row.value, f"expert `{expert}`"
    if tokenizer is None:
        raise _no_tokenizer(row.place, expert)
    if row.kind == "messages":
        if getattr(tokenizer, "chat_template", None) is None:
            raise bad_row(
                row.place,
                "the row holds `messages`, and the merged model's tokenizer has no chat template",
                subject,
                "Give `text` rows, or add the template to the merged model.",
            )
        contents = [message["content"] for message in row.value]
        try:
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=False)
        except Exception as error:
            # Templates are programs: they raise what they like, mostly about the order of roles.
            cause = f"the merged model's chat template refuses it: {str(error).rstrip('.')}"
            raise bad_row(row.place, cause, subject, "Correct the messages.") from error
        if any(isinstance(each, (list, Mapping)) and str(each) in text for each in contents):
            cause = "the merged model's chat template takes no `content` in parts"
            raise bad_row(row.place, cause, subject, "Make each `content` one string.")
    return _special(text, row.place, rules, expert)


def encode_text(
    text: str, place: str, rules: TokenRules, expert: str, *, answer: bool = False
) -> list[int]:
    """Tokens of a text, the tokenizer's special ones included.

    Args:
        text: of a row.
        place: of the row, for errors.
        rules: of the merged model.
        expert: whose row it is.
        answer: whether it is the target of a pair.

    Raises:
        EPMQInputError: there is no tokenizer, or it makes something of it that the model cannot
            read.
    """
    if rules.tokenizer is None:
        raise _no_tokenizer(place, expert)
    ids = _special(text, place, rules, expert, answer=answer)
    check_vocabulary(Row("text", text, place), ids, rules, expert)
    return ids


def _no_tokenizer(place: str, expert: str) -> EPMQInputError:
    cause = "the merged model has no tokenizer to read text with"
    remedy = "Give token ids, or add the tokenizer to it."
    return bad_row(place, cause, f"expert `{expert}`", remedy)


def _special(
    text: str, place: str, rules: TokenRules, expert: str, *, answer: bool = False
) -> list[int]:
    subject = f"expert `{expert}`"
    if re.search("[\ud800-\udfff]", text):
        cause = "the text has half of a character in it, as after a cut inside of an emoji"
        raise bad_row(place, cause, subject, "Correct the text.")
    if answer:
        # GPTQModel's wrapper of a tokenizer wants a first argument.
        ids = rules.tokenizer(None, text_target=text, add_special_tokens=True)["input_ids"]
    else:
        ids = rules.tokenizer(text, add_special_tokens=True)["input_ids"]
    if not ids:
        cause = "the merged model's tokenizer makes no token of it"
        raise bad_row(place, cause, subject, "Take it out.")
    return list(ids)


def check_vocabulary(row: Row, ids: list[int], rules: TokenRules, expert: str) -> None:
    """Refuse tokens that the model has no embedding of.

    Raises:
        EPMQInputError: naming the token; of a text, the tokenizer is to blame.
    """
    if rules.vocabulary is None or max(ids) < rules.vocabulary:
        return
    if row.kind == "input_ids":
        raise bad_row(
            row.place,
            f"token id {max(ids)} has no embedding in the merged model, which has "
            f"{rules.vocabulary}",
            f"expert `{expert}`",
            "Make the ids with the merged model's tokenizer.",
        )
    raise EPMQInputError(
        f"{row.place}: the merged model's tokenizer makes token id {max(ids)} of it, and the model "
        f"has {rules.vocabulary} embeddings.",
        code="EPMQ-F05",
        subject="the merged model",
        remedy="Give it the tokenizer that it was merged with.",
    )


# ---- rows joined into blocks -------------------------------------------------------------------


def _joined(one: RowSet, rules: TokenRules, expert: str) -> tuple[list[TokenRow], RowCounts]:
    """Blocks of exactly ``seqlen`` tokens of a source's rows, one after another."""
    length, wanted = one.source.limit, one.source.samples
    _check_block(length, rules, expert)
    blocks: list[TokenRow] = []
    starts: list[int] = []  # of the rows, in the stream of all tokens
    stream: list[int] = []  # its end, what is in no block yet
    last = None
    for row in _tokenised(one, rules, expert):
        if last not in (None, rules.separator):
            stream += rules.separator
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


def _check_block(length: int, rules: TokenRules, expert: str) -> None:
    if rules.context is not None and length > rules.context:
        raise EPMQInputError(
            f"calibration of expert `{expert}`: `seqlen` asks for blocks of {length} tokens, the "
            f"model takes {rules.context}.",
            code="EPMQ-F25",
            subject="`seqlen`",
            remedy=f"Set it to {rules.context} or less.",
        )


def _check_blocks(one: RowSet, made: int, tokens: int, expert: str) -> None:
    length, wanted = one.source.limit, one.source.samples
    if made >= (wanted or 1):
        return
    asked = "one block" if wanted is None else f"`samples` asks for {wanted} blocks"
    raise EPMQInputError(
        f"calibration of expert `{expert}` ({one.source.label}): {asked} of {length} tokens, the "
        f"{one.available} rows have {tokens} tokens, which make {made}.",
        code="EPMQ-F24",
        subject=f"expert `{expert}`",
        remedy="Add rows, or lower `samples` or `seqlen`.",
    )
