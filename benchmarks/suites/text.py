"""``text4``: the demo's four domains on the demo's small Llama.

Two are text (code, prose) and are scored by next tokens, two are problems (arithmetic, sorting) and
are scored by whole answers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerFast

from epmq_gptq.evaluation.demo.domains import DOMAINS, GENERATED, documents, problems
from epmq_gptq.evaluation.demo.rows import Row, problem_rows, score, text_rows
from epmq_gptq.evaluation.demo.train import plan_of

from .suite import Score, Suite, device_of

EVALUATION_ROWS = 64


def rows(
    tokenizer: PreTrainedTokenizerFast, task: str, split: str, seed: int, count: int, length: int
) -> list[Row]:
    """Rows of a domain. The demo has no held-out split: it is cut from that for calibration."""
    theirs = "calibration" if split == "held_out" else split
    if task in GENERATED:
        source = (p for p in problems(task, theirs, seed) if _belongs(p.prompt, split))
        return problem_rows(tokenizer, source, count, length)
    return text_rows(tokenizer, _texts(task, theirs, split, seed), count, length)


def _texts(task: str, theirs: str, split: str, seed: int) -> Iterator[str]:
    texts = [text for text in documents(task, theirs) if _belongs(text, split)]
    random.Random(f"{task}:{split}:{seed}").shuffle(texts)
    yield from texts


def _belongs(text: str, split: str) -> bool:
    if split not in ("calibration", "held_out"):
        return True
    # The library's texts differ in length: this sixth leaves 256 calibration rows of each.
    return (zlib.crc32(text.encode()) % 6 == 1) == (split == "held_out")


@dataclass(frozen=True)
class Text4(Suite):
    """Two texts and two kinds of problems; accuracy is of next tokens, and of whole answers."""

    name: ClassVar[str] = "text4"
    kind: ClassVar[str] = "text"
    tasks: ClassVar[tuple[str, ...]] = DOMAINS

    def calibration(self, samples: int, *, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
        """Task → rows ``{"input_ids": [...]}``; of a text fewer where there are no more."""
        return {
            task: [{"input_ids": list(row.ids)} for row in self._rows(task, "calibration", samples,
                                                                      seed)]
            for task in self.tasks
        }  # fmt: skip

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """That all of its models share."""
        return _tokenizer(self.base)

    def _rows(self, task: str, split: str, count: int, seed: int = 0) -> list[Row]:
        length = plan_of(self.seed, self.quick).row_length
        return rows(self.tokenizer, task, split, 1000 * self.seed + seed, count, length)

    def _score(self, model: torch.nn.Module, task: str, split: str, batch_size: int) -> Score:
        asked = self._rows(task, split, 8 if self.quick else EVALUATION_ROWS)
        found = score(_on(model), asked, self.tokenizer.pad_token_id, min(batch_size, 16))
        return Score(100 * found.accuracy, found.loss, sum(len(row.spans) for row in asked))


def _on(model: torch.nn.Module):
    """The model as ``score`` calls it: ids go to its device, logits come back."""
    device = device_of(model)

    def call(input_ids: torch.Tensor, use_cache: bool):
        out = model(input_ids=input_ids.to(device), use_cache=use_cache)
        out.logits = out.logits.cpu()
        return out

    return call


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)
