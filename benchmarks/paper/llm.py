"""Merged language models on lm-eval's tasks, calibrated on MergeBench's validation sets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from epmq_gptq.errors import EPMQInputError

from .data import Bench, Score
from .specs import LM_TASKS, MERGEBENCH, RUNS_CODE, DatasetSpec


class LanguageBench(Bench):
    """Table 4: what is merged are domains of MergeBench, what is scored are lm-eval's tasks."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Without permission to run code (HumanEval, MBPP+), four of the six."""
        return tuple(name for name in LM_TASKS if self.runs_code or name not in RUNS_CODE)

    def spec(self, task: str) -> DatasetSpec:
        return MERGEBENCH[task][0]

    def row(self, task: str, item: Mapping[str, Any]) -> dict[str, list[int]]:
        """Token ids, at most ``seqlen``, under the chat template."""
        _, question, answer = MERGEBENCH[task]
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(f"{item[question]}\n{item[answer]}")["input_ids"]
        else:
            chat = [
                {"role": "user", "content": item[question]},
                {"role": "assistant", "content": item[answer]},
            ]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids[: self.seqlen]}

    def evaluate(self, model: torch.nn.Module, columns: Iterable[str]) -> dict[str, Score]:
        """Scores of lm-eval in per cent.

        Raises:
            EPMQInputError: a version of lm-eval that names a task or a metric otherwise.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        names = list(columns)
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
