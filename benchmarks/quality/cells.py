"""What one cell does, in a worker process: make a model, save it, load it again, evaluate it."""

from __future__ import annotations

import functools
import importlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from epmq_gptq.errors import EPMQError
from epmq_gptq.evaluation import load_model
from epmq_gptq.evaluation.baselines import QuantizeSettings, quantize
from epmq_gptq.evaluation.loading import architecture_of
from epmq_gptq.merging import merge, merge_state_dicts

from .plan import CALIBRATED, PAPER, Cell


class ParityError(AssertionError):
    """The harness and the in-memory model disagree: no figure of this merge can be trusted."""


class Refused(Exception):
    """The host, or E-PMQ, does not know this combination; the reason is the text."""


@dataclass(frozen=True)
class Place:
    """Where and how cells of a run work.

    Attributes:
        work: folder of merged models and scratch.
        cache: of the suites; None for the user's.
        batch_size, group_size, quick, device, suites_from: see ``Options``.
    """

    work: Path
    cache: Path | None
    batch_size: int
    group_size: int
    quick: bool
    device: str | None
    suites_from: str

    @property
    def where(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=4)
def suite_of(module: str, name: str, seed: int, quick: bool, cache: Path | None, device):
    """The suite, built or from the cache; kept, because its data takes a while to make."""
    build_suite = importlib.import_module(module).build_suite
    return build_suite(name, seed=seed, quick=quick, cache=cache, device=device)


def _suite_key(cell: Cell, place: Place) -> tuple:
    return place.suites_from, cell.suite, cell.seed, place.quick, place.cache, place.device


@functools.lru_cache(maxsize=4)
def _read_rows(suite: tuple, samples: int, seed: int) -> dict[str, list]:
    return suite_of(*suite).calibration(samples, seed=seed)


def _rows(cell: Cell, place: Place) -> dict[str, list]:
    suite = _suite_key(cell, place)
    return _read_rows(suite, cell.samples or 1, cell.seed)


def run_cell(cell: Cell, place: Place, folder: str | None, key: str) -> dict[str, Any]:
    """The figures of ``cell``.

    Args:
        folder: of the merge that it starts from, relative to ``place.work``.
        key: of the cell; names what it leaves behind.

    Returns:
        ``scores``: split → task → accuracy, loss, items; and what its kind adds.
    """
    start = time.perf_counter()
    suite = suite_of(*_suite_key(cell, place))
    result = {
        "suite": _suite_cell,
        "base": _base_cell,
        "experts": _experts_cell,
        "merge": _merge_cell,
        "quantize": _quantize_cell,
        "budget": _budget_cell,
    }[cell.kind](cell, place, suite, folder, key)
    return result | {"total_seconds": round(time.perf_counter() - start, 3)}


def scored(suite: Any, path: Path, place: Place, tasks=None, held_out: bool = False) -> dict:
    """The scores of a saved model on the evaluation rows, and on the held-out ones if asked."""
    loaded = load_model(path, device=place.where, dense=True)
    return {
        split: _scores(suite, loaded.module, tasks, split)
        for split in ("evaluation", *(["held_out"] if held_out else []))
    }


def _scores(suite: Any, module: torch.nn.Module, tasks, split: str) -> dict:
    found = suite.evaluate(module, tasks, split=split)
    return {
        task: {"accuracy": score.accuracy, "loss": score.loss, "items": score.items}
        for task, score in found.items()
    }


def _suite_cell(cell: Cell, place: Place, suite: Any, folder, key) -> dict:
    base = load_file(suite.base / "model.safetensors")
    return {
        "tasks": list(suite.tasks),
        "kind": suite.kind,
        "folder": suite.folder.name,
        "parameters": sum(tensor.numel() for tensor in base.values()),
    }


def _base_cell(cell: Cell, place: Place, suite: Any, folder, key) -> dict:
    return {"scores": scored(suite, suite.base, place)}


def _experts_cell(cell: Cell, place: Place, suite: Any, folder, key) -> dict:
    scores: dict[str, dict] = {}
    for task, path in suite.experts.items():
        scores |= scored(suite, path, place, [task])["evaluation"]
    return {"scores": {"evaluation": scores}}


