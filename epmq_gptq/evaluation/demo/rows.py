"""Token rows, the tokenizer that makes them, and how well a model predicts them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .domains import GENERATED, Problem, documents, problems
from .table import Score

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
IGNORED = -100  # torch's own ignore_index


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        ids: token ids, first one BOS.
        spans: half-open ranges of ``ids`` that are scored. A range counts as right if every token
            of it is predicted: an answer in a generated domain, a single token in a text.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def train_tokenizer(vocab_size: int, *, max_chars: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the train text; digits stay single, so that numbers can be computed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text[:max_chars] for name in ("code", "prose") for text in documents(name, "train")]
    # `sort` becomes a word of the vocabulary and the equals sign meets its digits.
    texts += [f"{p.prompt}{p.answer}\n" for p in islice(problems("sorting", "train", 0), 2000)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def text_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], count: int, length: int
) -> list[Row]:
    """``count`` rows of ``length`` tokens cut from ``texts``; every token but BOS is scored."""
    spans = tuple((i, i + 1) for i in range(1, length))
    rows: list[Row] = []
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(stream) >= length - 1 and len(rows) < count:
            rows.append(Row((tokenizer.bos_token_id, *stream[: length - 1]), spans))
            del stream[: length - 1]
        if len(rows) == count:
            break
    return rows


def problem_rows(
    tokenizer: PreTrainedTokenizerFast, source: Iterable[Problem], count: int, length: int
) -> list[Row]:
    """``count`` rows of whole problems, each at most ``length`` tokens; the answers are scored."""

    def encode(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    rows: list[Row] = []
    ids, spans = [tokenizer.bos_token_id], []
    for problem in source:
        # Encoded apart, as they are when a server completes the prompt.
        prompt, answer = encode(problem.prompt), encode(problem.answer + "\n")
        if len(ids) + len(prompt) + len(answer) > length:
            rows.append(Row(tuple(ids), tuple(spans)))
            if len(rows) == count:
                break
            ids, spans = [tokenizer.bos_token_id], []
        ids += prompt
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return rows


def domain_rows(
    tokenizer: PreTrainedTokenizerFast,
    domain: str,
    split: str,
    *,
    count: int,
    length: int,
    seed: int,
) -> list[Row]:
    """Rows of ``domain`` in ``split``: as many as asked, or all there are of a text."""
    if domain in GENERATED:
        return problem_rows(tokenizer, problems(domain, split, seed), count, length)
    texts = documents(domain, split)
    random.Random(f"{domain}:{split}:{seed}").shuffle(texts)
    return text_rows(tokenizer, texts, count, length)


def collate(rows: Iterable[Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as ``(ids, labels)``, both ``(B, T)`` int64, padded on the right.

    ``labels[b, t]`` is ``ids[b, t]`` where it is scored, else ``IGNORED``; not shifted.
    """
    rows = list(rows)
    length = max(len(row.ids) for row in rows)
    ids, labels = [], []
    for row in rows:
        tail = length - len(row.ids)
        scored = [IGNORED] * length
        for start, stop in row.spans:
            scored[start:stop] = row.ids[start:stop]
        ids.append([*row.ids, *[pad_id] * tail])
        labels.append(scored)
    return torch.tensor(ids), torch.tensor(labels)


@torch.inference_mode()
def score(model: torch.nn.Module, rows: Sequence[Row], pad_id: int, batch_size: int = 16) -> Score:
    """Score ``model`` (anything called with ``input_ids`` that returns ``logits``) on ``rows``."""
    total, tokens, right, spans = 0.0, 0, 0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, labels = collate(batch, pad_id)
        # Padding is on the right and attention is causal: no scored token sees it, no mask needed.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        targets = labels[:, 1:]
        total += F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        tokens += int((targets != IGNORED).sum())
        hits = logits.argmax(-1) == ids[:, 1:]  # hits[b, t] is about token t + 1
        for hit, row in zip(hits, batch, strict=True):
            right += sum(bool(hit[a - 1 : b - 1].all()) for a, b in row.spans)
            spans += len(row.spans)
    return Score(total / tokens, right / spans)
