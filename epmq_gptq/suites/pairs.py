"""``seq2seq4``: four text-to-text tasks on a small T5.

A prefix says what is asked for, as in FLAN's prompts; an item is right if the generated answer is
exactly the expected one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from .suite import SPLITS, Progress, Score, Suite, device_of
from .training import Schedule, train_family

EVALUATION_ITEMS = 150
ANSWER_TOKENS = 8  # of the longest answer, its end included
_LETTERS = "abcdefghij"
_IGNORED = -100
# Per mille of the questions that belong to each split.
_SHARES = {"train": 700, "calibration": 150, "held_out": 50, "evaluation": 100}


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.choices(_LETTERS, k=5))
    return f"reverse: {word}", word[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = rng.choices("0123456789", k=5)
    return f"sort: {''.join(digits)}", "".join(sorted(digits))


def _shift(rng: random.Random) -> tuple[str, str]:
    word = rng.choices(_LETTERS, k=5)
    return f"next: {''.join(word)}", "".join(chr(ord(letter) + 1) for letter in word)


def _count(rng: random.Random) -> tuple[str, str]:
    word = rng.choices("abc", k=7)
    return f"count: {''.join(word)}", "".join(str(word.count(letter)) for letter in "abc")


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": _reverse,
    "sort": _sort,
    "next": _shift,
    "count": _count,
}
TASKS = tuple(_MAKERS)


def split_of(question: str) -> str:
    """The one split that a question belongs to."""
    place = zlib.crc32(question.encode()) % 1000
    for split, share in _SHARES.items():
        place -= share
        if place < 0:
            return split
    raise AssertionError(SPLITS)


def questions(task: str, split: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless questions of a task with their answers."""
    rng = random.Random(f"{task}:{split}:{seed}")
    while True:
        question, answer = _MAKERS[task](rng)
        if split_of(question) == split:
            yield question, answer


@dataclass(frozen=True)
class PairsPlan:
    """Everything that decides the models of ``seq2seq4``."""

    seed: int = 0
    hidden_size: int = 128
    head_size: int = 32
    heads: int = 4
    intermediate_size: int = 256
    layers: int = 2
    base: Schedule = Schedule(steps=500, lr=2e-3, batch_size=96)
    expert: Schedule = Schedule(steps=250, lr=1e-3, batch_size=64)


QUICK = {
    "hidden_size": 64,
    "head_size": 32,
    "heads": 2,
    "intermediate_size": 64,
    "layers": 1,
    "base": Schedule(steps=40, lr=3e-3, batch_size=32),
    "expert": Schedule(steps=20, lr=3e-3, batch_size=32),
}


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` of a batch, int64, padded on the right."""
    asked = tokenizer([question for question, _ in pairs], padding=True, return_tensors="pt")
    answers = tokenizer([answer for _, answer in pairs], padding=True, return_tensors="pt")
    labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, _IGNORED)
    return {
        "input_ids": asked["input_ids"],
        "attention_mask": asked["attention_mask"],
        "labels": labels,
    }


@dataclass(frozen=True)
class Seq2Seq4(Suite):
    """Four text-to-text tasks; accuracy is exact match of the greedy answer."""

    name: ClassVar[str] = "seq2seq4"
    kind: ClassVar[str] = "pairs"
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def calibration(self, samples: int, *, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
        """Task → rows ``{"text": question, "target": answer}``."""
        return {
            task: [
                {"text": question, "target": answer}
                for question, answer in self._items(task, "calibration", samples, seed)
            ]
            for task in self.tasks
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That all of its models share."""
        return _tokenizer(self.base)

    def _items(self, task: str, split: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
        return list(islice(questions(task, split, 1000 * self.seed + seed), count))

    def _score(self, model: torch.nn.Module, task: str, split: str, batch_size: int) -> Score:
        asked = self._items(task, split, 24 if self.quick else EVALUATION_ITEMS)
        device = device_of(model)
        loss = tokens = right = 0.0
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            batch = {name: t.to(device) for name, t in encode(self.tokenizer, part).items()}
            labels = batch["labels"]
            logits = model(**batch).logits.float()
            loss += F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="sum"
            ).item()
            tokens += int((labels != _IGNORED).sum())
            answers = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                num_beams=1,
            )
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            right += sum(text == answer for text, (_, answer) in zip(texts, part, strict=True))
        return Score(100 * right / len(asked), loss / tokens, len(asked))


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def train(
    plan: PairsPlan, out: Path, device: torch.device, progress: Progress, cache: Path
) -> None:
    """Train the base and the experts of a plan and save them."""
    tokenizer = ByT5Tokenizer()  # bytes: it needs no vocabulary of its own

    def loss_of(
        task: str | None, schedule: Schedule
    ) -> Callable[[torch.nn.Module, int], torch.Tensor]:
        chosen = TASKS if task is None else (task,)
        sources = [questions(name, "train", 1000 * plan.seed) for name in chosen]

        def loss(model: torch.nn.Module, step: int) -> torch.Tensor:
            pairs = [next(sources[i % len(sources)]) for i in range(schedule.batch_size)]
            batch = {name: t.to(device) for name, t in encode(tokenizer, pairs).items()}
            return model(**batch).loss

        return loss

    def save(model: torch.nn.Module, name: str) -> None:
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)

    torch.manual_seed(plan.seed)
    base = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=plan.hidden_size,
            d_kv=plan.head_size,
            num_heads=plan.heads,
            d_ff=plan.intermediate_size,
            num_layers=plan.layers,
            num_decoder_layers=plan.layers,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    train_family(base.to(device), TASKS, (plan.base, plan.expert), loss_of, save, progress)
