"""``epmq-gptq retention``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EPMQInputError
from .common import Json, Quiet, Verbose, examples, pairs, place, running

if TYPE_CHECKING:
    from rich.table import Table

    from ..retention import Retention


@examples(
    (
        "each expert on the task of its name",
        "epmq-gptq retention merged-4bit --quantized q.json \\\n"
        "    --expert math=math.json --expert code=code.json",
    ),
    (
        "tasks of lm-eval, beside the merge in full precision",
        "epmq-gptq retention merged-4bit --quantized q.json --merged m.json \\\n"
        "    --expert math=math.json --task math=gsm8k",
    ),
)
def retention(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The quantized checkpoint.")],
    quantized: Annotated[Path, typer.Option(help="File of `epmq-gptq evaluate DIR --json FILE`.")],
    expert: Annotated[
        list[str], typer.Option(help="name=FILE: the same of one expert; repeatable.")
    ],
    merged: Annotated[
        Path | None, typer.Option(help="The same of the merge in full precision.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The same of the base.")] = None,
    gptq: Annotated[
        Path | None, typer.Option(help="The same of the merge under plain GPTQ.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="name=TASK: what this expert is for; default the task of its name, or the only "
            "one. Repeatable."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="name=METRIC, where the task has several; default accuracy. Repeatable."),
    ] = None,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say how much of every expert a quantized merge has kept, from evaluations of all of them.

    Writes epmq_evaluation.json into DIR, where `report` and the model card find it."""
    with running(json_report, quiet, verbose, interrupted="nothing was written.") as run:
        from ..retention import EvaluationFile, combine, write_retention

        folder = place(folder)
        files = pairs(expert, "--expert")
        known = _experts_of(folder)
        _check_names(folder, known, files)
        others = {
            stage: EvaluationFile(place(file), f"--{stage}", quantized=stage == "gptq")
            for stage, file in (("base", base), ("merged", merged), ("gptq", gptq))
            if file is not None
        }
        found = combine(
            {
                name: EvaluationFile(place(Path(file)), f"--expert {name}")
                for name, file in files.items()
            },
            EvaluationFile(place(quantized), "--quantized", quantized=True),
            others,
            tasks=pairs(task or [], "--task"),
            metrics=pairs(metric or [], "--metric"),
        )
        run.show(retention_table(found))
        left = [name for name in known if name not in files]
        if left:
            run.reporter.note(f"not evaluated: {', '.join(left)}")
        run.reporter.step("retention", str(write_retention(folder, found)))
        run.write(found.to_dict())


def _experts_of(folder: Path) -> list[str]:
    """The experts that a checkpoint of ours was made from.

    Raises:
        EPMQInputError: it is none.
    """
    from ..folders import read_json

    record = read_json(folder, "quantize_config.json", f"`{folder.name}`")
    meta = record.get("meta")
    meta = meta.get("epmq") if isinstance(meta, dict) else None
    experts = meta.get("experts") if isinstance(meta, dict) else None
    if not isinstance(experts, list):
        raise EPMQInputError(
            f"`{folder.name}` does not say which experts it was made from, so it is not a "
            "checkpoint of epmq_gptq.",
            code="EPMQ-F53",
            subject="`DIR`",
            remedy="Give the folder that `epmq-gptq quantize` wrote.",
        )
    return [str(one["name"]) for one in experts if isinstance(one, dict) and "name" in one]


def _check_names(folder: Path, known: list[str], given: dict[str, str]) -> None:
    for name in given:
        if name not in known:
            raise EPMQInputError(
                f"`--expert`: `{folder.name}` has no expert `{name}`; it has {', '.join(known)}.",
                code="EPMQ-F54",
                subject="`--expert`",
                remedy="Name the experts as in the run.",
            )


def retention_table(retention: Retention) -> Table:
    """One line per expert: its figures, and how much of it is kept."""
    from rich.table import Table
    from rich.text import Text

    from ..retention import STAGES

    shown = [
        stage
        for stage in STAGES
        if any(getattr(one, stage) is not None for one in retention.experts.values())
    ]
    table = Table()
    for name in ("expert", "task", "metric"):
        table.add_column(name, overflow="fold")
    for stage in (*shown, "retention"):
        table.add_column(stage, justify="right", no_wrap=True)
    for name, one in retention.experts.items():
        metric = one.metric if one.higher_is_better else f"{one.metric} (less is better)"
        figures = [_figure(getattr(one, stage)) for stage in shown]
        # As Text: names are somebody's, and brackets in them are no markup.
        cells = [Text(cell) for cell in (name, one.task, metric)]
        table.add_row(*cells, *figures, _percent(one.percent()))
    if len(retention.experts) > 1:
        table.add_section()
        blank = [""] * (2 + len(shown))
        table.add_row("average", *blank, _percent(retention.average()), style="bold")
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
