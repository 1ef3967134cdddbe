"""A suite by its name, trained now or taken from the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import EPMQInputError
from ..evaluation.demo.cache import cache_folder, publish
from . import pairs, text, vision
from .suite import Progress, Suite

# Part of every cache key: raise it whenever data or training change.
VERSION = 1
FACTS = "facts.json"

# Name → the suite, its plan by (seed, quick), and what trains it.
_KNOWN: dict[str, tuple[type[Suite], Callable[[int, bool], Any], Callable[..., None]]] = {
    "vision8": (
        vision.Vision8,
        lambda seed, quick: vision.VisionPlan(seed=seed, **(vision.QUICK if quick else {})),
        vision.train,
    ),
    "text4": (text.Text4, text.plan, text.train),
    "seq2seq4": (
        pairs.Seq2Seq4,
        lambda seed, quick: pairs.PairsPlan(seed=seed, **(pairs.QUICK if quick else {})),
        pairs.train,
    ),
}
SUITES = tuple(_KNOWN)


def build_suite(
    name: str,
    *,
    seed: int = 0,
    quick: bool = False,
    cache: Path | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Suite:
    """The suite ``name``: its models are trained if they are not in the cache.

    They are trained in a temporary folder and moved to their place when complete, so that an entry
    is whole or absent.

    Args:
        name: one of :data:`SUITES`.
        seed: of data, initial weights and class embeddings. The same seed gives the same models on
            the same machine; on another one training rounds differently.
        quick: a tiny version, for tests.
        cache: folder; default ``$EPMQ_GPTQ_CACHE``, else ``~/.cache/epmq_gptq``.
        device: where to train; default a GPU where there is one.
        progress: called with (what is being trained, share done).

    Raises:
        EPMQInputError: there is no such suite, or scikit-learn is missing.
    """
    if name not in _KNOWN:
        raise EPMQInputError(
            f"`suite` should be one of {', '.join(SUITES)}, got {name!r}.",
            code="EPMQ-O01",
            subject="`suite`",
            remedy="Use one of these names.",
        )
    suite, plan_of, train = _KNOWN[name]
    plan = plan_of(seed, quick)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    cache = Path(cache or cache_folder()).expanduser().absolute()
    place = cache / "suites" / f"{name}-{_key(name, plan, device)}"
    if not _is_whole(place):
        _train_into(place, lambda out: train(plan, out, device, progress or _silent, cache))
    return suite(
        seed=seed,
        quick=quick,
        folder=place,
        base=place / "base",
        experts={task: place / task for task in suite.tasks},
    )


def facts(suite: Suite) -> dict[str, Any]:
    """What is known of a suite's training: ``seconds``, and ``files`` with their sizes in bytes."""
    return json.loads((suite.folder / FACTS).read_text(encoding="utf-8"))


def _silent(name: str, done: float) -> None:
    pass


def _key(name: str, plan: Any, device: torch.device) -> str:
    parts = {
        "suite": name,
        "plan": dataclasses.asdict(plan),
        "version": VERSION,
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _files(folder: Path) -> dict[str, int]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FACTS)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def _is_whole(place: Path) -> bool:
    """Whether every file is there that was there when the suite was complete."""
    try:
        return json.loads((place / FACTS).read_text(encoding="utf-8"))["files"] == _files(place)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _train_into(place: Path, train: Callable[[Path], None]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # What is there is not whole: a tidy-up of the cache, or a full disk, took some of it.
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        dir=place.parent, prefix=f".{place.name}-", ignore_cleanup_errors=True
    ) as temporary:
        fresh = Path(temporary) / "models"
        fresh.mkdir()
        start = time.perf_counter()
        train(fresh)
        found = {"seconds": time.perf_counter() - start, "files": _files(fresh)}
        (fresh / FACTS).write_text(json.dumps(found), encoding="utf-8")
        publish(fresh, place, Path(temporary) / "replaced", replace=False)
