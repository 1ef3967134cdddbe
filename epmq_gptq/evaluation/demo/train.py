"""The demo's models: a small base Llama and one fully fine-tuned expert of it per domain.

Every training runs on one thread, and the experts side by side: the result does not depend on how
many cores there are, and no thread waits for another (see ``one_thread``).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ... import __version__
from .domains import DOMAINS
from .rows import IGNORED, Row, collate, domain_rows, train_tokenizer

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides the demo's models."""

    seed: int = 0
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    row_length: int = 128
    batch_size: int = 8
    base_steps: int = 600
    base_lr: float = 3e-3
    # The rows of a batch in turn: the base shall read, and only begin to compute.
    base_mix: tuple[str, ...] = (
        *("code", "prose", "arithmetic", "code", "prose", "sorting", "code", "prose"),
    )
    expert_steps: int = 200
    expert_lr: float = 1e-3
    # Every n-th row of an expert's batch is from any domain; 0 for none. Chosen from single runs,
    # by the merged model alone: without such rows (and rates of 5e-4 to 8e-4) the average sorted
    # worse than the base (5 against 25 %), with them (and 1e-3) better (37 %, its expert 85 %).
    replay: int = 4
    tokenizer_chars: int = 5000
    train_rows: int = 3000


FULL = TrainingPlan()

# Two seconds of training: it learns little, it only walks the whole way.
QUICK = TrainingPlan(
    hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, row_length=64,
    batch_size=8, base_steps=30, expert_steps=15, tokenizer_chars=1000, train_rows=400,
)  # fmt: skip


def plan_of(seed: int, quick: bool) -> TrainingPlan:
    """The plan of a seed."""
    return replace(QUICK if quick else FULL, seed=seed)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One OpenMP thread: for models this small, threads that wait for each other cost more.

    Measured on 2 busy cores, hidden size 128: a training step of 1,024 tokens takes 0.13 s with one
    thread and 1.05 s with two. On idle cores two are faster, but nobody can count on those.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_parallel(function: Callable[[str], None], names: Sequence[str], workers: int = 0) -> None:
    """Call a function with each name, side by side, one OpenMP thread each."""

    def alone(name: str) -> None:
        torch.set_num_threads(1)  # OpenMP counts its threads per calling thread
        function(name)

    with ThreadPoolExecutor(workers or min(len(names), os.cpu_count() or 1)) as pool:
        list(pool.map(alone, names))


# ---- training ----------------------------------------------------------------------------------


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


def fit(
    model: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, int], torch.Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    lowest: float,
    progress: Callable[[float], None] = lambda fraction: None,
    **options: Any,
) -> list[float]:
    """Train with AdamW under warm-up and cosine decay.

    Args:
        loss_of: (model, number of the step) → the loss of a batch that it draws itself.
        lr: at its peak, after a twentieth of the steps.
        lowest: share of it at the end.
        progress: called with the share done.
        options: of AdamW.

    Returns:
        The loss of every step.
    """
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), **options)
    warmup = max(1, steps // 20)
    losses = []
    model.train()
    for step in range(steps):
        decayed = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, lowest + (1 - lowest) * decayed)
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress((step + 1) / steps)
    model.eval()
    return losses


def train(
    model: LlamaForCausalLM,
    rows: Sequence[Sequence[Row]],
    *,
    batch_size: int,
    seed: str,
    **options: Any,
) -> list[float]:
    """Train on the scored tokens of ``rows``; the loss of every step."""
    batches = _batches(rows, batch_size, seed)

    def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
        ids, labels = collate(next(batches), model.config.pad_token_id)
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )

    return fit(model, loss_of, weight_decay=0.1, lowest=0.05, fused=True, **options)


