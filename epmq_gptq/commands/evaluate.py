"""``epmq-gptq evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EPMQInputError
from .common import Json, Quiet, Run, Verbose, examples, place, running
from .completion import devices, dtypes, splits, suites

if TYPE_CHECKING:
    from ..console import Reporter
    from ..evaluation import Evaluation


@examples(
    ("on a suite that comes with the package", "epmq-gptq evaluate merged-4bit --suite text4"),
    (
        "on tasks of lm-eval (extra `eval`), 100 items of each",
        "epmq-gptq evaluate merged-4bit --tasks hellaswag,gsm8k --limit 100",
    ),
    (
        "a model of the hub, with all figures in a file",
        "epmq-gptq evaluate org/merged-7b@1a2b3c4 --tasks arc_easy --json scores.json",
    ),
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Folder or hub id org/name@revision: full precision, GPTQ or AWQ."),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="vision8, text4 or seq2seq4, which need no network; repeatable.",
            autocompletion=suites,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-eval, separated by commas (hellaswag,gsm8k); with one --suite, the "
            "tasks of it to run."
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="lm-eval: the first items of each task, or a share below 1."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="lm-eval: shots; default what each task says.")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Items per forward pass; lm-eval knows `auto`, too.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="lm-eval: folder with YAML files of own tasks.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="lm-eval: through the chat template.")
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="lm-eval: run code that the model wrote (HumanEval)."
        ),
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of the suite (default 0), or of lm-eval (1234).")
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Of a suite: evaluation, or held_out for choosing options.", autocompletion=splits
        ),
    ] = "evaluation",
    quick: Annotated[
        bool, typer.Option("--quick", help="The suite's tiny version, to see that all runs.")
    ] = False,
    kernel: Annotated[
        bool,
        typer.Option(
            "--kernel",
            help="Compute with GPTQModel's kernel on a CPU as well; default there: the "
            "dequantized weights in float32. A GPU always takes the kernel.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; default float32 on a CPU.", autocompletion=dtypes
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu or cuda; default: a GPU where torch sees one.", autocompletion=devices
        ),
    ] = None,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a model on the suites that come with this package, or on any task of lm-eval."""
    with running(json_report, quiet, verbose) as run:
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        _check(suite or [], names, batch_size, split, limit)
        loading = {"device": device, "dtype": dtype, "dense": False if kernel else None}
        with run.reporter.quiet_host():
            if suite:
                building = {"seed": seed or 0, "quick": quick, "device": device}
                size = None if batch_size is None else int(batch_size)
                options = {"split": split, "batch_size": size}
                results = _run_suites(run.reporter, model, suite, names, loading, building, options)
            else:
                options = {
                    "limit": limit if limit is None or limit < 1 else int(limit),
                    "num_fewshot": num_fewshot,
                    "batch_size": _batch_size(batch_size),
                    "apply_chat_template": apply_chat_template,
                    "confirm_run_unsafe_code": confirm_run_unsafe_code,
                    **({} if seed is None else {"seed": seed}),
                }
                results = _run_tasks(run.reporter, model, names, include_path, loading, options)
        _show(run, results)


def _show(run: Run, results: list[Evaluation]) -> None:
    """The tables, and all of it as JSON where that was asked for."""
    from ..evaluation.results import environment, table_of

    for result in results:
        run.show(table_of(result))
    run.write(environment() | {"evaluations": [result.to_dict() for result in results]})


def _check(
    suites: list[str], tasks: list[str], batch_size: str | None, split: str, limit: float | None
) -> None:
    def refuse(option: str, cause: str, remedy: str, code: str = "EPMQ-O01") -> EPMQInputError:
        return EPMQInputError(cause, code=code, subject=f"`{option}`", remedy=remedy)

    if not suites and not tasks:
        raise refuse(
            "--suite",
            "there is nothing to evaluate on.",
            "Give `--suite text4` (or vision8, seq2seq4), or tasks of lm-eval with `--tasks`.",
            "EPMQ-O03",
        )
    if len(suites) > 1 and tasks:
        raise refuse(
            "--tasks",
            "`--tasks` goes with one `--suite` or none, got several.",
            "Run the suites one by one.",
            "EPMQ-O03",
        )
    if split not in ("evaluation", "held_out"):
        raise refuse(
            "--split",
            f"`--split` should be evaluation or held_out, got `{split}`.",
            "Leave it out for evaluation.",
        )
    if limit is not None and limit <= 0:
        raise refuse("--limit", f"`--limit` should be positive, got {limit}.", "Leave it out.")
    is_auto = batch_size is not None and batch_size.startswith("auto") and not suites
    if batch_size is not None and not is_auto and not (batch_size.isdigit() and int(batch_size)):
        raise refuse(
            "--batch-size",
            f"`--batch-size` should be a positive integer, got `{batch_size}`.",
            "Leave it out; `auto` goes with lm-eval's tasks.",
        )


def _batch_size(text: str | None) -> int | str:
    if text is None:
        return 1
    return int(text) if text.isdigit() else text


def _run_suites(
    reporter: Reporter,
    model: str,
    names: list[str],
    tasks: list[str],
    loading: dict,
    building: dict,
    options: dict,
) -> list[Evaluation]:
    from ..evaluation import evaluate_suite, load_model
    from ..evaluation.suites import check_suite_tasks
    from ..suites import SUITES, build_suite

    for name in names:
        if name not in SUITES:
            raise EPMQInputError(
                f"`--suite` should be one of {', '.join(SUITES)}, got `{name}`.",
                code="EPMQ-O02",
                subject="`--suite`",
                remedy="Correct the name; lm-eval's tasks go with `--tasks`.",
            )
    suites = []
    for name in names:
        reporter.step("suite", f"{name}: from the cache, or built now (minutes)")
        suites.append(build_suite(name, **building))
        check_suite_tasks(suites[-1], tasks or None)
    loaded = load_model(model, **loading)
    reporter.step("load", _load_line(loaded))
    return [evaluate_suite(loaded, suite, tasks or None, **options) for suite in suites]


def _run_tasks(
    reporter: Reporter,
    model: str,
    names: list[str],
    include_path: Path | None,
    loading: dict,
    options: dict,
) -> list[Evaluation]:
    from ..evaluation import load_model
    from ..evaluation.harness import TaskOptions, evaluate_tasks, prepare_tasks

    prepared = prepare_tasks(names, None if include_path is None else place(include_path))
    reporter.step("tasks", ", ".join(prepared.names))
    loaded = load_model(model, **loading)
    reporter.step("load", _load_line(loaded))
    return [evaluate_tasks(loaded, prepared, TaskOptions(**options))]


def _load_line(loaded) -> str:
    quantization = loaded.quantization
    if quantization is None:
        how = "full precision"
    else:
        how = (
            f"{quantization['method']}, {quantization['bits']} bits, "
            f"groups of {quantization['group_size']}, computed by {quantization['kernel']}"
        )
    return f"{loaded.name}: {type(loaded.module).__name__}, {how}, {loaded.dtype}"
