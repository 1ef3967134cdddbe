"""One evaluation as the command line and the Python API ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EPMQInputError

if TYPE_CHECKING:
    from ..io.console import Reporter
    from .loading import Loaded
    from .results import Evaluation


@dataclass(frozen=True)
class EvaluationRequest:
    """What a model is evaluated on, and how.

    Attributes:
        suites: of those that come with this package.
        tasks: of lm-eval; with one suite, the tasks of it to run.
        limit, num_fewshot, include_path, apply_chat_template, confirm_run_unsafe_code: of lm-eval.
        batch_size: items per forward pass; lm-eval knows ``"auto"``, too.
        seed: of the suite (default 0), or of lm-eval.
        split: of a suite, ``"evaluation"`` or ``"held_out"``.
        quick: the suite's tiny version.
        kernel: compute with GPTQModel's kernel on a CPU as well.
        dtype, device: of the model.

    Raises:
        EPMQInputError: an option has a wrong value, or does not go with another.
    """

    suites: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int | str | None = None
    include_path: Path | None = None
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    seed: int | None = None
    split: str = "evaluation"
    quick: bool = False
    kernel: bool = False
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.suites and not self.tasks:
            raise _refused(
                "--suite",
                "there is nothing to evaluate on.",
                "Give `--suite text4` (or vision8, seq2seq4), or tasks of lm-eval with `--tasks`.",
                "EPMQ-O03",
            )
        if len(self.suites) > 1 and self.tasks:
            raise _refused(
                "--tasks",
                "`--tasks` goes with one `--suite` or none, got several.",
                "Run the suites one by one.",
                "EPMQ-O03",
            )
        if self.split not in ("evaluation", "held_out"):
            raise _refused(
                "--split",
                f"`--split` should be evaluation or held_out, got `{self.split}`.",
                "Leave it out for evaluation.",
            )
        if self.limit is not None and self.limit <= 0:
            raise _refused(
                "--limit", f"`--limit` should be positive, got {self.limit}.", "Leave it out."
            )
        self._check_batch_size()

    def _check_batch_size(self) -> None:
        size = str(self.batch_size)
        is_auto = size.startswith("auto") and not self.suites
        if self.batch_size is not None and not is_auto and not (size.isdigit() and int(size)):
            raise _refused(
                "--batch-size",
                f"`--batch-size` should be a positive integer, got `{size}`.",
                "Leave it out; `auto` goes with lm-eval's tasks.",
            )

    @property
    def count(self) -> int | str | None:
        """The batch size as a number where it is one."""
        size = str(self.batch_size)
        return int(size) if size.isdigit() else self.batch_size


def _refused(option: str, cause: str, remedy: str, code: str = "EPMQ-O01") -> EPMQInputError:
    return EPMQInputError(cause, code=code, subject=f"`{option}`", remedy=remedy)


def run_request(model: str, request: EvaluationRequest, reporter: Reporter) -> list[Evaluation]:
    """Evaluate a model; one result per suite, or one of lm-eval.

    Args:
        model: folder or hub id: full precision, GPTQ or AWQ.
        request: on what.
        reporter: told what is going on.

    Raises:
        EPMQInputError: there is no such suite or task, or the model cannot be loaded.
    """
    return (_run_suites if request.suites else _run_tasks)(model, request, reporter)


def _run_suites(model: str, request: EvaluationRequest, reporter: Reporter) -> list[Evaluation]:
    from ..suites import SUITES, build_suite
    from .suites import check_suite_tasks, evaluate_suite

    for name in request.suites:
        if name not in SUITES:
            raise _refused(
                "--suite",
                f"`--suite` should be one of {', '.join(SUITES)}, got `{name}`.",
                "Correct the name; lm-eval's tasks go with `--tasks`.",
                "EPMQ-O02",
            )
    tasks = list(request.tasks) or None
    suites = []
    for name in request.suites:
        reporter.step("suite", f"{name}: from the cache, or built now (minutes)")
        suites.append(
            build_suite(name, seed=request.seed or 0, quick=request.quick, device=request.device)
        )
        check_suite_tasks(suites[-1], tasks)
    loaded = _load(model, request, reporter)
    options = {"split": request.split, "batch_size": request.count}
    return [evaluate_suite(loaded, suite, tasks, **options) for suite in suites]


def _run_tasks(model: str, request: EvaluationRequest, reporter: Reporter) -> list[Evaluation]:
    from .harness import TaskOptions, evaluate_tasks, prepare_tasks

    prepared = prepare_tasks(list(request.tasks), request.include_path)
    reporter.step("tasks", ", ".join(prepared.names))
    limit = request.limit
    options = TaskOptions(
        limit=limit if limit is None or limit < 1 else int(limit),
        num_fewshot=request.num_fewshot,
        batch_size=1 if request.batch_size is None else request.count,
        apply_chat_template=request.apply_chat_template,
        confirm_run_unsafe_code=request.confirm_run_unsafe_code,
        **({} if request.seed is None else {"seed": request.seed}),
    )
    return [evaluate_tasks(_load(model, request, reporter), prepared, options)]


def _load(model: str, request: EvaluationRequest, reporter: Reporter) -> Loaded:
    from .loading import load_model

    loaded = load_model(
        model,
        device=request.device,
        dtype=request.dtype,
        dense=False if request.kernel else None,
    )
    reporter.step("load", _described(loaded))
    return loaded


def _described(loaded: Loaded) -> str:
    quantization = loaded.quantization
    if quantization is None:
        how = "full precision"
    else:
        how = (
            f"{quantization['method']}, {quantization['bits']} bits, "
            f"groups of {quantization['group_size']}, computed by {quantization['kernel']}"
        )
    return f"{loaded.name}: {type(loaded.module).__name__}, {how}, {loaded.dtype}"
