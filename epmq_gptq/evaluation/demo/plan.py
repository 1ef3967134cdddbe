"""How the demo's models are shaped and trained."""

from __future__ import annotations

from dataclasses import dataclass

# Part of the cache key: raise it whenever the training itself changes.
TRAINING_VERSION = 1


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides the demo's models, and so the key of their cache."""

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
