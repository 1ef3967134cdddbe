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
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from .suite import SPLITS, Score, Suite, device_of
from .training import Progress, Schedule, train_family

EVALUATION_ITEMS = 200
QUICK_ITEMS = 40
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
IGNORED = -100  # torch's and transformers' own ignore_index
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Per cent of the questions that belong to each split.
_SHARES = {"train": 70, "calibration": 15, "held_out": 5, "evaluation": 10}


# ---- questions ---------------------------------------------------------------------------------


def _word(rng: random.Random, length: int, letters: str = _LETTERS) -> str:
    return "".join(rng.choices(letters, k=length))


def _sort(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 6)
    return f"sort: {word}", "".join(sorted(word))


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 3)
    return f"reverse: {word}", word[::-1]


def _next(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 3, _LETTERS[:-1])
    return f"next: {word}", "".join(chr(ord(letter) + 1) for letter in word)


def _count(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 9, "abcd")
    return f"count: {word}", "".join(str(word.count(letter)) for letter in "abcd")


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "sort": _sort,
    "reverse": _reverse,
    "next": _next,
    "count": _count,
}
TASKS = tuple(_MAKERS)


def split_of(question: str) -> str:
    """The one split that a question belongs to."""
    place = zlib.crc32(question.encode()) % 100
    for split, share in _SHARES.items():
        place -= share
        if place < 0:
            return split
    raise AssertionError(SPLITS)


def questions(task: str, split: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless questions of a task with their answers; one may come again."""
    rng = random.Random(f"{task}:{split}:{seed}")
    while True:
        question, answer = _MAKERS[task](rng)
        if split_of(question) == split:
            yield question, answer


# ---- tokens ------------------------------------------------------------------------------------


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and T5's end after each text."""
    vocabulary = {PAD: 0, EOS: 1, UNKNOWN: 2}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN
    )


