"""How a shell writes the values that Python has as paths, mappings and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import typer

from ..errors import EPMQInputError
from .operation import Form


def resolved(path: str | Path) -> Path:
    """A path with its ``~``, which a shell leaves alone in ``--out=~/x``.

    Raises:
        EPMQInputError: it starts in the home of a user that this machine does not know.
    """
    from ..io.yaml_files import resolve_path

    return resolve_path(str(path), Path())


def check_file(file: Path, option: str) -> None:
    """Refuse a file that cannot be written because its folder is not there.

    Raises:
        EPMQInputError: naming the option.
    """
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise EPMQInputError(
            f"`{option}`: `{file.name}` should be a file in a folder that exists.",
            code="EPMQ-F45",
            subject=f"`{option}`",
            remedy="Choose another place.",
        )


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """``name=value`` options as a dict.

    Raises:
        EPMQInputError: one without a name or a value, or a name given twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            raise _wrong(
                f"`{option}` should be of the form name=value, got `{value}`.",
                option,
                "Write it so, without spaces around the sign.",
            )
        if name in found:
            raise _wrong(f"`{option}`: `{name}` is given twice.", option, "Keep one.")
        found[name] = text
    return found


def _wrong(cause: str, option: str, remedy: str) -> EPMQInputError:
    return EPMQInputError(cause, code="EPMQ-O01", subject=f"`{option}`", remedy=remedy)


def _yaml_values(values: Sequence[str], option: str) -> dict[str, Any]:
    from ..io.yaml_files import parse_yaml

    result = {}
    for key, value in pairs(values, option).items():
        try:
            result[key] = parse_yaml(value)
        except EPMQInputError as error:
            raise error.within(f"`{option} {key}`") from error
    return result


def _calibration(values: Sequence[str], option: str) -> dict[str, Any]:
    from ..calibration.arguments import parse_calibration

    return parse_calibration(values)


def _given_calibration(calibration: Any) -> Any:
    from ..calibration.arguments import given_calibration

    return given_calibration(calibration)


def _files(values: Sequence[str], option: str) -> dict[str, Path]:
    return _paths(pairs(values, option))


def _names(value: str | Iterable[str]) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else value
    return tuple(word.strip() for word in words if word.strip())


def _strings(given: Mapping[str, str | Path]) -> dict[str, str]:
    return {name: str(value) for name, value in given.items()}


def _paths(given: Mapping[str, str | Path]) -> dict[str, Path]:
    return {name: resolved(value) for name, value in given.items()}


PATH = Form(Path, use=resolved)
# A recipe, or a merged model.
TARGET = Form(str, python_help="A recipe may be a mapping or a `Recipe`.")
# Folder or hub id.
SOURCE = Form(str, use=str)
PAIRS = Form(list[str], pairs, _strings, "name=VALUE; repeatable.", "A mapping.")
FILES = Form(list[str], _files, _paths, "name=FILE; repeatable.", "A mapping.")
VALUES = Form(list[str], _yaml_values, dict, "key=value; repeatable.", "A mapping.")
NAMES = Form(list[str], use=_names, shell_help="Repeatable.", python_help="One, or several.")
LISTED = Form(str, use=_names, shell_help="Separated by commas.", python_help="One, or several.")
CALIBRATION = Form(
    list[str],
    _calibration,
    _given_calibration,
    shell_help="name=SPEC per expert, SPEC being a file, data_free, or what a recipe has there "
    "('{dataset: org/x, samples: 128}'); or one YAML file with all of a recipe's block, or that "
    "block itself ('{dataset: org/x, expert_column: task}').",
    python_help="Expert → rows, or whatever says where they are: a file's name, a `Path`, a "
    'dataset, a recipe\'s options, `"data_free"`; or one source for all with `expert_column`.',
)
DTYPE = Form(Literal["auto", "float32", "bfloat16", "float16"])
PAGE = Form(
    Path,
    use=resolved,
    shell_help="Default epmq_report.html in DIR; with --json none.",
    python_help="None writes none.",
)
ONLY_PYTHON = Form(None)


# ---- what a shell offers after TAB ---------------------------------------------------------------

# The registries that own these names import torch; a shell that waits two seconds for a TAB is
# worse than one without completion. tests/commands/test_completion.py holds them equal.
MERGE_METHODS = (
    *("average", "task_arithmetic", "ties", "ties_per_tensor"),
    *("wudi", "regmean", "regmean_plusplus"),
)
# Of the options of EPMQConfig those that a shell is used for; what may follow `=`, where it is one
# of a few things.
_BOOL = ("true", "false")
SETTINGS: dict[str, tuple[str, ...]] = {
    "bits": ("2", "3", "4", "8"),
    "group_size": ("32", "64", "128", "-1"),
    "profile": ("best", "paper", "gptq"),
    "alpha": ("auto",),
    "anchor": ("identity", "channel"),
    "weighting": ("raw", "token", "trace", "minmax"),
    "on_bad_module": ("raise", "rtn"),
    **dict.fromkeys(("eta", "rho", "held_out"), ()),
    **dict.fromkeys(("bias_refit", "sym", "desc_act", "act_group_aware", "static_groups"), _BOOL),
    **dict.fromkeys(("lm_head", "allow_duplicates", "require_pinned"), _BOOL),
}


def one_of(*names: str) -> Callable[[str], list[str]]:
    """A completion with fixed names, where others may be given too."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def settings(incomplete: str) -> list[str]:
    """``key=`` of ``--set``, then the values of the key."""
    key, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in SETTINGS if name.startswith(key)]
    return [f"{key}={each}" for each in SETTINGS.get(key, ()) if each.startswith(value)]


# ---- options that several commands share ---------------------------------------------------------

OUT = typer.Option("--out", help="Folder of the new checkpoint.")
OVERWRITE = typer.Option("--overwrite", help="Replace what is in --out.")
DEVICE = typer.Option(
    help="cpu or cuda; default: a GPU where torch sees one.", autocompletion=one_of("cpu", "cuda")
)
METHOD = typer.Option(
    help="Merge method; `epmq-gptq methods` lists them.", autocompletion=one_of(*MERGE_METHODS)
)
FULL = typer.Option("--full", help="Show every layer, however many.")
EXPERTS = typer.Option(
    "--expert", help="Of a merged model: its experts, each a folder or org/model@revision."
)
BASE = typer.Option(help="Of a merged model: what the experts were fine-tuned from.")
SETTINGS_OPTION = typer.Option(
    "--set", help="Options under `quantize`, over a recipe's.", autocompletion=settings
)
