"""F34: does an adapter stand on the base that it was trained on? By the names that hubs give."""

from __future__ import annotations

from collections.abc import Iterator

from ..io.checkpoints import Source
from ..io.hub import parse_hub_id
from .findings import Finding


def compare_bases(named: str | None, used: Source | None, what: str) -> Iterator[Finding]:
    """Warn where an adapter's configuration names another hub model than the one it is put on.

    A local folder may hold any model, so nothing follows from its name.

    Args:
        named: the base by ``adapter_config.json``; None where it names none.
        used: where the base came from.
        what: how the findings call the expert.
    """
    if named is None or used is None:
        return
    theirs, mine = parse_hub_id(named), parse_hub_id(used.name)
    # The hub does not tell cases apart.
    if None in (theirs, mine) or theirs.repository.lower() == mine.repository.lower():
        return
    yield Finding(
        "warning",
        "EPMQ-F34",
        what,
        f"{what}: the adapter was trained on `{theirs.repository}` by its `adapter_config.json`, "
        f"and is put on `{mine.repository}` here.",
        "Go on if the two hold the same weights; otherwise name the right base, as `base+adapter` "
        "or as `base`.",
    )