def train_all(plan: TrainingPlan, out: Path, progress: Progress) -> dict[str, Any]:
    """Train the base and every expert and save them as ``out/base`` and ``out/<domain>``.

    Args:
        progress: called with (what is being trained, share done).

    Returns:
        ``{"parameters": of one model}``.
    """
    tokenizer = train_tokenizer(plan.vocab_size, max_chars=plan.tokenizer_chars)
    counts = {"count": plan.train_rows, "length": plan.row_length, "seed": plan.seed}
    rows = {name: domain_rows(tokenizer, name, "train", **counts) for name in DOMAINS}
    everything = [row for name in DOMAINS for row in rows[name]]
    base = new_model(plan, tokenizer)

    def fit(
        model: LlamaForCausalLM, name: str, mix: Sequence[Sequence[Row]], steps: int, lr: float
    ) -> None:
        train(
            model,
            mix,
            steps=steps,
            lr=lr,
            batch_size=plan.batch_size,
            seed=f"{name}:{plan.seed}",
            progress=lambda done: progress(name, done),
        )
        model.save_pretrained(out / name, safe_serialization=True)
        tokenizer.save_pretrained(out / name)

    def expert(name: str) -> None:
        own = [rows[name]]
        mix = [*own * (plan.replay - 1), everything] if plan.replay else own
        fit(copy.deepcopy(base), name, mix, plan.expert_steps, plan.expert_lr)

    with one_thread():
        fit(base, "base", [rows[name] for name in plan.base_mix], plan.base_steps, plan.base_lr)
    in_parallel(expert, DOMAINS)
    return {"parameters": sum(p.numel() for p in base.parameters())}


# ---- trained models on disk --------------------------------------------------------------------


class Models(NamedTuple):
    """The base and one expert per domain.

    Attributes:
        base, experts: folders, each with the tokenizer that all of them share.
        trained: False where they were there already.
        seconds: the training took, now or when they were made.
        parameters: of one model.
    """

    base: Path
    experts: dict[str, Path]
    trained: bool
    seconds: float
    parameters: int


def cache_folder() -> Path:
    """``$EPMQ_GPTQ_CACHE``, else ``$XDG_CACHE_HOME/epmq_gptq``, else ``~/.cache/epmq_gptq``."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("EPMQ_GPTQ_CACHE") or f"{shared}/epmq_gptq").expanduser()


def made_once(
    folder: Path, make: Callable[[Path], dict[str, Any] | None], *, again: bool = False
) -> tuple[dict[str, Any], bool]:
    """Fill a folder, unless that was done before; of two processes the second waits.

    Args:
        make: writes into the folder and returns what shall be known of it.
        again: make it anew although it is complete.

    Returns:
        What is known of it, with the ``seconds`` that it took; and whether it was made now.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    facts = folder / "facts.json"  # written last: without it the folder is not complete
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if facts.is_file() and not again:
            return json.loads(facts.read_text(encoding="utf-8")), False
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        start = time.perf_counter()
        known = make(folder) or {}
        known["seconds"] = time.perf_counter() - start
        facts.write_text(json.dumps(known), encoding="utf-8")
        return known, True


def folder_name(name: str, *decided_by: Any) -> str:
    """A name for trained models, different where anything that decides them is.

    Args:
        decided_by: plans and other plain data, beside the versions of all that is used.
    """
    parts = [asdict(each) if is_dataclass(each) else each for each in decided_by]
    # Python's: the demo's text is its standard library.
    python = platform.python_version()
    versions = [__version__, python, torch.__version__, transformers.__version__]
    text = json.dumps([*parts, *versions], sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def trained_models(
    plan: TrainingPlan,
    cache: Path,
    *,
    retrain: bool = False,
    progress: Progress = lambda name, fraction: None,
) -> Models:
    """The models of ``plan``, from ``cache`` or trained into it.

    Args:
        retrain: train again and replace what is there.
        progress: called with (what is being trained, share done).
    """
    folder = cache / folder_name("demo", plan)
    facts, trained = made_once(folder, lambda out: train_all(plan, out, progress), again=retrain)
    experts = {name: folder / name for name in DOMAINS}
    return Models(folder / "base", experts, trained, facts["seconds"], facts["parameters"])
