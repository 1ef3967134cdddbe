"""A model's headers against the merged model's: what is missing, extra, of other shape or dtype."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ..errors import EPMQInputError
from ..experts.adapters import Adapter
from ..experts.linears import Linear, StoredWeight, resolve
from ..experts.weights import find_weight, refuse_quantized
from ..io.families import FAMILIES
from .findings import Finding, counted, listed

# Tables with one row per token; their rows may differ, because they are not quantized.
_TOKEN_TABLES = re.compile(
    r"(?:embed_tokens|wte|shared|word_embeddings|embed_in|lm_head|embed_out)"
)
_HEAD = re.compile(r"(?:lm_head|embed_out)")
_LAYER = re.compile(r"(.*?\.)(\d+)\.")
# How many names of harmless tensors a warning spells out.
_SAMPLE = 5


class Headers(NamedTuple):
    """One model's headers.

    Attributes:
        findings: what does not fit.
        table: counts and names, as plain data.
    """

    findings: list[Finding]
    table: dict[str, Any]


def check_tensors(
    merged: Any,
    store: Any,
    linears: Iterable[Linear],
    what: str,
    *,
    adapter: Adapter | None = None,
) -> Headers:
    """Compare a model's headers with the merged model's.

    Args:
        merged: the merged model's tensors (a checkpoint or a state dict).
        store: those of the expert or base; of an adapter, those of its base.
        linears: the layers that will be quantized.
        what: how the findings call it, for example ``"expert `math`"``.
        adapter: what stands on top of ``store``.
    """
    linears = list(linears)
    try:
        refuse_quantized(store, what)
    except EPMQInputError as error:
        if error.code == "EPMQ-F07":
            return Headers([Finding.from_error(error)], _table(store))
        # Else the configuration is not readable, which is said where it is compared.
    findings, used, unfit = [], set(), []
    for linear in linears:
        try:
            used.add(_find(store, linear, adapter).tensor)
        except EPMQInputError as error:
            unfit.append(error)
            used.update(linear.tensors)
    findings += [
        Finding(
            "error",
            error.code,
            what,
            f"{what}: {error.cause}",
            _MERGED_REMEDY if store is merged else _EXPERT_REMEDY,
        )
        for error in unfit
    ]
    if adapter is not None:
        try:
            adapter.bind(linears, store)
        except EPMQInputError as error:
            findings.append(Finding.from_error(error, subject=what))
    # Two layouts of the same layers (stacked, apart) miss nothing of one another.
    places = (resolve(linear, merged) for linear in linears)
    linear_tensors = used | {place.tensor for place in places if place is not None}
    ours, theirs = set(map(_bare, merged)), set(map(_bare, store))
    missing = [n for n in merged if _bare(n) not in theirs and n not in linear_tensors]
    extra = [name for name in store if _bare(name) not in ours and name not in used]
    if _is_tied(merged):
        # What is said twice: a head that the embeddings are.
        extra = [name for name in extra if not _HEAD.search(name)]
    findings += _extra_layers(linears, extra, what)
    findings += _others(merged, store, used, missing, extra, what)
    table = _table(store) | {
        "linears": len(linears),
        "misfits": [{"code": error.code, "subject": error.subject} for error in unfit],
        "missing": missing,
        "extra": extra,
    }
    return Headers(findings, table)


_EXPERT_REMEDY = (
    "An expert must hold every linear layer of the merged model, fine-tuned from the same base."
)
# Also met where GPTQModel takes a layout apart in a way that cannot be followed by name.
_MERGED_REMEDY = "Save the merge again, or leave these layers out with `dynamic`."


def _find(store: Any, linear: Linear, adapter: Adapter | None) -> StoredWeight:
    replaced = None if adapter is None else adapter.replacement(linear)
    if replaced is not None:
        return find_weight(adapter.tensors, linear, replaced)
    return find_weight(store, linear)


def _bare(name: str) -> str:
    """Without what some checkpoints put before a name and others leave out."""
    for family in FAMILIES:
        name = name.removeprefix(family.optional_prefix)
    return name


def _extra_layers(linears: list[Linear], extra: list[str], what: str) -> Iterator[Finding]:
    """F04: layers past the merge's last one. A model with fewer misses tensors (F01)."""
    last: dict[str, int] = {}
    for tensor in (name for linear in linears for name in linear.tensors):
        match = _LAYER.match(tensor)
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    beyond: dict[str, int] = {}
    for name in extra:
        match = _LAYER.match(name)
        if match and match[1] in last and int(match[2]) > last[match[1]]:
            beyond[match[1]] = max(beyond.get(match[1], 0), int(match[2]))
    for prefix, layer in beyond.items():
        yield Finding(
            "error",
            "EPMQ-F04",
            what,
            f"{what}: it has {layer + 1} layers under `{prefix.rstrip('.')}`, the merged model has "
            f"{last[prefix] + 1}.",
            "Give experts that were fine-tuned from the model that the merge was made of.",
        )


