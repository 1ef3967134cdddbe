"""Rows per expert → batches that each belong to exactly one expert.

The host sorts, concatenates and drops rows of one flat list; a row must never lose its expert, so
every expert's rows are batched apart and the batches carry the expert's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import EPMQInputError
from ..io.declared import bad_option, is_count
from .draws import read_calibration
from .encoded import EncodedCalibration, InputRules, RowCounts
from .images import ImageRules
from .pairs import PairRules
from .rows import IMAGES, PAIRS, form_of
from .text import TokenRow, TokenRules

# As GPTQModel has it: how the rows of an expert are ordered before they are batched.
SORTS = (None, "asc", "desc")


@dataclass
class CalibrationPlan:
    """The batches of a run, in order, and the expert each belongs to.

    Attributes:
        batches: arguments of the model's forward: ``input_ids`` (int64) and ``attention_mask``
            (bool), ``(B, S)`` each; without the mask where the model takes none. Of images
            ``pixel_values: (B, C, H, W)``, of pairs the same two and their ``decoder_`` twins.
        experts: the expert of each batch.
        rows: sequences per expert.
        tokens: calibration tokens per expert, padding left out.
        counts: what became of every expert's rows.
        positions: tokens of an image.
        held_out: whether a batch is kept apart, to choose options with.
    """

    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    counts: dict[str, RowCounts] = field(default_factory=dict)
    positions: int = 1
    held_out: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.held_out = self.held_out or [False] * len(self.batches)

    def add(
        self, expert: str, batches: Sequence[dict[str, torch.Tensor]], *, held_out: bool
    ) -> None:
        """More batches of an expert."""
        self.batches += batches
        self.experts += [expert] * len(batches)
        self.held_out += [held_out] * len(batches)

    def split(self, batch_size: int) -> CalibrationPlan:
        """The same rows, padded as they are, in batches of at most ``batch_size``."""
        plan = replace(self, batches=[], experts=[], held_out=[])
        for batch, expert, held_out in zip(self.batches, self.experts, self.held_out, strict=True):
            rows = len(next(iter(batch.values())))
            starts = range(0, rows, batch_size)
            parts = [
                {name: tensor[start : start + batch_size] for name, tensor in batch.items()}
                for start in starts
            ]
            plan.add(expert, parts, held_out=held_out)
        return plan

    def __len__(self) -> int:
        return sum(self.rows.values())

    @property
    def host_batches(self) -> list[dict[str, torch.Tensor]]:
        """:attr:`batches` for GPTQModel, which counts the tokens of ``input_ids`` in each.

        Images have none; theirs are zeros, one for each position, and no model may be given them.
        """
        return [_with_ids(batch, self.positions) for batch in self.batches]

    @property
    def calibration(self) -> dict[str, dict[str, Any]]:
        """:attr:`counts` as plain data, for reports."""
        return {name: asdict(counts) for name, counts in self.counts.items()}


def split_rows(value: Any, sizes: Sequence[int]) -> list[Any]:
    """What was kept of a batch, for each of the smaller batches that it is split into.

    Args:
        value: tensors ``(B, ...)``, and lists, tuples and dicts of them. Others are shared by all.
        sizes: rows of the smaller batches; their sum is B.
    """
    if torch.is_tensor(value):
        # Of one axis are positions of tokens, never rows.
        if value.dim() < 2 or len(value) != sum(sizes) or len(sizes) == 1:
            return [value] * len(sizes)
        return [part.clone() for part in value.split(list(sizes))]
    if isinstance(value, (list, tuple)):
        parts = [split_rows(one, sizes) for one in value]
        return [type(value)(part[i] for part in parts) for i in range(len(sizes))]
    if isinstance(value, dict):
        split = {key: split_rows(one, sizes) for key, one in value.items()}
        return [{key: parts[i] for key, parts in split.items()} for i in range(len(sizes))]
    return [value] * len(sizes)


def _with_ids(batch: dict[str, torch.Tensor], positions: int) -> dict[str, torch.Tensor]:
    if "input_ids" in batch:
        return batch
    rows = len(batch["pixel_values"])
    return batch | {"input_ids": torch.zeros((rows, positions), dtype=torch.long)}


# ---- what a model reads --------------------------------------------------------------------------


def input_rules(model: Any) -> InputRules:
    """What a model that GPTQModel loaded asks of its inputs; its weights may still be on disk.

    Raises:
        EPMQInputError: its image processor cannot be loaded, or its configuration lacks something.
    """
    config = model.model.config
    if form_of(config) is IMAGES:
        rules = ImageRules.of(config, Path(str(model.model_local_path)), model.tokenizer)
        # A text tower that is not quantized needs no texts, whatever the rows hold.
        reads_text = getattr(model, "reads_text", False)
        return replace(rules, needs_text=True) if reads_text else replace(rules, text=None)
    if form_of(config) is PAIRS:
        return PairRules.of(config, model.tokenizer)
    try:
        embedding = model.model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    rows = getattr(embedding, "num_embeddings", None)
    return TokenRules.of_config(config, model.tokenizer, rows)


def folder_rules(folder: Path) -> InputRules:
    """The same of a model's folder, without the model.

    Raises:
        EPMQInputError: as :func:`input_rules`, or the configuration cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    tokenizer = None
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    form = form_of(config)
    if form is IMAGES:
        return ImageRules.of(config, folder, tokenizer)
    if form is PAIRS:
        return PairRules.of(config, tokenizer)
    return TokenRules.of_config(config, tokenizer)


