"""``epmq-gptq``: quantize a merge towards its experts, from a shell.

Only light modules are imported here: GPTQModel takes seconds, and `--help` or a typo in a recipe
should not have to wait for it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import __version__
from .console import EXIT_INPUT, Reporter
from .demo.options import ALPHA as DEMO_ALPHA
from .errors import EPMQError, EPMQInputError
from .lineage import Given
from .options import parse_yaml
from .recipe import recipe_help
from .summary import columns, folder_size, human_size, print_summary
from .targets import check_file, read_target, write_draft

app = typer.Typer(
    name="epmq-gptq",
    help="Expert-guided post-merge quantization (E-PMQ, arXiv 2605.16882): a merged model and the "
    "experts it was made of in, a standard GPTQ checkpoint out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# A recipe's keys, documented where they are defined.
_RECIPE_HELP = "[bold]Keys of a recipe[/bold] (YAML)\n\n" + "\n\n".join(
    f"{key.strip() if key == key.strip() else '· ' + key.strip()}: {doc}".replace("[", r"\[")
    for key, doc in recipe_help()
)

Out = Annotated[Path, typer.Option("--out", help="Folder of the new checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show GPTQModel's own log, and tracebacks.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"epmq-gptq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog=_RECIPE_HELP)
def quantize(
    target: Annotated[
        str,
        typer.Argument(
            help="A recipe (YAML file; its keys are below), or a merged model: folder or hub id."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the new checkpoint.")] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a merged model: name=SPEC per expert, SPEC being a file, data_free, or what a "
            "recipe has there ('{dataset: org/x, samples: 128}'); or one YAML file with all."
        ),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(help="Of a merged model: name=folder or name=org/model@revision; repeatable."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Of a merged model: what the experts were fine-tuned from.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of a merged model: key=value under `quantize`; repeatable."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a merged model: `dtype` of a recipe.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of a merged model: `seed` of a recipe.")] = None,
    write_recipe: Annotated[
        Path | None,
        typer.Option(help="Of a merged model: write what is known as a recipe, and stop."),
    ] = None,
    overwrite: Overwrite = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: a GPU where torch sees one.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per forward pass, instead of the recipe's.")
    ] = None,
    json_report: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers of the run to this file.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Show every layer, however many.")] = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a merged model towards its experts: one with a recipe, or one that says itself
    what it was merged from (mergekit's configuration, a model card)."""
    reporter = Reporter(verbose=verbose)
    with reporter.exit_codes(lambda error: _write_error(json_report, error)):
        if json_report is not None:
            check_file(json_report, "--json")
        given = Given(
            experts=_pairs(expert or [], "--expert"),
            base=base,
            calibration=tuple(calibration or ()),
            quantize=_values(setting or [], "--set"),
            dtype=dtype,
            seed=seed,
        )
        if write_recipe is not None:
            write_draft(target, given, write_recipe, reporter, overwrite=overwrite)
            return
        if out is None:
            raise EPMQInputError(
                "`--out` is missing: the folder of the new checkpoint.",
                code="EPMQ-O01",
                subject="`--out`",
                remedy="Give a folder that is new or empty.",
            )
        from .pipeline import RunOptions, quantize_recipe

        read = read_target(target, given, reporter)
        result = quantize_recipe(read, RunOptions(out, overwrite, device, batch_size), reporter)
        print_summary(reporter.out, result.report, result.rows, full=full)
        _print_checkpoint(reporter, out)
        if json_report is not None:
            report = {
                "epmq_gptq": __version__,
                "recipe": read.to_options(),
                "checkpoint": out.name,
                "cut_rows": {name: rows.cut for name, rows in result.rows.items()},
                "report": result.report.to_dict(),
                "host_warnings": list(reporter.host.alarms),
            }
            json_report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            reporter.step("report", str(json_report))


def _write_error(file: Path | None, error: EPMQError) -> None:
    """What scripts read when there is no report; the place itself may be what is wrong."""
    if file is not None:
        with contextlib.suppress(OSError):
            text = json.dumps({"epmq_gptq": __version__, "error": error.to_dict()}, indent=2)
            file.write_text(text + "\n", encoding="utf-8")


def _print_checkpoint(reporter: Reporter, out: Path) -> None:
    size, files = folder_size(out)
    reporter.step("checkpoint", f"{out}: {human_size(size)} in {files} files")
    if reporter.host.alarms:
        count = len(reporter.host.alarms)
        reporter.note(f"GPTQModel gave {count} warnings on the way; --verbose shows them.")


