"""``epmq-gptq explain``."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Json, Quiet, Verbose, examples, running
from .completion import codes


@examples(
    ("the code at the end of an error", "epmq-gptq explain EPMQ-F30"),
    ("its last part is enough", "epmq-gptq explain f30"),
    ("all codes there are", "epmq-gptq explain"),
)
def explain(
    code: Annotated[
        str | None,
        typer.Argument(help="Such as EPMQ-F30; without it all codes.", autocompletion=codes),
    ] = None,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what an error code means, why it usually comes, and what to do."""
    with running(json_report, quiet, verbose) as run:
        from .explanations import as_dict, codes_table, entry_table, explained_codes

        if code is None:
            entries = [as_dict(each) for each in explained_codes()]
            run.show(codes_table(entries))
            run.write({"codes": entries})
            return
        entry = as_dict(code)
        run.show(entry_table(entry))
        run.write(entry)