# ---- batches -------------------------------------------------------------------------------------


def plan_for_folder(
    folder: Path,
    calibration: Any,
    experts: Sequence[str],
    *,
    batch_size: int = 1,
    seed: int = 0,
    base_folder: Path = Path(),
) -> CalibrationPlan:
    """Batches of a calibration for the model in a folder, without that model.

    Args:
        folder: of a model with its configuration and tokenizer or image processor.
        calibration: in any form, see ``read_calibration``; or what was encoded already.
        experts: their names.
        batch_size: rows per batch, at most.
        seed: of the draws.
        base_folder: what relative paths are relative to.

    Raises:
        EPMQInputError: as of reading, encoding and batching the rows.
    """
    rules = folder_rules(folder)
    if not isinstance(calibration, EncodedCalibration):
        sets = read_calibration(
            calibration, experts, seed=seed, folder=base_folder, form=rules.form
        )
        calibration = rules.encode(sets)
    calibration.check_experts(experts)
    return plan_inputs(calibration, rules, batch_size=batch_size)


def plan_inputs(
    calibration: EncodedCalibration,
    rules: InputRules,
    *,
    batch_size: int,
    sort: str | None = None,
    pad: bool = True,
    masked: bool = True,
    held_out: float = 0.0,
) -> CalibrationPlan:
    """Batch every expert's rows apart, experts in the order of ``calibration``.

    Args:
        calibration: what ``rules.encode`` returned.
        rules: of the model.
        batch_size: rows per batch, at most.
        sort: "asc" or "desc" by length within an expert; None keeps the order.
        pad, masked: of text, see :meth:`~epmq_gptq.calibration.encoded.InputRules.batches`.
        held_out: share of every expert's rows that is batched apart from the others.

    Raises:
        EPMQInputError: an option is out of range, the rows are of another form than the model's,
            or a row hides tokens where that means nothing.
    """
    if calibration.form != rules.form.name:
        raise EPMQInputError(
            f"`calibration` holds rows of {calibration.form}, the model reads {rules.form.name}.",
            code="EPMQ-F32",
            subject="`calibration`",
            remedy="Read the rows with this model's rules.",
        )
    if not is_count(batch_size):
        raise bad_option("batch_size", "a positive integer", batch_size)
    if sort not in SORTS:
        raise bad_option("calibration_sort", 'None, "asc" or "desc"', sort)
    plan = CalibrationPlan(counts=dict(calibration.counts), positions=rules.positions)
    for name, rows in calibration.rows.items():
        if not (pad and masked):
            _check_nothing_hidden(rows, name)
        if sort is not None:
            rows = sorted(rows, key=lambda row: row.length, reverse=sort == "desc")
        tokens = 0
        for part, apart in _parts(rows, held_out):
            batches = list(rules.batches(part, batch_size, pad=pad, masked=masked))
            tokens += sum(count for _, count in batches)
            plan.add(name, [batch for batch, _ in batches], held_out=apart)
        # Our own arithmetic: no row is lost on the way from the counts to the model.
        assert tokens == calibration.counts[name].tokens, name
        plan.rows[name], plan.tokens[name] = len(rows), tokens
    return plan


def _parts(rows: Sequence[Any], share: float) -> Iterator[tuple[Sequence[Any], bool]]:
    """The rows that are fitted to, then those held out: every k-th, so of all lengths and sources.

    One row of two is the least that is fitted to, and of a single row none is held out.
    """
    every = max(2, round(1 / share)) if share else len(rows) + 1
    apart = set(range(every - 1, len(rows), every))
    if share and len(rows) > 1 and not apart:
        apart = {len(rows) - 1}
    yield [row for index, row in enumerate(rows) if index not in apart], False
    if apart:
        yield [rows[index] for index in sorted(apart)], True


def _check_nothing_hidden(rows: Sequence[Any], expert: str) -> None:
    hidden = sum(isinstance(row, TokenRow) and row.mask is not None for row in rows)
    if hidden:
        raise EPMQInputError(
            f"calibration of expert `{expert}`: `attention_mask` hides tokens inside of {hidden} "
            "rows, and parts of this model see no mask: these tokens would count as data.",
            code="EPMQ-F32",
            subject=f"expert `{expert}`",
            remedy="Take the hidden tokens out of the rows.",
        )
