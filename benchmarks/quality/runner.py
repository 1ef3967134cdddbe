"""Runs a plan's cells over the pool, keeps what is finished, and goes on when one fails."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .plan import Cell, Options, Plan, better, cell_key

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "transformers", "gptqmodel", "numpy", "scikit-learn")


def code_digest() -> str:
    """Hash of the sources that decide the figures: finished cells of other code do not count."""
    total = hashlib.sha256()
    folders = ("epmq_gptq", "kernels", "benchmarks/suites")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    for file in [*files, Path(__file__).with_name("cells.py")]:
        total.update(f"{file.name}\0".encode() + file.read_bytes())
    return total.hexdigest()[:16]


def facts() -> dict[str, Any]:
    """What else decides a figure: versions and code."""
    return {"code": code_digest(), **{name: version(name) for name in _PACKAGES}}


class Runner:
    """One run of a plan.

    Args:
        plan: what to compute.
        work: folder of finished cells, merged models and logs.
        cache: of the suites.
        workers: processes.
        resume: take cells that an earlier run with the same inputs and code has finished.
        say: called with one line per finished cell.
        function: what a worker runs for a cell; :func:`run_in_worker`.
        decided_by: what else decides a figure; :func:`facts`.
    """

    def __init__(
        self,
        plan: Plan,
        work: Path,
        *,
        cache: Path | None = None,
        workers: int = 2,
        resume: bool = False,
        say: Callable[[str], None] = print,
        function: Callable[..., dict] | None = None,
        decided_by: Mapping[str, Any] | None = None,
    ):
        self.plan, self.work, self.resume, self.say = plan, work, resume, say
        self.cache, self.workers = cache, workers
        self.facts = facts() if decided_by is None else decided_by
        self._function = function or run_in_worker
        self.results: dict[str, dict[str, Any]] = {}
        self._pending = dict(plan.cells)
        self._resolved: dict[str, Cell] = {}
        self._started = time.perf_counter()

    @property
    def options(self) -> Options:
        return self.plan.options

    def run(self) -> dict[str, dict[str, Any]]:
        """All results by the name of their cell; a failure is ``{"error": {...}}``."""
        from .pool import Pool

        # Read by torch when it is imported, in the workers.
        os.environ["OMP_NUM_THREADS"] = "1"
        with Pool(self.workers, self.work / "logs") as pool:
            while self._pending or pool.jobs:
                if not self._start_some(pool) and pool.jobs:
                    name, result = pool.next()
                    self._finish(name, result, self._resolved[name])
                elif not pool.jobs and self._pending and not self._ready():
                    raise AssertionError(f"cells that wait for each other: {list(self._pending)}")
        return self.results

    def _ready(self) -> list[Cell]:
        def is_ready(cell: Cell) -> bool:
            return all(need in self.results for need in self.plan.needs[cell.name])

        ready = [cell for cell in self._pending.values() if is_ready(cell)]
        # What counts seconds comes when nothing else is left to run beside it.
        return sorted(ready, key=lambda cell: cell.exclusive)

    def _start_some(self, pool) -> bool:
        """Start or settle one cell; whether there was one."""
        for cell in self._ready():
            if cell.exclusive and (pool.jobs or any(not c.exclusive for c in self._ready())):
                continue
            if any(self._resolved[name].exclusive for name in pool.jobs):
                return False
            resolved, result = self._settle(cell)
            if result is None and not pool.has_room:
                return False
            del self._pending[cell.name]
            self._resolved[cell.name] = resolved
            if result is not None:
                self._finish(cell.name, result, resolved, kept=True)
                return True
            key = cell_key(resolved, self.options, self.facts)
            folder = self._merged(cell, resolved)
            pool.submit(cell.name, self._function, resolved, self._place(), folder, key)
            return True
        return False

    def _place(self) -> dict[str, Any]:
        options = self.options
        return {
            "work": self.work,
            "cache": self.cache,
            "batch_size": options.batch_size,
            "group_size": options.group_size,
            "quick": options.quick,
            "device": options.device,
            "suites_from": options.suites_from,
        }

    def _settle(self, cell: Cell) -> tuple[Cell, dict[str, Any] | None]:
        """The cell to compute, and its result where there is one already."""
        needs = self.plan.needs[cell.name]
        kinds = ("suite", "merge")
        sources = [
            need
            for need in needs
            if self.plan.cells[need].kind in kinds and not self._is_candidate(cell, need)
        ]
        failed = [need for need in sources if "error" in self.results[need]]
        if failed:
            return cell, {"error": {"type": "Skipped", "message": f"failed: {failed[0]}"}}
        resolved = self._choose(cell) if cell.choice else cell
        if resolved is None:
            return cell, {"error": {"type": "Skipped", "message": "every candidate failed"}}
        if cell.choice and resolved.name in self.results:
            chosen = dict(self.results[resolved.name])
            return resolved, chosen | {"chosen": self._chosen(cell, resolved)}
        return resolved, self._kept(resolved)

    def _is_candidate(self, cell: Cell, need: str) -> bool:
        if not cell.choice:
            return False
        kind = {"alpha": "quantize", "gamma": "merge"}[cell.choice]
        found = self.plan.cells[need]
        return found.kind == kind and found.held_out

    def _choose(self, cell: Cell) -> Cell | None:
        """The concrete cell that a choice stands for, by the held-out rows alone."""
        scores = {}
        for need in self.plan.needs[cell.name]:
            held_out = self.results[need].get("scores", {}).get("held_out")
            if self._is_candidate(cell, need) and held_out:
                scores[need] = better(held_out)
        if not scores:
            return None
        best = self.plan.cells[max(scores, key=scores.get)]
        if cell.choice == "alpha":
            concrete = replace(cell, choice=None, alpha=best.alpha)
        else:
            concrete = replace(cell, choice=None, parameters=dict(best.parameters))
        return self.plan.cells.get(concrete.name, concrete)

    @staticmethod
    def _chosen(cell: Cell, resolved: Cell) -> float:
        if cell.choice == "alpha":
            return resolved.alpha
        return resolved.parameters["reduce_non_diagonal_ratio"]

    def _merged(self, cell: Cell, resolved: Cell) -> str | None:
        if resolved.kind not in ("quantize", "budget"):
            return None
        merge = next(
            name
            for name, found in self.plan.cells.items()
            if found.kind == "merge"
            and found.choice is None
            and (found.suite, found.seed, found.merger) == (cell.suite, cell.seed, cell.merger)
            and dict(found.parameters) == dict(resolved.parameters)
        )
        return self.results[merge]["merged"]

    # ---- what is finished ----------------------------------------------------------------------

    def _file(self, cell: Cell) -> Path:
        return self.work / "cells" / f"{cell_key(cell, self.options, self.facts)}.json"

    def _kept(self, cell: Cell) -> dict[str, Any] | None:
        if not self.resume:
            return None
        try:
            kept = json.loads(self._file(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if "merged" in kept and not (self.work / kept["merged"]).is_dir():
            return None
        return kept

    def _finish(
        self, name: str, result: dict[str, Any], resolved: Cell, *, kept: bool = False
    ) -> None:
        cell = self.plan.cells[name]
        if "error" not in result and not kept:
            self._keep(resolved, result)
        if cell.choice and "error" not in result:
            result = result | {"chosen": self._chosen(cell, resolved)}
        self.results[name] = result
        done = f"[{len(self.results)}/{len(self.plan.cells)}]"
        self.say(f"{done} {time.perf_counter() - self._started:6.0f} s  {name}: {shown(result)}")

    def _keep(self, cell: Cell, result: Mapping[str, Any]) -> None:
        file = self._file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as stream:
            json.dump(result, stream)
        os.replace(stream.name, file)


def run_in_worker(cell: Cell, place: dict[str, Any], folder: str | None, key: str) -> dict:
    """:func:`cells.run_cell`, imported there: the parent has no need of torch.

    What the host or E-PMQ does not know becomes ``{"refused": reason}``.
    """
    import torch

    from .cells import Place, Refused, run_cell

    torch.set_num_threads(1)
    before = Path.cwd()
    work = Path(place["work"])
    with tempfile.TemporaryDirectory(dir=work, prefix="cwd-", ignore_cleanup_errors=True) as cwd:
        os.chdir(cwd)  # the host writes a folder of logs where it is
        try:
            return run_cell(cell, Place(**place), folder, key)
        except Refused as error:
            return {"refused": str(error)}
        finally:
            os.chdir(before)


def shown(result: Mapping[str, Any]) -> str:
    """One phrase about a result."""
    if "error" in result:
        return f"FAILED, {result['error']['type']}: {result['error']['message'][:200]}"
    if "refused" in result:
        return f"n/a, {result['refused'][:200]}"
    found = result.get("scores", {}).get("evaluation")
    if not found:
        return "done"
    accuracy, loss = better(found)
    return f"{accuracy:.1f} %, {-loss:.3f} nats, {result.get('total_seconds', 0):.1f} s"
