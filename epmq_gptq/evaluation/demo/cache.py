"""The trained models on disk: made once, whole or not at all, shared by every later run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from .domains import DATA_VERSION, DOMAINS
from .plan import TRAINING_VERSION, TrainingPlan
from .training import Progress, train_all


@dataclass(frozen=True)
class Models:
    """Folders of the base and of one expert per domain, each with its tokenizer.

    Attributes:
        trained: False where they were in the cache.
        seconds: the training took, now or when they were made.
        parameters: of one model.
    """

    base: Path
    experts: dict[str, Path]
    trained: bool
    seconds: float
    parameters: int

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that all of them share."""
        return PreTrainedTokenizerFast.from_pretrained(self.base)


def cache_folder() -> Path:
    """``$EPMQ_GPTQ_CACHE``, else ``$XDG_CACHE_HOME/epmq_gptq``, else ``~/.cache/epmq_gptq``."""
    if own := os.environ.get("EPMQ_GPTQ_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "epmq_gptq"


def cache_key(plan: TrainingPlan) -> str:
    """Hash of the plan and of every version that decides the models."""
    parts = {
        "plan": asdict(plan),
        "data": DATA_VERSION,
        "training": TRAINING_VERSION,
        "python": platform.python_version(),  # the text is its standard library
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def trained_models(
    plan: TrainingPlan,
    cache: Path,
    *,
    retrain: bool = False,
    progress: Progress = lambda name, fraction: None,
    train: Callable[[TrainingPlan, Path, Progress], int] = train_all,
) -> Models:
    """The models of ``plan``, from ``cache`` or trained into it.

    They are trained in a temporary folder beside their place and moved there when complete. Of two
    processes at once the one that is done first wins, and the other takes what the first made.

    Args:
        retrain: train again and replace what is cached.
        progress: called with (what is being trained, share done).
        train: writes the models to a folder and returns their parameter count.
    """
    place = cache / "demo" / cache_key(plan)
    trained = retrain or not place.is_dir()
    if trained:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=place.parent, prefix=f".{place.name}-", ignore_cleanup_errors=True
        ) as temporary:
            fresh = Path(temporary) / "models"
            fresh.mkdir()
            start = time.perf_counter()
            parameters = train(plan, fresh, progress)
            facts = {"seconds": time.perf_counter() - start, "parameters": parameters}
            (fresh / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            publish(fresh, place, Path(temporary) / "replaced", replace=retrain)
    facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    return Models(
        base=place / "base",
        experts={name: place / name for name in DOMAINS},
        trained=trained,
        seconds=facts["seconds"],
        parameters=facts["parameters"],
    )


def publish(fresh: Path, place: Path, replaced: Path, *, replace: bool) -> None:
    """Move what is complete to its place; of two processes at once the first one's stays."""
    # Renaming a folder onto a non-empty one fails: that is how the loser of a race finds out.
    if replace and place.is_dir():
        os.replace(place, replaced)
    try:
        os.replace(fresh, place)
    except OSError:
        if not (place / "facts.json").is_file():
            raise
        shutil.rmtree(fresh, ignore_errors=True)
