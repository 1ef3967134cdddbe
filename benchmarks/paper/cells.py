"""One cell: a model made, evaluated, and its scores kept on disk, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from epmq_gptq.evaluation.baselines import QuantizeSettings, quantize

from .clip import ClipBench
from .data import Bench, Score
from .glue import GlueBench
from .llm import LanguageBench
from .models import Fetcher, Models, prepare
from .specs import CALIBRATED, FAMILIES, MERGERS, REGMEAN_RATIO, SUITES


@dataclass(frozen=True)
class Cell:
    """What one row of a table holds.

    Attributes:
        family: of ``specs.FAMILIES``.
        suite: of ``specs.SUITES``.
        merger: of ``specs.MERGERS``; "base" and "experts" are the models before any merge.
        method: "FP" or what quantizes.
        alpha: of E-PMQ; None for the paper's constant.
        samples: calibration rows per task; None for the paper's 256.
    """

    family: str
    suite: str
    merger: str
    method: str = "FP"
    bits: int = 4
    alpha: float | None = None
    samples: int | None = None

    @property
    def key(self) -> str:
        """As ``published.json`` names it: ``merger/method``, ``@alpha`` and ``#samples`` where
        they are not the paper's constants."""
        if self.merger in ("base", "experts"):
            return self.merger
        text = f"{self.merger}/{self.method}"
        text += "" if self.bits == 4 or self.method == "FP" else f":{self.bits}"
        text += "" if self.alpha is None else f"@{self.alpha:g}"
        return text + ("" if self.samples is None else f"#{self.samples}")


@dataclass(frozen=True)
class Settings:
    """Options of a run that hold for all of its cells.

    Attributes:
        tasks: only these of every suite; empty for all.
        limit: evaluated items per task; None for all.
        samples: in place of the paper's calibration rows per task.
        seed: of the draws.
        dtype: in place of a family's evaluation dtype.
        keep: whether quantized checkpoints stay in the cache.
        workers: processes that prepare images.
        runs_code: whether code that a language model wrote may be run.
    """

    out: Path
    cache: Path
    device: str = "cpu"
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    samples: int | None = None
    seed: int = 0
    dtype: str | None = None
    keep: bool = False
    workers: int = 0
    runs_code: bool = False


