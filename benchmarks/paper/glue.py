"""FLAN-T5 on GLUE as FusionBench does it: its prompts, answers generated, exact match.

Its prompts and preprocessors are used as they are; its two evaluation functions are not. They call
``generate`` without a mask, and transformers 5.19 infers one for decoder-only models alone (4.x did
for all): the encoder would read the padding as text, and answers would depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .data import Bench, Score
from .specs import GLUE, DatasetSpec

# As T5 was trained; the tokenizer of the hub says the same.
LONGEST = 512
# Tokens of an answer, the start token included.
LONGEST_ANSWER = 10


def preprocessor(task: str, tokenizer: Any) -> Any:
    """FusionBench's preprocessor of a task: columns of a batch → ``input_ids`` and ``labels``."""
    from fusion_bench.tasks.flan_t5_text_generation.glue_preprocessors import glue_processors
    from fusion_bench.tasks.flan_t5_text_generation.glue_prompt_templates import (
        glue_prompt_templates,
    )

    # FusionBench pads to 512 tokens; the mask hides them, so that the answers are the same as here,
    # and take a fraction of the time.
    options = {
        "padding": "longest",
        "truncation": True,
        "max_length": LONGEST,
        "return_tensors": "pt",
    }
    return glue_processors[task](
        template=glue_prompt_templates[task], tokenizer=tokenizer, tokenizer_kwargs=options
    )


def token_pair(task: str, row: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """The tokens of a row's prompt and answer, as a calibration row; cut as in the evaluation."""
    columns = {name: value for name, value in row.items() if name != "idx"}
    text, target = preprocessor(task, tokenizer).preprocess(**columns)
    ids, labels = (
        tokenizer(part, truncation=True, max_length=LONGEST)["input_ids"] for part in (text, target)
    )
    return {"input_ids": ids, "labels": labels}


class GlueBench(Bench):
    """The GLUE tasks of FLAN-T5."""

    def spec(self, task: str) -> DatasetSpec:
        return GLUE[task]

    def row(self, task: str, item: Mapping[str, Any]) -> dict[str, Any]:
        return token_pair(task, item, self.tokenizer)

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, columns: Iterable[str]) -> dict[str, Score]:
        """Exact match in per cent; of STS-B 100 · Spearman's rho, what is no number as 0."""
        return {task: self._score(model, task) for task in columns}

    def _score(self, model: torch.nn.Module, task: str) -> Score:
        data = self.scored_rows(task)
        said, wanted = [], []
        prepare = preprocessor(task, self.tokenizer)
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
