"""FLAN-T5 on GLUE as FusionBench does it: its prompts, answers generated, exact match.

Its prompts and preprocessors are used as they are; its two evaluation functions are not. They call
``generate`` without a mask, and transformers 5.19 infers one for decoder-only models alone (4.x did
for all): the encoder would read the padding as text, and answers would depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .data import Score, commit_of, draw, load_split
from .specs import GLUE

# As T5 was trained; the tokenizer of the hub says the same.
LONGEST = 512
# Tokens of an answer, the start token included.
LONGEST_ANSWER = 10


def preprocessor(task: str, tokenizer: Any, padding: str = "longest") -> Any:
    """FusionBench's preprocessor of a task: columns of a batch → ``input_ids`` and ``labels``.

    Args:
        padding: "longest" of the batch. FusionBench pads to 512 tokens; the mask hides them, so
            that the answers are the same and take a fraction of the time.
    """
    from fusion_bench.tasks.flan_t5_text_generation.glue_preprocessors import glue_processors
    from fusion_bench.tasks.flan_t5_text_generation.glue_prompt_templates import (
        glue_prompt_templates,
    )

    options = {
        "padding": padding,
        "truncation": True,
        "max_length": LONGEST,
        "return_tensors": "pt",
    }
    return glue_processors[task](
        template=glue_prompt_templates[task], tokenizer=tokenizer, tokenizer_kwargs=options
    )


def token_pair(task: str, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """The tokens of a row's prompt and answer, as a calibration row; cut as in the evaluation."""
    columns = {name: value for name, value in row.items() if name != "idx"}
    text, target = preprocessor(task, tokenizer).preprocess(**columns)
    ids, labels = (
        tokenizer(part, truncation=True, max_length=LONGEST)["input_ids"] for part in (text, target)
    )
    return {"input_ids": ids, "labels": labels}


@dataclass
class GlueBench:
    """The GLUE tasks of FLAN-T5.

    Attributes:
        whole: folder of the base, with its tokenizer.
        limit: rows per task, None for all.
    """

    whole: Path
    tasks: tuple[str, ...]
    device: str
    batch_size: int = 32
    limit: int | None = None
    workers: int = 0
    seqlen: int | None = None
    padding: str = "longest"
    _tokenizer: Any = field(default=None, repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """What is scored."""
        return self.tasks

    @property
    def tokenizer(self) -> Any:
        """The base's; all experts share it."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.whole)
        return self._tokenizer

    def datasets(self) -> dict[str, str | None]:
        """Dataset → commit."""
        return {GLUE[task].path: commit_of(GLUE[task]) for task in self.tasks}

    def calibration(self, samples: int, seed: int) -> dict[str, list[dict[str, list[int]]]]:
        """Task → pairs of the training split."""
        rows = {}
        for task in self.tasks:
            data = load_split(GLUE[task], GLUE[task].train)
            picked = draw(len(data), samples, seed, task)
            rows[task] = [token_pair(task, data[index], self.tokenizer) for index in picked]
        return rows

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, tasks: Iterable[str]) -> dict[str, Score]:
        """Exact match in per cent; of STS-B 100 · Spearman's rho, answers that are no number as 0.

        Args:
            model: on ``device``.
            tasks: some of ``tasks``.
        """
        return {task: self._score(model, task) for task in tasks}

    def _score(self, model: torch.nn.Module, task: str) -> Score:
        data = load_split(GLUE[task], GLUE[task].test)
        if self.limit is not None and self.limit < len(data):
            data = data.select(sorted(draw(len(data), self.limit, 0, task)))
        said, wanted = [], []
        prepare = preprocessor(task, self.tokenizer, self.padding)
        for start in range(0, len(data), self.batch_size):
            batch = prepare(data[start : start + self.batch_size])
            generated = model.generate(
                input_ids=batch["input_ids"].to(self.device),
                attention_mask=batch["attention_mask"].to(self.device),
                max_length=LONGEST_ANSWER,
                do_sample=False,
            )
            said += self.tokenizer.batch_decode(generated, skip_special_tokens=True)
            labels = batch["labels"].masked_fill(batch["labels"] < 0, self.tokenizer.pad_token_id)
            wanted += self.tokenizer.batch_decode(labels, skip_special_tokens=True)
        score = spearman(said, wanted) if task == "stsb" else exact_match(said, wanted)
        return Score(score, len(data))


def exact_match(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Answers that equal the target, character by character, in per cent."""
    return 100 * sum(map(str.__eq__, said, wanted)) / len(wanted)


def spearman(said: Sequence[str], wanted: Sequence[str]) -> float:
    """100 · Spearman's rho of two lists of numbers as text; what is no number counts as 0.

    Answers that are all alike have no ranks to correlate: 0.
    """
    from scipy.stats import spearmanr

    numbers = [[_number(text) for text in texts] for texts in (said, wanted)]
    if any(len(set(each)) == 1 for each in numbers):
        return 0.0
    return 100 * float(spearmanr(*numbers)[0])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
