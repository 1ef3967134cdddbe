"""What the demo can be asked, what it answers, and its one table. Light to import: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from .domains import DOMAINS

RESULT_NAME = "demo_result.json"

# The row of E-PMQ as it is in the paper, and its alpha: the best of the paper's 0.01, 0.1, 1 and 10
# by average loss, on 64 rows per domain that are neither calibrated on nor evaluated (2.086, 2.105,
# 2.125, 2.127; GPTQ 2.127, the merge 2.126).
PAPER, PAPER_ALPHA = "E-PMQ, the paper's", 0.01
UNQUANTIZED = {"base": "base", "experts": "each expert, own domain", "merged": "merged"}


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``epmq-gptq demo``.

    Attributes:
        out: folder of the E-PMQ checkpoint; ``demo_result.json`` is written beside it.
        cache: where the trained models are kept; None for the user's cache folder.
        bits, group_size: of the quantization, the same for all methods.
        alpha: of E-PMQ; None for what its default profile chooses.
        awq: also GPTQModel's AWQ (minutes on a CPU).
        seed: of the models and the data.
        merge_method, merge_parameters: see ``epmq_gptq.merging``.
        calibration_rows, evaluation_rows: per domain.
        quick: tiny models that learn next to nothing; only to see that everything runs.
        retrain: train again although the models are there.
        overwrite: replace what is in ``out``.
    """

    out: Path
    cache: Path | None = None
    bits: int = 4
    group_size: int = 32
    alpha: float | None = None
    awq: bool = False
    seed: int = 0
    merge_method: str = "average"
    merge_parameters: Mapping[str, object] = field(default_factory=dict)
    calibration_rows: int = 64
    evaluation_rows: int = 64
    quick: bool = False
    retrain: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Score:
    """What a model does on one domain.

    Attributes:
        loss: mean cross-entropy over the scored tokens, in nats.
        accuracy: share of spans whose every token is the most likely one. For an answer this is
            exactly "greedy decoding gives the answer"; for a text, next-token accuracy.
    """

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Served:
    """What a fresh process with GPTQModel alone made of the checkpoint.

    Attributes:
        texts: domain → the greedy continuation of its prompt.
        packed: how many linear layers were loaded as packed ones.
    """

    texts: dict[str, str]
    packed: int


@dataclass
class DemoResult:
    """All numbers of a run.

    Attributes:
        scores: row of the table → domain → loss and accuracy, in the table's order.
        seconds: stage → wall time.
        parameters: of one model.
        trained: whether the models were trained in this run.
        checkpoint: the saved E-PMQ checkpoint.
        served: see :class:`Served`.
        settings: bits, group size and the other options that decide the numbers.
    """

    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    trained: bool = False
    checkpoint: Path | None = None
    served: Served | None = None
    settings: dict[str, object] = field(default_factory=dict)

    def average(self, row: str) -> Score:
        """Mean over the domains of one row."""
        scores = self.scores[row].values()
        return Score(
            sum(s.loss for s in scores) / len(scores),
            sum(s.accuracy for s in scores) / len(scores),
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data; of the checkpoint only its name, so that it can be published."""
        return asdict(self) | {
            "checkpoint": self.checkpoint.name if self.checkpoint else None,
            "averages": {row: asdict(self.average(row)) for row in self.scores},
        }


def result_table(result: DemoResult) -> Table:
    """One row per model, per domain loss and accuracy, and the averages.

    Accuracy is exact answers for the generated domains and next tokens for the texts.
    """
    bits = result.settings["bits"]
    table = Table(
        title=f"{bits} bits, groups of {result.settings['group_size']}: loss (nats) · accuracy (%)",
        caption="arithmetic, sorting: exact answers to unseen questions; "
        "code, prose: next tokens of unseen files",
    )
    table.add_column("model", no_wrap=True)
    for name in (*DOMAINS, "average"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, scores in result.scores.items():
        shown = [*(scores[name] for name in DOMAINS), result.average(row)]
        table.add_row(
            UNQUANTIZED.get(row, f"{row} (merged, {bits} bits)"),
            *(f"{score.loss:.3f} · {100 * score.accuracy:.1f}" for score in shown),
            style="bold" if row == "E-PMQ" else None,
            end_section=row == "merged",
        )
    return table
