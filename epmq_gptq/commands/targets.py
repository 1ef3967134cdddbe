"""What a command was pointed at, a recipe or a merged model, as a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..errors import EPMQInputError
from ..io.console import Reporter
from ..recipe import Recipe
from .draft import Draft, Given, draft_of_merge

_RECIPES = (".yaml", ".yml", ".json")


def is_recipe(target: str) -> bool:
    """Whether a target is a recipe's file; a folder or a hub id is a merged model."""
    try:
        path = Path(target).expanduser()
        return not path.is_dir() and (path.is_file() or path.suffix.lower() in _RECIPES)
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null byte
        return False


def read_target(target: str, given: Given, reporter: Reporter) -> Recipe:
    """The recipe that ``target`` stands for; asks on a terminal for what is missing.

    Args:
        target: file of a recipe, or folder or hub id of a merged model.
        given: what the command line says of a merged model.
        reporter: where to show what was found.

    Raises:
        EPMQInputError: it cannot be read or used, or something is missing and nobody can be asked.
    """
    if is_recipe(target):
        refuse_given(given)
        return Recipe.from_file(Path(target).expanduser())
    draft = read_merge(target, given, reporter)
    if _is_interactive(reporter):
        draft.ask(lambda text, read: _ask(text, read, reporter))
    recipe = draft.recipe()
    with reporter.quiet_host():
        draft.check_weights(lambda what: reporter.step("verify", what))
    return recipe


def read_merge(target: str, given: Given, reporter: Reporter) -> Draft:
    """What is known of a merged model, shown line by line."""
    with reporter.quiet_host():  # the hub's bars
        draft = draft_of_merge(target, given)
    for name, text in draft.described():
        reporter.step(name, text)
    for note in draft.notes:
        reporter.note(note)
    return draft


def write_draft(
    target: str, given: Given, file: Path, reporter: Reporter, *, overwrite: bool
) -> list[str]:
    """Write what is known of a merged model as a recipe; what is missing is there as comments.

    Returns:
        the experts whose calibration is to be filled in.

    Raises:
        EPMQInputError: the target is a recipe, its lineage cannot be used, or the file is taken.
    """
    option = "--write-recipe"
    if is_recipe(target):
        raise EPMQInputError(
            f"`{option}` goes with a merged model, and the target is a recipe.",
            code="EPMQ-O03",
            subject=f"`{option}`",
            remedy="Copy the recipe.",
        )
    check_file(file, option)
    if file.exists() and not overwrite:
        raise EPMQInputError(
            f"`{option}`: `{file.name}` exists.",
            code="EPMQ-F45",
            subject=f"`{option}`",
            remedy="Choose another name or pass --overwrite.",
        )
    draft = read_merge(target, given, reporter)
    file.write_text(draft.to_yaml(file.absolute().parent), encoding="utf-8")
    missing = f"; to be filled in: {', '.join(draft.uncalibrated)}" if draft.uncalibrated else ""
    reporter.step("recipe", f"{file}{missing}")
    return draft.uncalibrated


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


def refuse_given(given: Given) -> None:
    """Refuse options that a recipe has keys for.

    Raises:
        EPMQInputError: naming the first.
    """
    options = {
        "--calibration": given.calibration,
        "--expert": given.experts,
        "--base": given.base,
        "--set": given.quantize,
        "--dtype": given.dtype,
        "--seed": given.seed,
    }
    for option, value in options.items():
        if value not in (None, (), [], {}):
            raise EPMQInputError(
                f"`{option}` goes with a merged model, and the target is a recipe.",
                code="EPMQ-O03",
                subject=f"`{option}`",
                remedy="Write it in the recipe.",
            )


def _is_interactive(reporter: Reporter) -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and reporter.err.is_terminal


def _ask(text: str, read: Callable[[str], Any], reporter: Reporter) -> Any:
    while True:
        try:
            return read(typer.prompt(text, err=True))
        except EPMQInputError as error:
            reporter.error(str(error), error.code)
        except typer.Abort:
            # Ctrl-C, or the end of the input.
            raise KeyboardInterrupt from None