def _merge_cell(cell: Cell, place: Place, suite: Any, folder, key) -> dict:
    out = place.work / "merges" / key
    if out.is_dir():
        shutil.rmtree(out)  # of a run that was killed after it, or during it
    out.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
    if cell.merger in CALIBRATED:
        options = {
            "calibration": _rows(cell, place),
            "batch_size": place.batch_size,
        }
    start = time.perf_counter()
    merge(
        cell.merger,
        base=suite.base,
        experts=suite.experts,
        out=out,
        parameters=dict(cell.parameters),
        **options,
    )
    seconds = time.perf_counter() - start
    scores = scored(suite, out, place, held_out=cell.held_out)
    if cell.merger not in CALIBRATED:
        _check_parity(cell, place, suite, scores["evaluation"])
    return {
        "scores": scores,
        "seconds": round(seconds, 3),
        "merged": out.relative_to(place.work).as_posix(),
    }


def _check_parity(cell: Cell, place: Place, suite: Any, saved: Mapping[str, Any]) -> None:
    """The saved merge, loaded by the harness, must score as the merge that was never saved."""
    states = {
        name: load_file(path / "model.safetensors")
        for name, path in {"": suite.base, **suite.experts}.items()
    }
    base = states.pop("")
    state = merge_state_dicts(cell.merger, base, states, dict(cell.parameters))
    loaded = load_model(suite.base, device=place.where)
    # The class itself reads it: it knows the names that a checkpoint has and a module has not.
    module = architecture_of(loaded.module.config.to_dict()).from_pretrained(
        None, config=loaded.module.config, state_dict=state, dtype=torch.float32
    )
    module = module.to(place.where).eval()
    for task, score in _scores(suite, module, None, "evaluation").items():
        for metric, tolerance in (("accuracy", 1e-9), ("loss", 1e-5)):
            got, expected = saved[task][metric], score[metric]
            if abs(got - expected) > tolerance * max(1.0, abs(expected)):
                raise ParityError(
                    f"{cell.name}: {task} has {metric} {got} from its folder and {expected} in "
                    "memory"
                )


def _settings(cell: Cell, place: Place) -> QuantizeSettings:
    return QuantizeSettings(
        bits=cell.bits,
        group_size=place.group_size,
        batch_size=place.batch_size,
        device=place.where,
        options={"alpha": cell.alpha} | dict(cell.options or PAPER),
    )


def _quantize_cell(cell: Cell, place: Place, suite: Any, folder: str, key) -> dict:
    settings = _settings(cell, place)
    rows = _rows(cell, place)
    place.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.work, prefix="quantized-") as temporary:
        out = Path(temporary) / "model"
        try:
            seconds = quantize(cell.method, place.work / folder, suite.experts, rows, settings, out)
        except EPMQError as error:
            # Of a baseline: what the host does not know. alpha = 0: some Gram lacks full rank.
            if cell.method != "E-PMQ" or cell.alpha == 0:
                raise Refused(f"[{error.code}] {error}") from error
            raise
        scores = scored(suite, out, place, held_out=cell.held_out)
    return {"scores": scores, "seconds": round(seconds, 3)}


def _budget_cell(cell: Cell, place: Place, suite: Any, folder: str, key) -> dict:
    """Both methods in turn, in one process that is warm; the median of three of each."""
    rows = _rows(cell, place)
    few = {name: found[:4] for name, found in rows.items()}
    seconds: dict[str, list[float]] = {"GPTQ": [], "E-PMQ": []}
    scores: dict[str, dict] = {}
    settings = _settings(cell, place)
    with tempfile.TemporaryDirectory(dir=place.work, prefix="quantized-") as temporary:
        for turn in range(4):
            for method in seconds:
                out = Path(temporary) / f"{method}-{turn}"
                data = rows if turn else few  # the first only loads and compiles
                took = quantize(method, place.work / folder, suite.experts, data, settings, out)
                if turn:
                    seconds[method].append(took)
                if turn == 1:
                    scores[method] = scored(suite, out, place)["evaluation"]
    median = {method: sorted(values)[1] for method, values in seconds.items()}
    return {
        "budget": {
            method: {
                "scores": {"evaluation": scores[method]},
                "seconds": round(median[method], 3),
                "all_seconds": [round(value, 3) for value in seconds[method]],
                "ratio": round(median[method] / median["GPTQ"], 3),
            }
            for method in seconds
        }
    }
