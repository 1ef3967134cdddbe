"""What the pages draw from the code: a marker ``<!-- epmq:NAME -->`` stands where it goes.

Nothing here is written down twice, so no page of reference can fall behind the code.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import epmq_gptq
from epmq_gptq.errors import CODES, ExitCode

PACKAGE = Path(epmq_gptq.__file__).parent
MARKER = re.compile(r"^<!-- epmq:([a-z-]+) -->$", re.MULTILINE)


def filled(markdown: str) -> str:
    """A page with what its markers stand for.

    Raises:
        KeyError: a marker that is none of :data:`PARTS`.
    """
    return MARKER.sub(lambda found: PARTS[found[1]](), markdown)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown; cells are Markdown already."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """In one line; a bar in code is no border of the table, and would keep its backslash there."""
    parts = re.split(r"(`[^`]+`)", text.replace("\n", " "))
    return "".join(
        part if index % 2 else part.replace("|", r"\|") for index, part in enumerate(parts)
    )


def prose(text: str) -> str:
    """Text of ours, in which backticks mark code, as Markdown."""
    parts = re.split(r"(``?[^`]+``?)", text)
    safe = str.maketrans({"<": "&lt;", "*": r"\*", "_": r"\_", "[": r"\["})
    return "".join(part if index % 2 else part.translate(safe) for index, part in enumerate(parts))


# ---- recipes and options -------------------------------------------------------------------------


def recipe_keys() -> str:
    from epmq_gptq.recipe import recipe_help

    rows, above = [], ""
    for key, doc in recipe_help():
        if key == key.strip():
            above = key
        name = f"{above}.{key.strip()}" if key != key.strip() else key
        rows.append((f"`{name}`", prose(doc)))
    return table(["key", "what it is"], rows)


def config_options() -> str:
    """The options of EPMQConfig that GPTQModel does not have."""
    from epmq_gptq.config import EPMQConfig

    rows = []
    for option in dataclasses.fields(EPMQConfig):
        if "description" in option.metadata:
            rows.append(
                (f"`{option.name}`", f"`{default_of(option)!r}`", option.metadata["description"])
            )
    return table(["option", "default", "what it is"], rows)


def default_of(option: dataclasses.Field) -> object:
    """What an option is where nothing is said."""
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def profiles() -> str:
    from epmq_gptq.config import PROFILES

    fields = list(next(iter(PROFILES.values()))._fields)
    rows = [
        (f"`{name}`", *(f"`{getattr(profile, field)}`" for field in fields))
        for name, profile in PROFILES.items()
    ]
    return table(["profile", *(f"`{field}`" for field in fields)], rows)


# ---- the command line ----------------------------------------------------------------------------


def commands() -> str:
    import typer

    from epmq_gptq import cli

    group = typer.main.get_command(cli.app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command) -> str:
    parts = [f"## {name}", prose(inspect.cleandoc(command.help))]
    shown = (f"# {about}\n{line}" for about, line in command.callback.examples)
    parts.append("```bash\n" + "\n\n".join(shown) + "\n```")
    rows = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            label = f"`{parameter.name.upper()}`"
        else:
            label = ", ".join(f"`{option}`" for option in parameter.opts)
        needed = " (required)" if parameter.required else ""
        rows.append((label + needed, prose(parameter.help or ""), _default_of(parameter)))
    parts.append(table(["option", "what it is", "default"], rows))
    return "\n\n".join(parts)


def _default_of(parameter) -> str:
    value = parameter.default
    if value is None or value is False or callable(value):
        return ""
    return f"`{value}`"


def exit_codes() -> str:
    return table(["code", "meaning"], [(str(code.value), prose(code.meaning)) for code in ExitCode])


def merge_methods() -> str:
    from epmq_gptq.merging import merge_methods

    rows = []
    for name, about in merge_methods().items():
        needs = [
            *(["`base`"] if about["needs_base"] else []),
            *(["`calibration`"] if about["needs_calibration"] else []),
        ]
        parameters = "; ".join(
            f"`{key}`: {prose(each['doc'])} ({prose(each['rule'])}; default `{each['default']}`)"
            for key, each in about["parameters"].items()
        )
        paper = f"[{about['title']}]({about['reference']})"
        rows.append((f"`{name}`", prose(about["summary"]), paper, ", ".join(needs), parameters))
    return table(["method", "what it does", "paper", "needs", "parameters"], rows)


# ---- Python --------------------------------------------------------------------------------------


def operations() -> dict[str, Callable]:
    """The functions that are commands as well."""
    return {name: getattr(epmq_gptq, name) for name in epmq_gptq._OPERATIONS}


def api_functions() -> str:
    """The operations with their keywords, and then what they return, for mkdocstrings."""
    parts = [_function(name, function) for name, function in operations().items()]
    parts.append("### What they return")
    for function in operations().values():
        module = importlib.import_module(function.__module__)
        for name, kind in vars(module).items():
            if isinstance(kind, type) and getattr(kind, "__module__", "") == module.__name__:
                parts.append(
                    f"::: {module.__name__}.{name}\n"
                    "    options: {heading_level: 4, filters: ['!^_', '!^print_to$', '!^show$']}"
                )
    return "\n\n".join(dict.fromkeys(parts))


def _function(name: str, function: Callable) -> str:
    about, _, rest = inspect.getdoc(function).partition("\n\nThe same as")
    raised = rest.partition("\nRaises:\n")[2]
    rows = []
    for each in function.parameters.values():
        needed = each.default is inspect.Parameter.empty
        default = "" if needed else f"`{each.default!r}`"
        rows.append((f"`{each.name}`" + " (required)" * needed, prose(each.help), default))
    rows.append(("`progress`", "Say what is going on.", "`False`"))
    parts = [f"#### {name} {{ #{name} }}", prose(about)]
    parts.append(table(["argument", "what it is", "default"], rows))
    errors = re.split(r"^    (?=\w)", raised, flags=re.MULTILINE)[1:]
    lines = (error.partition(":") for error in errors)
    told = [f"- `{error.strip()}`: {prose(' '.join(why.split()))}" for error, _, why in lines]
    return "\n\n".join([*parts, *(["Raises:\n\n" + "\n".join(told)] if told else [])])


# ---- errors --------------------------------------------------------------------------------------


def code_list() -> str:
    rows = [(f"[{code}](#{code.lower()})", prose(title)) for code, title in CODES.items()]
    return table(["code", "what it stands for"], rows)


PARTS: dict[str, Callable[[], str]] = {
    "recipe-keys": recipe_keys,
    "config-options": config_options,
    "profiles": profiles,
    "commands": commands,
    "exit-codes": exit_codes,
    "merge-methods": merge_methods,
    "api-functions": api_functions,
    "code-list": code_list,
}
