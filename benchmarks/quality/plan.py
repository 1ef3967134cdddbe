"""What the tables are made of: mergers, methods, constants of the paper, and the cells of a run.

Light to import: no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SUITES = ("vision8", "text4", "seq2seq4")
TABLES = ("main", "alpha", "bits", "budget")

# FusionBench's parameters, which are the paper's; the rest of each method at its defaults. But
# WUDI's 400 steps of 1e-5 are for the smaller task vectors of large models: here it would stay at
# its start, the sum of all (16 % on vision8). 1e-3 was chosen by held-out rows of that merge alone.
MERGERS: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {"lam": 0.3},
    "ties": {"lam": 0.3, "threshold": 20},
    "wudi": {"lr": 1e-3},
}
LABELS = {
    "average": "Simple averaging",
    "task_arithmetic": "Task arithmetic (0.3)",
    "ties": "TIES (0.3)",
    "wudi": "WUDI",
    "regmean": "RegMean",
    "regmean_plusplus": "RegMean++",
}
METHODS = ("RTN", "GPTQ", "AWQ", "E-PMQ")
CALIBRATED = ("regmean", "regmean_plusplus")

# alpha: the paper's grid (Table 12); 0 is its row without an anchor.
ALPHAS = (0.01, 0.1, 1.0, 10.0)
ABLATION = (0.0, *ALPHAS)
# Shrinkage of RegMean, gamma ~ 1/(1 + alpha): the same grid in its own words. FusionBench: 0.95.
GAMMAS = (0.99, 0.9, 0.5, 0.1)
GAMMA = 0.95
BITS_TABLE = (3, 4, 5, 6, 7, 8)
BUDGET = (64, 128, 256)
# Mergers of the ablations: the paper's two.
ABLATED = ("task_arithmetic", "ties")


PAPER: dict[str, Any] = {"profile": "paper"}
_OWN: dict[str, Any] = {
    "profile": "best", "alpha": "auto", "eta": 1.0, "rho": 1.0, "anchor": "identity",
    "bias_refit": False,
}  # fmt: skip
# Options of E-PMQ: three lines with one thing more than the line before, then what else was tried.
VARIANTS: dict[str, dict[str, Any]] = {
    "α by held-out rows": PAPER | {"alpha": "auto"},
    "+ expert trajectory": _OWN | {"rho": 0.0},
    "+ residual correction": _OWN,
    "with bias refit": _OWN | {"bias_refit": True},
    "with channel anchor": _OWN | {"anchor": "channel"},
    "half of both corrections": _OWN | {"eta": 0.5, "rho": 0.5},
    "every expert weighs the same": _OWN | {"weighting": "trace"},
}
BEST = "best"


def paper_alpha(suite: str, merger: str) -> float:
    """The paper's constants; the models of text4 are language models."""
    from epmq_gptq.config import paper_alpha as of_family

    return of_family("llama" if suite == "text4" else "clip", merger)


def paper_alpha_of(merge: Cell) -> float:
    """The paper's alpha for what was merged."""
    return paper_alpha(merge.suite, merge.merger)


@dataclass(frozen=True)
class Options:
    """What decides every figure of a run.

    Attributes:
        suites, tables, mergers, methods: what is asked for.
        bits: of the main table.
        seeds: of the suites (data, models, heads) and of the calibration rows.
        samples: calibration rows per task.
        batch_size: of calibration.
        group_size: weights per scale; the suites' widths are divisible by 32.
        quick: the suites' tiny versions.
        device: None for a GPU where there is one.
        suites_from: module with the ``build_suite`` that makes them.
    """

    suites: tuple[str, ...] = SUITES
    tables: tuple[str, ...] = TABLES
    mergers: tuple[str, ...] = (*MERGERS, *CALIBRATED)
    methods: tuple[str, ...] = METHODS
    bits: tuple[int, ...] = (4, 3)
    bits_table: tuple[int, ...] = BITS_TABLE
    budget: tuple[int, ...] = BUDGET
    seeds: tuple[int, ...] = (0,)
    samples: int = 64
    batch_size: int = 16
    group_size: int = 32
    quick: bool = False
    device: str | None = None
    suites_from: str = "suites"