def _is_tied(store: Any) -> bool:
    return _config(store).get("tie_word_embeddings") is True


def _config(store: Any) -> dict[str, Any]:
    """The configuration; {} where it is not readable, which is said elsewhere."""
    try:
        return store.config()
    except EPMQInputError:
        return {}


def _others(
    merged: Any, store: Any, used: set[str], missing: list[str], extra: list[str], what: str
) -> Iterator[Finding]:
    """What is not quantized: it comes from the merge, so differences there stop nothing."""
    if _is_tied(store):
        missing = [name for name in missing if not _HEAD.search(name)]
    if missing:
        yield Finding(
            "note",
            "EPMQ-F01",
            what,
            f"{what}: it lacks {counted(len(missing), 'tensor')} of what is not quantized: "
            f"{listed(missing, _SAMPLE)}.",
            "The merge's own are used.",
        )
    if extra:
        yield Finding(
            "warning",
            "EPMQ-F02",
            what,
            f"{what}: {counted(len(extra), 'tensor')} that the merged model does not have: "
            f"{listed(extra, _SAMPLE)}.",
            "They are ignored.",
        )
    shapes = []
    for name in store:
        if name in used or name not in merged:
            continue
        mine, theirs = merged.info(name).shape, store.info(name).shape
        if mine == theirs:
            continue
        if _TOKEN_TABLES.search(name) and len(mine) == len(theirs) == 2 and mine[1] == theirs[1]:
            yield Finding(
                "warning",
                "EPMQ-F05",
                what,
                f"{what}: `{name}` has {theirs[0]:,} rows, the merged model has {mine[0]:,}.",
                "Embeddings and heads come from the merge; give calibration rows whose tokens the "
                "merged tokenizer knows.",
            )
        else:
            shapes.append(f"`{name}` {list(theirs)} instead of {list(mine)}")
    if shapes:
        more = f" and {len(shapes) - _SAMPLE} more" if len(shapes) > _SAMPLE else ""
        yield Finding(
            "warning",
            "EPMQ-F03",
            what,
            f"{what}: tensors that are not quantized have other shapes: "
            f"{', '.join(shapes[:_SAMPLE])}{more}.",
            "The merge's own are used; make sure that this is an expert of this merge.",
        )
    mine, theirs = (_main_dtype(each, used) for each in (merged, store))
    if mine and theirs and mine != theirs:
        yield Finding(
            "note",
            "EPMQ-F06",
            what,
            f"{what}: its linear layers are {theirs}, the merged model's are {mine}; both are read "
            "as F32.",
        )


def _main_dtype(store: Any, names: set[str]) -> str | None:
    kinds = Counter(store.info(name).dtype for name in names if name in store)
    return kinds.most_common(1)[0][0] if kinds else None


def _table(store: Any) -> dict[str, Any]:
    infos = [store.info(name) for name in store]
    return {
        "tensors": len(infos),
        "dtypes": dict(Counter(info.dtype for info in infos).most_common()),
        "bytes": sum(info.nbytes for info in infos),
    }
