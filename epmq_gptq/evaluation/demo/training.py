"""The demo's models: a small base Llama and one fully fine-tuned expert of it per domain.

Every training runs on one thread, and the experts side by side: the result does not depend on how
many cores there are, and no thread waits for another (see ``one_thread``).
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .domains import DOMAINS
from .hosting import one_thread
from .plan import TrainingPlan
from .rows import IGNORED, Row, collate, domain_rows, train_tokenizer

Progress = Callable[[str, float], None]


def new_model(plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised base; head size 32 to 128, as vLLM's attention wants it."""
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=plan.hidden_size,
            intermediate_size=plan.intermediate_size,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            num_key_value_heads=plan.kv_heads,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _batches(rows: Sequence[Sequence[Row]], size: int, seed: str) -> Iterator[list[Row]]:
    """Endless batches with an equal share of each source, each source reshuffled every pass."""
    rng = random.Random(seed)

    def endless(source: Sequence[Row]) -> Iterator[Row]:
        while True:
            yield from rng.sample(source, len(source))

    streams = [endless(source) for source in rows]
    while True:
        yield [next(streams[i % len(streams)]) for i in range(size)]


def train(
    model: LlamaForCausalLM,
    rows: Sequence[Sequence[Row]],
    *,
    steps: int,
    lr: float,
    batch_size: int,
    seed: str,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[float]:
    """AdamW with warm-up and cosine decay on the scored tokens of ``rows``; the loss per step."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = max(1, steps // 20)
    batches = _batches(rows, batch_size, seed)
    losses = []
    model.train()
    for step in range(steps):
        decayed = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 0.05 + 0.95 * decayed)
        ids, labels = collate(next(batches), model.config.pad_token_id)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress((step + 1) / steps)
    model.eval()
    return losses


def train_all(
    plan: TrainingPlan, out: Path, progress: Progress = lambda name, fraction: None
) -> int:
    """Train the base and every expert and save them as ``out/base`` and ``out/<domain>``.

    Returns:
        The parameters of one model.
    """
    tokenizer = train_tokenizer(plan.vocab_size, max_chars=plan.tokenizer_chars)
    rows = {
        name: domain_rows(
            tokenizer,
            name,
            "train",
            count=plan.train_rows,
            length=plan.row_length,
            seed=plan.seed,
        )
        for name in DOMAINS
    }
    base = new_model(plan, tokenizer)
    with one_thread():
        train(
            base,
            [rows[name] for name in plan.base_mix],
            steps=plan.base_steps,
            lr=plan.base_lr,
            batch_size=plan.batch_size,
            seed=f"base:{plan.seed}",
            progress=lambda done: progress("base", done),
        )
        _save(base, tokenizer, out / "base")

    def expert_mix(name: str) -> list[list[Row]]:
        if not plan.replay:
            return [rows[name]]
        everything = [row for other in DOMAINS for row in rows[other]]
        return [*[rows[name]] * (plan.replay - 1), everything]

    def expert(name: str) -> None:
        torch.set_num_threads(1)  # OpenMP counts its threads per calling thread
        model = copy.deepcopy(base)
        train(
            model,
            expert_mix(name),
            steps=plan.expert_steps,
            lr=plan.expert_lr,
            batch_size=plan.batch_size,
            seed=f"{name}:{plan.seed}",
            progress=lambda done: progress(name, done),
        )
        _save(model, tokenizer, out / name)

    with ThreadPoolExecutor(min(len(DOMAINS), os.cpu_count() or 1)) as pool:
        list(pool.map(expert, DOMAINS))
    return sum(p.numel() for p in base.parameters())


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
