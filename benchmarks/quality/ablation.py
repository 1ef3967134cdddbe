"""The ablation: which part of E-PMQ pays, over suites, mergers, bits and seeds, in recovery.

    recovery = (score − merged) / (experts − merged)

0 is the merge in full precision, 1 every expert on its own task. Scores are average accuracies over
the tasks of a suite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .plan import LABELS, MERGERS, VARIANTS, Cell, Options, Plan, paper_alpha_of
from .tables import average_of, markdown

# What decides the default at 4 bits; what is looked at with 3; and GPTQ with 8 to compare with.
BITS, LOW, HIGH = 4, 3, 8
REGMEAN = "RegMean++ → GPTQ"
GPTQ, PAPER_ROW = "GPTQ", "E-PMQ, the paper's"
# Those that may become the default are looked at with few bits, too.
CANDIDATES = ("+ residual correction", "with bias refit", "with channel anchor")

# (label, bits) → what a row of the tables is, given a merge.
Row = tuple[str, int]


class AblationPlan(Plan):
    """GPTQ, the paper's E-PMQ and every variant of ours on every merge; RegMean++ then GPTQ."""

    def _suite(self, suite: str, seed: int) -> None:
        options = self.options
        built = self._add(Cell("suite", suite, seed))
        self._add(Cell("base", suite, seed), built)
        self._add(Cell("experts", suite, seed), built)
        for merger in options.mergers:
            if merger in MERGERS:
                self._rows(self._merge(built, merger, MERGERS[merger]))
        self._calibrated(built, "regmean_plusplus")

    def _rows(self, merge: Cell) -> None:
        for bits in (BITS, LOW, HIGH):
            self.quantized(merge, "GPTQ", bits)
        for bits in (BITS, LOW):
            self.epmq(merge, bits, paper_alpha_of(merge))
        for name, options in VARIANTS.items():
            for bits in (BITS, LOW) if name in CANDIDATES else (BITS,):
                self.variant(merge, bits, name, options)


def default_variant() -> str:
    """The row that is the ``best`` profile of the package."""
    from epmq_gptq.config import PROFILES

    best = PROFILES["best"]._asdict()
    return next(name for name in CANDIDATES if best == best | {k: VARIANTS[name][k] for k in best})


