"""From a checkpoint on: evaluate, report, check, describe and publish it; explain an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..errors import EPMQError
from .session import Result, path_of, session

if TYPE_CHECKING:
    from ..checks.engines import ServingReport
    from ..evaluation import Evaluation
    from ..publish.page.retention import Retention
    from ..publish.push import Pushed


# ---- evaluate ------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class EvaluateResult(Result):
    """Figures of one model.

    Attributes:
        evaluation: every figure, with what decided it.
    """

    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        from ..evaluation.results import evaluation_document

        return evaluation_document([self.evaluation])

    def print_to(self, console: Console) -> None:
        from ..evaluation.results import table_of

        console.print(table_of(self.evaluation))


def evaluate(
    model: str | Path,
    tasks: str | Sequence[str],
    *,
    include_path: str | Path | None = None,
    kernel: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = False,
    **options: Any,
) -> EvaluateResult:
    """Evaluate a model on tasks of lm-eval; ``epmq-gptq evaluate``.

    Args:
        model: folder or hub id: full precision, GPTQ or AWQ.
        tasks: names or patterns.
        include_path: folder with YAML files of own tasks.
        kernel: compute with GPTQModel's kernel on a CPU as well.
        dtype, device: of the computation.
        progress: say what is going on.
        options: of lm-eval, see :class:`~epmq_gptq.evaluation.TaskOptions`.

    Raises:
        EPMQInputError: there is no such task or option, or the model cannot be loaded.
    """
    with session(progress) as reporter:
        from ..evaluation import TaskOptions, evaluate_model
        from ..io.declared import unknown_key

        known = list(TaskOptions.__dataclass_fields__)
        for key in set(options) - set(known):
            raise unknown_key(key, known, "`evaluate`", "`evaluate`")
        with reporter.quiet_host():
            result = evaluate_model(
                str(model),
                [tasks] if isinstance(tasks, str) else list(tasks),
                TaskOptions(**options),
                include_path=None if include_path is None else path_of(include_path),
                kernel=kernel,
                dtype=dtype,
                device=device,
                say=reporter.step,
            )
        return EvaluateResult(result)


# ---- report and retention ------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class ReportResult(Result):
    """What a run did to each expert.

    Attributes:
        figures: see :func:`epmq_gptq.publish.page.report_figures`.
        out: file of the page, None where none was written.
    """

    figures: dict[str, Any]
    out: Path | None = None

    @property
    def page(self) -> str:
        """The page: one HTML document that needs no network."""
        from ..publish.page.render import page_of

        return page_of(self.figures)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.figures)

    def print_to(self, console: Console) -> None:
        from ..publish.page.table import expert_table

        console.print(expert_table(self.figures))

    def __repr__(self) -> str:
        run = self.figures["run"]
        return f"<ReportResult {run['checkpoint']}: {len(self.figures['experts'])} experts>"


def report(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    baseline: str | Path | None = None,
    evaluation: str | Path | None = None,
    overwrite: bool = False,
) -> ReportResult:
    """What a run did to each expert, module by module; ``epmq-gptq report``.

    Args:
        folder: of the quantized checkpoint.
        out: file of the page, ending in .html; None writes none.
        baseline: folder of the same merge under plain GPTQ (``profile="gptq"``).
        evaluation: file of :func:`retention`; None for the one in ``folder``, if there.
        overwrite: replace a page.

    Raises:
        EPMQInputError: there is no report, what was given belongs to another model, or the place
            is taken.
    """
    from ..publish.page.sources import Sources, check_page

    given = [None if one is None else path_of(one) for one in (folder, baseline, evaluation)]
    sources = Sources.read(*given)
    page = None if out is None else path_of(out)
    if page is not None:
        check_page(page, [one for one in given if one is not None], overwrite)
    result = ReportResult(sources.figures(), page)
    if page is not None:
        from ..io.output import write_whole

        write_whole(page, result.page)
    return result


@dataclass(frozen=True, repr=False)
class RetentionResult(Result):
    """How much of every expert is kept.

    Attributes:
        retention: the figures.
        out: the file that they were written to.
    """

    retention: Retention
    out: Path

    def to_dict(self) -> dict[str, Any]:
        return self.retention.to_dict()

    def print_to(self, console: Console) -> None:
        from ..publish.page.table import retention_table

        console.print(retention_table(self.retention))

    def __repr__(self) -> str:
        return f"<RetentionResult: {len(self.retention.experts)} experts>"


def retention(
    folder: str | Path,
    *,
    quantized: str | Path,
    experts: Mapping[str, str | Path],
    merged: str | Path | None = None,
    base: str | Path | None = None,
    gptq: str | Path | None = None,
    task: Mapping[str, str] | None = None,
    metric: Mapping[str, str] | None = None,
) -> RetentionResult:
    """How much of every expert a quantized merge has kept; ``epmq-gptq retention``.

    Writes ``epmq_evaluation.json`` into ``folder``, where :func:`report` and the card find it.

    Args:
        folder: of the quantized checkpoint.
        quantized, merged, base, gptq: files of ``epmq-gptq evaluate --json`` about these models.
        experts: name → the same about that expert.
        task, metric: name → what that expert is for, and how it is measured, where it is not clear.

    Raises:
        EPMQInputError: a file cannot be used, or models were not measured alike.
    """
    from ..publish.page.retention import retention_of, write_retention

    place = path_of(folder)
    others = {"base": base, "merged": merged, "gptq": gptq}
    found, _ = retention_of(
        place,
        quantized=path_of(quantized),
        experts={name: path_of(file) for name, file in experts.items()},
        others={stage: path_of(file) for stage, file in others.items() if file is not None},
        tasks=task,
        metrics=metric,
    )
    return RetentionResult(found, write_retention(place, found))


# ---- check ---------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CheckResult(Result):
    """Which engines can serve a checkpoint.

    Attributes:
        serving: verdicts, reasons, and what was found in the files.
    """

    serving: ServingReport

    @property
    def ok(self) -> bool:
        """Whether it can be served: the command would leave with 0."""
        return self.serving.is_served

    def to_dict(self) -> dict[str, Any]:
        return self.serving.to_dict()

    def print_to(self, console: Console) -> None:
        from ..checks.engines.printing import print_serving

        print_serving(console, self.serving)

    def __repr__(self) -> str:
        return f"<CheckResult: {'served' if self.ok else 'not served'}>"


def check(
    checkpoint: str | Path, *, engines: Sequence[str] = (), tensor_parallel: int = 1
) -> CheckResult:
    """Say which engines can serve a finished checkpoint, and why not; ``epmq-gptq check``.

    Args:
        checkpoint: folder or hub id of any GPTQ checkpoint.
        engines: "vLLM", "SGLang", "transformers", "GPTQModel", "TGI"; all but TGI where none is
            given.
        tensor_parallel: GPUs that shall share each layer.

    Raises:
        EPMQInputError: it cannot be read, or there is no such engine.
    """
    with session(False) as reporter, reporter.quiet_host():
        from ..checks.engines import check_checkpoint

        found = check_checkpoint(str(checkpoint), engines=engines, tensor_parallel=tensor_parallel)
        return CheckResult(found)


# ---- card and push -------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CardResult(Result):
    """A model card.

    Attributes:
        text: Markdown with the hub's metadata.
        written: whether it is in the checkpoint now.
    """

    text: str
    written: bool

    def to_dict(self) -> dict[str, Any]:
        return {"card": self.text, "written": self.written}

    def print_to(self, console: Console) -> None:
        console.out(self.text, end="", highlight=False)

    def __repr__(self) -> str:
        return f"<CardResult: {len(self.text.splitlines())} lines>"


def card(
    folder: str | Path,
    *,
    dry_run: bool = False,
    repo_id: str | None = None,
    title: str | None = None,
    license: str | None = None,
    names: bool = False,
    overwrite: bool = False,
) -> CardResult:
    """Write a checkpoint's model card anew; ``epmq-gptq card``.

    Args:
        folder: of the checkpoint.
        dry_run: write nothing.
        repo_id: "org/name" that the card's examples load.
        title: of the card.
        license: identifier of a hub, over what all sources declare.
        names: also give the folder names of local models.
        overwrite: replace a card that was edited by hand.

    Raises:
        EPMQInputError: the checkpoint is none of ours, or its card was edited by hand.
    """
    with session(False) as reporter, reporter.quiet_host():
        from ..publish.card import model_card, write_card

        options = dict(repo_id=repo_id, title=title, license=license, include_names=names)
        folder = path_of(folder)
        if dry_run:
            return CardResult(model_card(folder, **options), False)
        return CardResult(write_card(folder, overwrite=overwrite, **options), True)


@dataclass(frozen=True, repr=False)
class PushResult(Result):
    """What was uploaded.

    Attributes:
        pushed: where to, files and sizes.
    """

    pushed: Pushed

    @property
    def url(self) -> str | None:
        """Of the commit or the pull request; None for a dry run."""
        return self.pushed.url

    def to_dict(self) -> dict[str, Any]:
        return self.pushed.to_dict()

    def print_to(self, console: Console) -> None:
        from ..commands.summary import columns
        from ..io.console import human_size

        console.print(columns((name, human_size(size)) for name, size in self.pushed.files.items()))

    def __repr__(self) -> str:
        return f"<PushResult {self.pushed}>"


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    with_report: bool = False,
    with_code: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> PushResult:
    """Upload a checkpoint to a hub, checked first and by one commit; ``epmq-gptq push``.

    Args:
        folder: of the checkpoint.
        repo_id: "org/name".
        private: whether a new repository is private; None for the hub's default.
        revision: branch, made if it is not there, or "refs/pr/N".
        create_pr: open a pull request instead of committing.
        with_report: also the report of the run and the evaluation.
        with_code: also the code that the model brings (``auto_map``).
        commit_message: of the commit.
        token: in place of the one that is stored on this machine.
        dry_run: check, list and send nothing.
        progress: say what is going on.

    Raises:
        EPMQInputError: the checkpoint, the token or the repository cannot be used.
        EPMQError: the upload broke off; the same call goes on where it was.
    """
    with session(progress) as reporter, reporter.quiet_host():
        from ..publish.push import push as push_folder

        done = push_folder(
            path_of(folder),
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            with_report=with_report,
            with_code=with_code,
            commit_message=commit_message,
            token=token,
            dry_run=dry_run,
            reporter=reporter,
        )
        return PushResult(done)


# ---- explain -------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class ExplainResult(Result):
    """What an error code means.

    Attributes:
        entry: ``code``, ``title``, ``means``, ``cause``, ``remedy``, ``example``.
    """

    entry: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.entry)

    def print_to(self, console: Console) -> None:
        from ..commands.explanations import entry_table

        console.print(entry_table(self.entry))

    def __repr__(self) -> str:
        return f"<ExplainResult {self.entry['code']}: {self.entry['title']}>"


def explain(code: str | EPMQError) -> ExplainResult:
    """What an error code means, why it comes and what to do; ``epmq-gptq explain``.

    Args:
        code: such as "EPMQ-F30" or "F30", or the error itself.

    Raises:
        EPMQInputError: there is no such code.
    """
    from ..commands.explanations import as_dict

    return ExplainResult(as_dict(code.code if isinstance(code, EPMQError) else code))