@app.command()
def merge(
    method: Annotated[str, typer.Option(help="Merge method; `epmq-gptq methods` lists them.")],
    expert: Annotated[
        list[str], typer.Option(help="name=folder or name=org/model@revision; once per expert.")
    ],
    out: Out,
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id the experts were fine-tuned from.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="key=value, an option of the method; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the arithmetic runs: cpu or cuda.")] = "cpu",
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Merge experts of one base into a new model."""
    reporter = Reporter(verbose=verbose)
    with reporter.exit_codes():
        experts = _pairs(expert, "--expert")
        parameters = _values(param or [], "--param")
        with reporter.quiet_host():
            from .pipeline import check_free, merge_with_progress

            check_free(out, overwrite=overwrite)
            result = merge_with_progress(
                reporter,
                method,
                base=base,
                experts=experts,
                out=out,
                parameters=parameters,
                overwrite=overwrite,
                device=device,
            )
        reporter.step("merged", f"{out}: {human_size(result.bytes)} in {result.tensors} tensors")


def _pairs(values: list[str], option: str) -> dict[str, str]:
    """``name=value`` options as a dict.

    Raises:
        EPMQInputError: one without a name or a value, or a name given twice.
    """
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            raise EPMQInputError(
                f"`{option}` should be of the form name=value, got `{value}`.",
                code="EPMQ-O01",
                subject=f"`{option}`",
                remedy="Write it so, without spaces around the sign.",
            )
        if name in pairs:
            raise EPMQInputError(
                f"`{option}`: `{name}` is given twice.",
                code="EPMQ-O01",
                subject=f"`{option}`",
                remedy="Keep one.",
            )
        pairs[name] = text
    return pairs


def _values(values: list[str], option: str) -> dict[str, Any]:
    """``key=value`` options as a dict; values are read as YAML."""
    result = {}
    for key, value in _pairs(values, option).items():
        try:
            result[key] = parse_yaml(value)
        except EPMQInputError as error:
            raise error.within(f"`{option} {key}`") from error
    return result


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(help="A recipe (YAML file), or a merged model: folder or hub id.")
    ],
    verify: Annotated[
        str,
        typer.Option(
            help="headers: no weights; sample: up to 32 MB of each model; full: all weights, and "
            "NaN and infinities are counted."
        ),
    ] = "sample",
    json_report: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file; - for stdout.")
    ] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help="Of a merged model: as in `quantize`; repeatable.")
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="Of a merged model: as in `quantize`; repeatable.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of a merged model: as in `quantize`.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value under `quantize`, over a recipe's; repeatable."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="That the run would take: for the estimate of its time.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Say what is wrong with the inputs of a run, and what it would cost, without running it.

    Exits with 2 where a run cannot succeed."""
    reporter = Reporter(verbose=verbose)
    is_piped = str(json_report) == "-"
    file = None if is_piped else json_report
    console = reporter.out
    if is_piped:
        reporter.out = reporter.err
    with reporter.exit_codes(lambda error: _write_error(file, error)):
        if file is not None:
            check_file(file, "--json")
        given = Given(
            experts=_pairs(expert or [], "--expert"),
            base=base,
            calibration=tuple(calibration or ()),
            quantize=_values(setting or [], "--set"),
        )
        with reporter.quiet_host():
            from .preflight.inspection import inspect as inspect_subject
            from .preflight.inspection import read_subject
            from .preflight.table import print_preflight

            subject = read_subject(target, given, reporter)
            result = inspect_subject(subject, verify=verify, device=device)
        if is_piped:
            console.print_json(data=result.to_dict())
        else:
            print_preflight(console, result)
        if file is not None:
            file.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        if result.errors:
            raise SystemExit(EXIT_INPUT)


@app.command()
def methods() -> None:
    """List the merge methods, their papers and their parameters."""
    reporter = Reporter()
    with reporter.exit_codes():
        with reporter.quiet_host():
            from .merging import merge_methods

            known = merge_methods()
        for name, about in known.items():
            reporter.out.print(_method_lines(name, about), "")


def _method_lines(name: str, about: Mapping[str, Any]) -> Table:
    lines = [
        (name, about["summary"]),
        ("", f"{about['title']}, {about['reference']}"),
        ("", "needs --base" if about["needs_base"] else "does without --base"),
    ]
    for parameter, option in about["parameters"].items():
        default = json.dumps(option["default"], default=str)
        lines.append((f"  {parameter}", f"{option['doc']} ({option['rule']}; default {default})"))
    return columns(lines)


@app.command()
def demo(
    out: Out = Path("demo-4bit"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models, only to see that everything runs.")
    ] = False,
    bits: Annotated[int, typer.Option(help="Bits of all methods.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights per scale.")] = 32,
    alpha: Annotated[
        float, typer.Option(help="Strength of E-PMQ's anchor to the merge.")
    ] = DEMO_ALPHA,
    method: Annotated[str, typer.Option(help="Merge method.")] = "average",
    awq: Annotated[bool, typer.Option("--awq", help="Also GPTQModel's AWQ (minutes).")] = False,
    seed: Annotated[int, typer.Option(help="Of the models and the data.")] = 0,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train again although models are cached.")
    ] = False,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Train small experts, merge and quantize them, and compare the methods. Needs no network."""
    reporter = Reporter(verbose=verbose)
    with reporter.exit_codes():
        check_bits = {"bits": bits, "group_size": group_size}
        for name, value in check_bits.items():
            if value < 1:
                option = f"`--{name.replace('_', '-')}`"
                raise EPMQInputError(
                    f"{option} should be positive, got {value}.",
                    code="EPMQ-F33",
                    subject=option,
                    remedy="Leave it out for the default.",
                )
        from .demo import DemoOptions, run_demo

        options = DemoOptions(
            out=out,
            alpha=alpha,
            awq=awq,
            seed=seed,
            merge_method=method,
            quick=quick,
            retrain=retrain,
            overwrite=overwrite,
            **check_bits,
        )
        run_demo(options, reporter.out, quiet=not verbose)
        _print_checkpoint(reporter, out)


def main() -> None:
    """Entry point of ``epmq-gptq``."""
    app()