@dataclass(frozen=True)
class Cell:
    """One thing to compute: a model made, evaluated, and its figures kept.

    Attributes:
        kind: "suite", "base", "experts", "merge", "quantize" or "budget".
        suite, seed: where.
        merger, parameters: of the merge.
        method, bits, alpha, samples: of the quantization, None where they do not apply.
        variant, options: of E-PMQ, where it is another than the paper's: a name, and what
            ``EPMQConfig`` is given.
        held_out: score the rows that options are chosen with, too.
        choice: "alpha" or "gamma": take the best of the cells in ``needs`` by held-out rows.
        exclusive: nothing else may run meanwhile, because its seconds count.
    """

    kind: str
    suite: str
    seed: int
    merger: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None
    bits: int | None = None
    alpha: float | None = None
    samples: int | None = None
    held_out: bool = False
    choice: str | None = None
    exclusive: bool = False
    variant: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A line that a reader understands, and the same for equal cells only."""
        parts = [self.suite, f"seed {self.seed}", self.kind]
        if self.merger:
            shown = ", ".join(f"{key}={value}" for key, value in self.parameters.items())
            parts.append(f"{self.merger}({shown})")
        if self.choice:
            parts.append(f"{self.choice} by held-out rows")
        if self.method:
            parts.append(self.method)
        if self.variant:
            parts.append(self.variant)
        if self.bits:
            parts.append(f"{self.bits} bits")
        if self.alpha is not None:
            parts.append(f"alpha {self.alpha:g}")
        if self.samples:
            parts.append(f"{self.samples} rows")
        return " / ".join(parts)


def cell_key(cell: Cell, options: Options, facts: Mapping[str, Any]) -> str:
    """Hash of all that decides a cell's figures.

    Args:
        facts: versions, digest of the code, device.
    """
    decided = asdict(cell) | {
        "batch_size": options.batch_size,
        "group_size": options.group_size,
        "quick": options.quick,
        "device": options.device,
        "suites_from": options.suites_from,
        "facts": dict(facts),
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:20]


class Plan:
    """The cells of a run, each once, in an order in which what is needed comes first."""

    def __init__(self, options: Options):
        self.options = options
        self.cells: dict[str, Cell] = {}
        self.needs: dict[str, tuple[str, ...]] = {}
        for suite in options.suites:
            for seed in options.seeds:
                self._suite(suite, seed)

    def _add(self, cell: Cell, *needs: Cell) -> Cell:
        self.cells.setdefault(cell.name, cell)
        known = self.needs.get(cell.name, ())
        self.needs[cell.name] = tuple(dict.fromkeys((*known, *(n.name for n in needs))))
        return cell

    def _suite(self, suite: str, seed: int) -> None:
        options = self.options
        built = self._add(Cell("suite", suite, seed))
        self._add(Cell("base", suite, seed), built)
        self._add(Cell("experts", suite, seed), built)
        merges = {
            merger: self._merge(built, merger, MERGERS[merger])
            for merger in options.mergers
            if merger in MERGERS
        }
        if "main" in options.tables:
            for merger in options.mergers:
                if merger in MERGERS:
                    for bits in options.bits:
                        self._methods(merges[merger], bits)
                elif merger in CALIBRATED:
                    self._calibrated(built, merger)
        ablated = [merges[merger] for merger in ABLATED if merger in merges]
        for merge in ablated:
            if "alpha" in options.tables:
                self.quantized(merge, "GPTQ", 4)
                for alpha in ABLATION:
                    self.epmq(merge, 4, alpha)
            if "bits" in options.tables:
                for bits in options.bits_table:
                    self.quantized(merge, "GPTQ", bits)
                    self.epmq(merge, bits, paper_alpha_of(merge))
        if "budget" in options.tables and "task_arithmetic" in merges:
            for samples in options.budget:
                self.budget(merges["task_arithmetic"], samples)

    def _merge(self, built: Cell, merger: str, parameters: Mapping[str, Any], **more) -> Cell:
        return self._add(
            Cell("merge", built.suite, built.seed, merger, dict(parameters), **more), built
        )

    def _methods(self, merge: Cell, bits: int) -> None:
        for method in self.options.methods:
            if method != "E-PMQ":
                self.quantized(merge, method, bits)
                continue
            self.epmq(merge, bits, paper_alpha_of(merge))
            self.chosen_epmq(merge, bits)
            self.variant(merge, bits, BEST, {"profile": BEST})

    def variant(self, merge: Cell, bits: int, name: str, options: Mapping[str, Any]) -> Cell:
        """E-PMQ with other options than the paper's."""
        cell = _of(
            merge,
            kind="quantize",
            method="E-PMQ",
            bits=bits,
            samples=self.options.samples,
            variant=name,
            options=dict(options),
        )
        return self._add(cell, merge)

    def quantized(self, merge: Cell, method: str, bits: int) -> Cell:
        """A baseline of the host."""
        samples = None if method == "RTN" else self.options.samples
        cell = _of(merge, kind="quantize", method=method, bits=bits, samples=samples)
        return self._add(cell, merge)

    def epmq(self, merge: Cell, bits: int, alpha: float) -> Cell:
        """E-PMQ with a fixed alpha. With 4 bits it is a candidate of the choice, too."""
        cell = _of(
            merge,
            kind="quantize",
            method="E-PMQ",
            bits=bits,
            alpha=alpha,
            samples=self.options.samples,
            held_out=bits == self.options.bits[0],
        )
        return self._add(cell, merge)

    def chosen_epmq(self, merge: Cell, bits: int) -> Cell:
        """E-PMQ with the alpha that was best on the held-out rows at the first of the bits."""
        candidates = [self.epmq(merge, self.options.bits[0], alpha) for alpha in ALPHAS]
        cell = _of(
            merge,
            kind="quantize",
            method="E-PMQ",
            bits=bits,
            samples=self.options.samples,
            choice="alpha",
        )
        # Where it turns out to be the paper's alpha, its result is there already.
        self._add(cell, merge, *candidates, self.epmq(merge, bits, paper_alpha_of(merge)))
        return cell

    def _calibrated(self, built: Cell, merger: str) -> None:
        def merged(gamma: float) -> Cell:
            return self._merge(
                built,
                merger,
                {"reduce_non_diagonal_ratio": gamma},
                samples=self.options.samples,
                held_out=gamma in GAMMAS,
            )

        fixed = merged(GAMMA)
        candidates = [merged(gamma) for gamma in GAMMAS]
        chosen = self._add(
            Cell(
                "merge",
                built.suite,
                built.seed,
                merger,
                samples=self.options.samples,
                choice="gamma",
            ),
            *candidates,
        )
        if merger == "regmean_plusplus" and "GPTQ" in self.options.methods:
            for bits in self.options.bits:
                self.quantized(fixed, "GPTQ", bits)
                cell = _of(
                    chosen,
                    kind="quantize",
                    method="GPTQ",
                    bits=bits,
                    samples=self.options.samples,
                    choice="gamma",
                )
                self._add(cell, *candidates)

    def budget(self, merge: Cell, samples: int) -> Cell:
        """GPTQ and E-PMQ with so many rows per task, in one process, timed."""
        cell = _of(
            merge,
            kind="budget",
            bits=4,
            alpha=paper_alpha_of(merge),
            samples=samples,
            exclusive=True,
        )
        return self._add(cell, merge)


def _of(merge: Cell, **changes) -> Cell:
    """A cell on top of a merge."""
    return Cell(
        suite=merge.suite,
        seed=merge.seed,
        merger=merge.merger,
        parameters=dict(merge.parameters),
        **changes,
    )


def better(scores: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """What a choice is made by: mean accuracy over the tasks, then mean loss."""
    tasks: Sequence[Mapping[str, float]] = list(scores.values())
    accuracy = sum(task["accuracy"] for task in tasks) / len(tasks)
    loss = sum(task["loss"] for task in tasks) / len(tasks)
    return round(accuracy, 9), -loss