@dataclass
class Runner:
    """Runs cells. Models and data of a suite are fetched once."""

    settings: Settings
    fetcher: Fetcher
    log: Callable[[str], None]
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = cache(self._models)
        self.bench = cache(self._bench)
        self.calibration = cache(self._calibration)

    # ---- of a suite --------------------------------------------------------------------------

    def tasks(self, suite: str) -> tuple[str, ...]:
        """Tasks of a suite that this run is about."""
        chosen = self.settings.tasks
        return tuple(task for task in SUITES[suite] if not chosen or task in chosen)

    def _models(self, family: str, suite: str) -> Models:
        return prepare(family, self.tasks(suite), replace_commits(self.fetcher))

    def _bench(self, family: str, suite: str) -> Bench:
        classes = {"images": ClipBench, "pairs": GlueBench, "text": LanguageBench}
        kind, s = FAMILIES[family].kind, self.settings
        return classes[kind](
            whole=self.models(family, suite).whole,
            tasks=self.tasks(suite),
            device=s.device,
            batch_size=FAMILIES[family].evaluation_batch,
            limit=s.limit,
            workers=s.workers,
            seqlen=FAMILIES[family].seqlen,
            runs_code=s.runs_code,
        )

    def _calibration(self, family: str, suite: str, samples: int) -> dict[str, list[Any]]:
        self.log(f"draw {samples} calibration rows per task")
        return self.bench(family, suite).calibration(samples, self.settings.seed)

    # ---- a cell ------------------------------------------------------------------------------

    def samples(self, cell: Cell) -> int:
        """Calibration rows per task of a cell."""
        return cell.samples or self.settings.samples or FAMILIES[cell.family].samples

    def alpha(self, cell: Cell) -> float:
        """The strength of the anchor of a cell."""
        paper = FAMILIES[cell.family].alpha_of(cell.merger)
        return paper if cell.alpha is None else cell.alpha

    def describe(self, cell: Cell) -> dict[str, Any]:
        """Everything that decides the scores of a cell; what it is kept under."""
        family = FAMILIES[cell.family]
        merged = cell.merger in MERGERS
        quantized = merged and cell.method != "FP"
        calibrated = cell.merger in CALIBRATED or (quantized and cell.method != "RTN")
        facts: dict[str, Any] = {
            "family": cell.family,
            "tasks": self.tasks(cell.suite),
            "columns": self.bench(cell.family, cell.suite).columns,
            "merger": cell.merger,
            "parameters": self.parameters(cell) if merged else {},
            "method": cell.method,
            "models": self.models(cell.family, cell.suite).commits,
            "datasets": self.bench(cell.family, cell.suite).datasets(),
            "limit": self.settings.limit,
            "dtype": self.settings.dtype or family.dtype,
            "versions": self.environment.get("versions", {}),
        }
        if quantized:
            facts |= {"bits": cell.bits, "group_size": family.group_size}
        if calibrated:
            facts |= {"samples": self.samples(cell), "seed": self.settings.seed}
            facts |= {"batch_size": family.batch_size, "seqlen": family.seqlen}
        if cell.method == "E-PMQ":
            facts["alpha"] = self.alpha(cell)
        return facts

    def parameters(self, cell: Cell) -> dict[str, Any]:
        """Options of a cell's merger."""
        options = dict(MERGERS[cell.merger])
        if cell.merger in CALIBRATED:
            options["reduce_non_diagonal_ratio"] = REGMEAN_RATIO[FAMILIES[cell.family].kind]
        return options

    def run(self, cell: Cell) -> dict[str, Any]:
        """Scores of a cell, computed or read; a failure is a result with ``failed``."""
        facts = json.loads(json.dumps(self.describe(cell)))
        text = json.dumps(facts, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        file = self.settings.out / "cells" / f"{name}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        self.log(f"{cell.family} {cell.suite}: {cell.key}")
        result = {"cell": asdict(cell), "facts": facts, "failed": None}
        result["environment"] = self.environment
        try:
            result |= self._computed(cell)
        except Exception as error:
            # Whatever a library makes of one cell must not cost the others; it is not kept.
            reason = next(iter(str(error).strip().splitlines()), "")
            result["failed"] = f"{getattr(error, 'code', type(error).__name__)}: {reason}"
            self.log(f"failed: {traceback.format_exc()}")
            return result
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".part")
        scratch.write_text(json.dumps(result, indent=1), encoding="utf-8")
        scratch.replace(file)
        return result

    def _computed(self, cell: Cell) -> dict[str, Any]:
        models, seconds = self.models(cell.family, cell.suite), {}
        bench = self.bench(cell.family, cell.suite)
        scores: dict[str, Score] = {}
        if cell.merger == "experts":
            for task, folder in models.experts.items():
                scores |= self._evaluated(cell, bench, folder, (task,))
        elif cell.merger == "base":
            scores = self._evaluated(cell, bench, models.base, bench.columns)
        elif cell.method == "FP":
            merged = self._merged(cell, models)
            scores = self._evaluated(cell, bench, merged, bench.columns)
        else:
            merged = self._merged(cell, models)
            scores, seconds["quantize"] = self._quantized(cell, bench, models, merged)
        return {
            "scores": {task: score.value for task, score in scores.items()},
            "items": {task: score.items for task, score in scores.items()},
            "seconds": seconds,
        }

    def _evaluated(
        self, cell: Cell, bench: Bench, folder: Path, columns: tuple[str, ...]
    ) -> dict[str, Score]:
        from epmq_gptq.evaluation import load_model

        dtype = self.settings.dtype or FAMILIES[cell.family].dtype
        # Dense: quantized rows are computed as the others are, and differ by their weights alone.
        loaded = load_model(folder, device=self.settings.device, dtype=dtype, dense=True)
        return bench.evaluate(loaded.module, columns)

    def _merged(self, cell: Cell, models: Models) -> Path:
        """The merge of a cell's experts, kept in the cache."""
        from epmq_gptq.merging import merge

        facts = self.describe(replace(cell, method="FP", alpha=None))
        facts = {key: facts[key] for key in facts if key not in ("limit", "dtype", "columns")}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        out = self.settings.cache / "merged" / f"{cell.family}-{cell.merger}-{digest}"
        if out.is_dir():
            return out
        self.log(f"merge by {cell.merger}")
        options: dict[str, Any] = {"parameters": self.parameters(cell)}
        if cell.merger in CALIBRATED:
            options["calibration"] = self.calibration(cell.family, cell.suite, self.samples(cell))
            options["batch_size"] = FAMILIES[cell.family].batch_size
        merge(
            cell.merger,
            base=models.base,
            experts=models.experts,
            out=out,
            device=self.settings.device,
            **options,
        )
        return out

    def _quantized(
        self, cell: Cell, bench: Bench, models: Models, merged: Path
    ) -> tuple[dict[str, Score], float]:
        family = FAMILIES[cell.family]
        best = cell.method == "E-PMQ-best"
        settings = QuantizeSettings(
            cell.bits,
            family.group_size,
            family.batch_size,
            self.settings.device,
            # Appendix E: language models in bfloat16.
            torch.bfloat16 if family.kind == "text" else torch.float32,
            {"profile": "best"} if best else {"profile": "paper", "alpha": self.alpha(cell)},
        )
        rows = {}
        if cell.method != "RTN":
            rows = self.calibration(cell.family, cell.suite, self.samples(cell))
        facts = json.dumps(self.describe(cell), sort_keys=True)
        name = f"{cell.key.replace('/', '-')}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        out = self.settings.cache / "quantized" / f"{cell.family}-{cell.suite}-{name}"
        shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            method = "E-PMQ" if best else cell.method
            seconds = quantize(method, merged, models.experts, rows, settings, out)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return self._evaluated(cell, bench, out, bench.columns), seconds
        finally:
            if not self.settings.keep:
                shutil.rmtree(out, ignore_errors=True)


def replace_commits(fetcher: Fetcher) -> Fetcher:
    """The same fetcher with a record of its own: a suite names its own models only."""
    return replace(fetcher, commits={})