class Ablation:
    """Recoveries of one run.

    Args:
        plan: what was asked for.
        results: name of a cell → result.
    """

    def __init__(self, plan: AblationPlan, results: Mapping[str, Mapping[str, Any]]):
        self.plan, self.results = plan, results
        self.options: Options = plan.options
        self.best = default_variant()
        self.mergers = [merger for merger in self.options.mergers if merger in MERGERS]

    # ---- scores --------------------------------------------------------------------------------

    def _score(self, suite: str, seed: int, **wanted: Any) -> float | None:
        for cell in self.plan.cells.values():
            if (cell.suite, cell.seed) == (suite, seed) and all(
                getattr(cell, key) == value for key, value in wanted.items()
            ):
                result = self.results.get(cell.name, {})
                return average_of(result, "accuracy") if "scores" in result else None
        return None

    def score(self, row: Row, suite: str, seed: int, merger: str) -> float | None:
        """Average accuracy (%) of a row's model."""
        label, bits = row
        wanted: dict[str, Any] = {"kind": "quantize", "bits": bits, "merger": merger}
        if label == REGMEAN:
            wanted |= {"merger": "regmean_plusplus", "method": "GPTQ", "choice": "gamma"}
        elif label == GPTQ:
            wanted |= {"method": "GPTQ"}
        elif label == PAPER_ROW:
            wanted |= {"method": "E-PMQ", "variant": None, "choice": None}
        else:
            wanted |= {"method": "E-PMQ", "variant": label}
        return self._score(suite, seed, **wanted)

    def ends(self, suite: str, seed: int, merger: str) -> tuple[float | None, float | None]:
        """Average accuracy of the merge and of the experts, in full precision."""
        merged = self._score(suite, seed, kind="merge", merger=merger, choice=None)
        return merged, self._score(suite, seed, kind="experts")

    def recovery(self, row: Row, suite: str, seed: int, merger: str) -> float | None:
        """Per cent of the gap between merge and experts."""
        merged, experts = self.ends(suite, seed, merger)
        score = self.score(row, suite, seed, merger)
        if None in (merged, experts, score) or experts == merged:
            return None
        return 100 * (score - merged) / (experts - merged)

    def over_mergers(self, row: Row, suite: str, seed: int) -> float | None:
        """The mean recovery over the mergers."""
        return _mean([self.recovery(row, suite, seed, merger) for merger in self.mergers])

    # ---- tables --------------------------------------------------------------------------------

    @property
    def rows(self) -> list[Row]:
        """In the order of the tables."""
        return [
            *((label, BITS) for label in (GPTQ, PAPER_ROW, *VARIANTS, REGMEAN)),
            *((label, LOW) for label in (GPTQ, PAPER_ROW, *CANDIDATES, REGMEAN)),
            (GPTQ, HIGH),
        ]

    def markdown(self) -> str:
        """All tables."""
        parts = [self.summary(), *(self.by_merger(suite) for suite in self.options.suites)]
        return "\n\n".join([*parts, self.goals()]) + "\n"

    def summary(self) -> str:
        """Recovery over the mergers, per suite."""
        body = [
            [*self._named(row), *(self._cell(row, suite) for suite in self.options.suites)]
            for row in self.rows
        ]
        header = ["model", "bits", *self.options.suites]
        return markdown("Recovery (%), mean over mergers", header, body)

    def _named(self, row: Row) -> list[str]:
        label, bits = row
        return [f"**{label} (the default)**" if label == self.best else label, str(bits)]

    def _cell(self, row: Row, suite: str) -> str:
        return spread([self.over_mergers(row, suite, seed) for seed in self.options.seeds])

    def by_merger(self, suite: str) -> str:
        """Accuracy and recovery of one suite, per merger."""
        seeds = self.options.seeds
        header = ["model", "bits", *(LABELS[merger] for merger in self.mergers)]
        ends = {
            merger: [self.ends(suite, seed, merger) for seed in seeds] for merger in self.mergers
        }
        body = [
            ["experts", "16", *(spread([e for _, e in ends[m]]) for m in self.mergers)],
            ["merged", "16", *(spread([f for f, _ in ends[m]]) for m in self.mergers)],
        ]
        for row in self.rows:
            cells = []
            for merger in self.mergers:
                accuracy = spread([self.score(row, suite, seed, merger) for seed in seeds])
                gain = _mean([self.recovery(row, suite, seed, merger) for seed in seeds])
                cells.append(accuracy if gain is None else f"{accuracy} · {gain:.0f} %")
            body.append([*self._named(row), *cells])
        return markdown(f"{suite}: average accuracy (%) · recovery", header, body)

    def goals(self) -> str:
        """What the default should reach, suite by suite, and what it does."""
        body = []
        for suite in self.options.suites:
            best, paper, regmean = (
                _mean(
                    [self.over_mergers((label, BITS), suite, seed) for seed in self.options.seeds]
                )
                for label in (self.best, PAPER_ROW, REGMEAN)
            )
            if None in (best, paper, regmean):
                continue
            body += [
                [suite, "twice the paper's recovery", *_judged(best, 2 * paper)],
                [suite, "the paper's + 20 points", *_judged(best, paper + 20)],
                [suite, f"{REGMEAN} + 10 points", *_judged(best, regmean + 10)],
                *self._never_below(suite),
                *self._low_bits(suite),
            ]
        header = ["suite", "the default against", "it has", "asked for", "reached"]
        return markdown("Goals: recovery (%), accuracy (%)", header, body)

    def _never_below(self, suite: str) -> list[list[str]]:
        """Against GPTQ of the same bits, merger by merger, less the spread over the seeds."""
        found = []
        for merger in self.mergers:
            pairs = self._pairs(suite, merger, (self.best, BITS), (GPTQ, BITS))
            if pairs:
                allowed = _mean([b for _, b in pairs]) - _deviation([a - b for a, b in pairs])
                label = f"GPTQ of {LABELS[merger]}, less the spread"
                found.append([suite, label, *_judged(_mean([a for a, _ in pairs]), allowed)])
        return found

    def _low_bits(self, suite: str) -> list[list[str]]:
        """3 bits against GPTQ's 8, wherever merging costs ten points or more."""
        found = []
        for merger in self.mergers:
            pairs = self._pairs(suite, merger, (self.best, LOW), (GPTQ, HIGH))
            ends = [self.ends(suite, seed, merger) for seed in self.options.seeds]
            cost = _mean([None if None in (m, e) else e - m for m, e in ends])
            if pairs and cost is not None and cost >= 10:
                label = f"{HIGH}-bit GPTQ of {LABELS[merger]}, with {LOW} bits"
                theirs = _mean([b for _, b in pairs])
                found.append([suite, label, *_judged(_mean([a for a, _ in pairs]), theirs)])
        return found

    def _pairs(self, suite: str, merger: str, one: Row, other: Row) -> list[tuple[float, float]]:
        scores = [
            (self.score(one, suite, seed, merger), self.score(other, suite, seed, merger))
            for seed in self.options.seeds
        ]
        return [(a, b) for a, b in scores if a is not None and b is not None]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return sum(known) / len(known) if known else None


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def spread(values: Sequence[float | None], shown: Callable[[float], str] = "{:.1f}".format) -> str:
    """Mean over the seeds, ± their standard deviation."""
    known = _known(values)
    if not known:
        return "-"
    mean = shown(sum(known) / len(known))
    return mean if len(known) == 1 else f"{mean} ± {shown(_deviation(known))}"


def _judged(got: float, asked: float) -> list[str]:
    return [f"{got:.1f}", f"{asked:.1f}", "yes" if got >= asked else f"no, by {asked - got:.1f}"]