class Batch(NamedTuple):
    """Items as tokens, padded on the right.

    Attributes:
        ids: ``(B, S)`` int64, of the questions.
        mask: ``(B, S)`` int64, 1 where a question has a token.
        labels: ``(B, T)`` int64, of the answers, ``IGNORED`` after their end.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def part(self, chosen: slice | torch.Tensor) -> Batch:
        """Some of the items, without the columns that are padding in all of them."""
        ids, mask, labels = (each[chosen] for each in self)
        width, length = int(mask.sum(1).max()), int((labels != IGNORED).sum(1).max())
        return Batch(ids[:, :width], mask[:, :width], labels[:, :length].contiguous())

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(each.to(device) for each in self))


def encoded(tokenizer: PreTrainedTokenizerFast, items: Sequence[tuple[str, str]]) -> Batch:
    """Questions with their answers as one batch."""
    asked = tokenizer([question for question, _ in items], padding=True, return_tensors="pt")
    answers = tokenizer([answer for _, answer in items], padding=True, return_tensors="pt")
    labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, IGNORED)
    return Batch(asked["input_ids"], asked["attention_mask"], labels)


# ---- the suite ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairsPlan:
    """Everything that decides the models of ``seq2seq4``."""

    seed: int = 0
    hidden_size: int = 128
    head_size: int = 32
    heads: int = 4
    intermediate_size: int = 256
    layers: int = 3  # of the encoder, and of the decoder
    train_items: int = 8000  # of a task
    base: Schedule = Schedule(steps=400, lr=2e-3, batch_size=96)
    # The rows of a batch in turn: sorting and counting need no places, so they are learned first.
    base_mix: tuple[str, ...] = ("sort", "reverse", "next", "reverse", "next", "count")
    expert: Schedule = Schedule(steps=250, lr=1e-3, batch_size=64)
    # Of an expert's batch, every n-th row is from any task; 0 for none. Chosen on held-out items of
    # seed 0 by base (63.1 %), experts (95.5) and merges alone: average 74.5, task arithmetic 76.9,
    # TIES 71.6. Without such rows, from a base of 600 steps, the average fell 23 points below it.
    replay: int = 3


QUICK = {
    "hidden_size": 64,
    "head_size": 32,
    "heads": 2,
    "intermediate_size": 64,
    "layers": 1,
    "train_items": 400,
    "base": Schedule(steps=40, lr=3e-3, batch_size=32),
    "expert": Schedule(steps=20, lr=3e-3, batch_size=32),
}


@dataclass(frozen=True)
class Seq2Seq4(Suite):
    """Four text-to-text tasks; accuracy is exact match of the greedy answer."""

    name: ClassVar[str] = "seq2seq4"
    kind: ClassVar[str] = "pairs"
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def calibration(self, samples: int, *, seed: int = 0) -> dict[str, list[dict[str, str]]]:
        """Task → rows ``{"text": question, "target": answer}``."""
        return {
            task: [
                {"text": question, "target": answer}
                for question, answer in self._items(task, "calibration", samples, seed)
            ]
            for task in self.tasks
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """That all of its models share."""
        return _tokenizer(self.base)

    def items(self, task: str, split: str) -> list[tuple[str, str]]:
        """The questions that :meth:`evaluate` asks, and their answers."""
        return self._items(task, split, QUICK_ITEMS if self.quick else EVALUATION_ITEMS)

    def _items(self, task: str, split: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
        return list(islice(questions(task, split, 1000 * self.seed + seed), count))

    def _score(self, model: torch.nn.Module, task: str, split: str, batch_size: int) -> Score:
        # A greedy answer is right exactly where every token is the likeliest after the right ones
        # before it: one pass over the whole answer decides it, and gives the loss as well.
        everything = encoded(self.tokenizer, self.items(task, split))
        count, device = len(everything.ids), device_of(model)
        loss = tokens = right = 0.0
        for start in range(0, count, batch_size):
            batch = everything.part(slice(start, start + batch_size)).to(device)
            logits, counted = _logits(model, batch), batch.labels != IGNORED
            loss += _loss(logits, batch.labels, "sum").item()
            tokens += int(counted.sum())
            right += int(((logits.argmax(-1) == batch.labels) | ~counted).all(1).sum())
        return Score(100 * right / count, loss / tokens, count)


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """``(B, T, V)`` fp32: what is expected at each place of the right answers."""
    return model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits.float()


def _loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def new_model(plan: PairsPlan, tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """A freshly initialised base, shaped as FLAN-T5: gated feed-forward, a head of its own."""
    torch.manual_seed(plan.seed)
    model = T5ForConditionalGeneration(
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
    # transformers draws the head from N(0, 1): a first loss of 50 nats, and 100 steps to undo it.
    with torch.no_grad():
        model.lm_head.weight *= plan.hidden_size**-0.5
    return model


def train(plan: PairsPlan, out: Path, device: torch.device, progress: Progress) -> None:
    """Train the base and the experts of a plan and save them."""
    tokenizer = new_tokenizer()
    asked = [
        list(islice(questions(task, "train", 1000 * plan.seed), plan.train_items)) for task in TASKS
    ]
    # One batch of everything: the tasks stand one after the other.
    data = encoded(tokenizer, [item for items in asked for item in items])

    def loss_of(
        task: str | None, schedule: Schedule
    ) -> Callable[[torch.nn.Module, int], torch.Tensor]:
        mix = plan.base_mix if task is None else (task,)
        numbers = torch.tensor([TASKS.index(name) for name in mix])
        numbers = numbers.repeat(-(-schedule.batch_size // len(mix)))[: schedule.batch_size]
        generator = torch.Generator().manual_seed(plan.seed)

        def loss(model: torch.nn.Module, step: int) -> torch.Tensor:
            if task is not None and plan.replay:
                others = numbers[:: plan.replay]  # a view
                others[:] = torch.randint(len(TASKS), others.shape, generator=generator)
            places = torch.randint(plan.train_items, numbers.shape, generator=generator)
            batch = data.part(numbers * plan.train_items + places).to(device)
            return _loss(_logits(model, batch), batch.labels)

        return loss

    def save(model: torch.nn.Module, name: str) -> None:
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)

    base = new_model(plan, tokenizer).to(device)
    train_family(base, TASKS, (plan.base, plan.expert), loss_of, save, progress)
