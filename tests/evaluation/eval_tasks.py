"""Own tasks for lm-eval, with data in local files: what `--include-path` is for."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

TASKS = ("tiny_choice", "tiny_perplexity", "tiny_answer")
CHOICES = [" one", " two!", " three"]


def rows(count: int = 6) -> list[dict]:
    return [
        {
            "question": f"Which is {index}?",
            "choices": CHOICES,
            "gold": index % 3,
            "text": f"line {index} of a text that is long enough",
            "answer": "a",
        }
        for index in range(count)
    ]


def write_tasks(folder: Path, count: int = 6) -> Path:
    """YAML files of three tasks and their data; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows(count)), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    perplexity = {
        "task": "tiny_perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    answer = {
        "task": "tiny_answer",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, perplexity, answer):
        file = folder / f"{task['task']}.yaml"
        file.write_text(yaml.safe_dump(common | task, sort_keys=False), encoding="utf-8")
    return folder
