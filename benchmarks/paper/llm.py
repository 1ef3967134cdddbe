"""Merged language models on lm-eval's tasks, calibrated on MergeBench's validation sets."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from epmq_gptq.errors import EPMQInputError

from .data import Score, commit_of, draw, load_split
from .specs import LM_TASKS, MERGEBENCH, RUNS_CODE


@dataclass
class LanguageBench:
    """Table 4: what is merged are domains, what is scored are lm-eval's tasks.

    Attributes:
        whole: folder of the base, with its tokenizer and chat template.
        tasks: domains of MergeBench.
        limit: items per task of lm-eval, None for all.
        runs_code: whether code that a model wrote may be run here (HumanEval, MBPP+).
    """

    whole: Path
    tasks: tuple[str, ...]
    device: str
    batch_size: int = 16
    limit: int | None = None
    workers: int = 0
    seqlen: int | None = 512
    runs_code: bool = False
    _tokenizer: Any = field(default=None, repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """What is scored: without permission to run code, four of the six."""
        return tuple(name for name in LM_TASKS if self.runs_code or name not in RUNS_CODE)

    @property
    def tokenizer(self) -> Any:
        """The base's."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.whole)
        return self._tokenizer

    def datasets(self) -> dict[str, str | None]:
        """Dataset → commit, of the calibration; lm-eval records those of its tasks."""
        specs = [MERGEBENCH[task][0] for task in self.tasks]
        return {spec.path: commit_of(spec) for spec in specs}

    def calibration(self, samples: int, seed: int) -> dict[str, list[dict[str, list[int]]]]:
        """Domain → rows of token ids, at most ``seqlen`` of each, under the chat template."""
        rows = {}
        for task in self.tasks:
            spec, question, answer = MERGEBENCH[task]
            data = load_split(spec, spec.train)
            picked = draw(len(data), samples, seed, task)
            rows[task] = [self._encoded(data[i][question], data[i][answer]) for i in picked]
        return rows

    def _encoded(self, question: str, answer: str) -> dict[str, list[int]]:
        chat = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(f"{question}\n{answer}")["input_ids"]
        else:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids[: self.seqlen]}

    def evaluate(self, model: torch.nn.Module, tasks: Iterable[str]) -> dict[str, Score]:
        """Scores of lm-eval in per cent.

        Args:
            model: on ``device``.
            tasks: columns.

        Raises:
            EPMQInputError: a version of lm-eval that names a task or a metric otherwise.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        names = list(tasks)
        if self.runs_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric `code_eval` asks for
        wrapped = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
        results = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=[LM_TASKS[name][0] for name in names],
            limit=self.limit,
            apply_chat_template=self.tokenizer.chat_template is not None,
            fewshot_as_multiturn=self.tokenizer.chat_template is not None,
            confirm_run_unsafe_code=self.runs_code,
        )
        return {name: _score(results, *LM_TASKS[name]) for name in names}


def _score(results: dict[str, Any], task: str, metric: str) -> Score:
    found = results["results"].get(task, {})
    if metric not in found:
        raise EPMQInputError(
            f"lm-eval's task `{task}` should report `{metric}`, got {', '.join(found) or 'nothing'}"
            ".",
            code="EPMQ-O01",
            subject=f"task `{task}`",
            remedy="Correct `LM_TASKS` in `paper/specs.py` for this version of lm-eval.",
        )
    return Score(100 * float(found[metric]), int(results["n-samples"][task]["effective"]))
