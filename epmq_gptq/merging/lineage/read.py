"""Find out how a merge was made: our own record, mergekit's file, or the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import EPMQInputError
from ...io.declared import shown
from ...io.folders import list_folder, reason_of
from ...io.yaml_files import parse_yaml
from .facts import MAX_EXPERTS, Lineage, expert_names, number, plain, refusal, text
from .mergekit import is_mergekit, mergekit_lineage

RECORD, MERGEKIT, CARD = "epmq_merge.json", "mergekit_config.yml", "README.md"
# In the order in which they are believed.
LINEAGE_FILES = (RECORD, MERGEKIT, CARD)
# mergekit's files have a few hundred bytes, cards a few thousand.
MAX_BYTES = 1_000_000

_MARK = re.compile(r"^---(?:[ \t].*)?$", re.MULTILINE)
_COMMENT = re.compile(r"^[ \t]*#.*$", re.MULTILINE)
_BLOCK = re.compile(r"^```[ \t]*ya?ml[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL | re.IGNORECASE)
_FRONT = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$", re.MULTILINE | re.DOTALL)


def read_lineage(folder: Path, name: str | None = None) -> Lineage:
    """How the merged model in ``folder`` was made, from the best of :data:`LINEAGE_FILES`.

    Args:
        folder: of the merged model.
        name: how errors call it; default: the folder's name.

    Raises:
        EPMQInputError: there is none, it cannot be read, or it is of a merge that has no experts in
            the sense of E-PMQ (stacked layers, several stages, routed modules).
    """
    readers: dict[str, Callable[[str], Lineage | None]] = {
        RECORD: _from_record,
        MERGEKIT: _from_mergekit,
        CARD: _from_card,
    }
    # Of a hub repository without any of these files there is no folder.
    names = list_folder(folder, "the merged model") if folder.exists() else set()
    for file in LINEAGE_FILES:
        if file in names:
            lineage = readers[file](_read(folder / file))
            if lineage is not None:
                return lineage
    raise refusal(
        "the merged model",
        f"`{name or folder.name}` does not say what it was merged from: it has no `{MERGEKIT}`, no "
        f"`{RECORD}`, and no card (`{CARD}`) with the configuration or a `base_model` list",
        "Name the experts (`--expert name=...`), or write a recipe.",
    )


def _read(file: Path) -> str:
    what = f"`{file.name}`"
    try:
        if not file.is_file():
            raise refusal(what, "it is not a regular file")
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise refusal(what, f"it has more than {MAX_BYTES:,} bytes")
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise refusal(what, f"it cannot be read: {reason_of(error)}") from error


def _yaml(content: str, what: str) -> Any:
    """YAML as plain data; PyYAML's constructors raise more than its own errors."""
    try:
        return parse_yaml(content)
    except EPMQInputError as error:
        raise refusal(what, error.cause.rstrip(".")) from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise refusal(what, f"it is not readable as YAML: {reason_of(error)}") from error
    except RecursionError as error:
        raise refusal(what, "it is nested too deeply") from error


# ---- mergekit ----------------------------------------------------------------------------------


def _from_mergekit(content: str) -> Lineage:
    what = f"`{MERGEKIT}`"
    return mergekit_lineage(_yaml(_one_document(content, what), what), what)


def _one_document(content: str, what: str) -> str:
    documents = [part for part in _MARK.split(content) if _COMMENT.sub("", part).strip()]
    if len(documents) > 1:
        raise refusal(
            what,
            f"it holds {len(documents)} merges that build on one another (mergekit-multi)",
        )
    return documents[0] if documents else content


# ---- our own record ----------------------------------------------------------------------------


def _from_record(content: str) -> Lineage:
    what = f"`{RECORD}`"
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise refusal(what, f"it is not readable as JSON: {reason_of(error)}") from error
    experts = record.get("experts") if isinstance(record, Mapping) else None
    if not isinstance(experts, Mapping) or not 0 < len(experts) <= MAX_EXPERTS:
        raise refusal(what, f"`experts` should be a mapping of models, got {shown(experts)}")
    specs = {name: _recorded(source, f"experts.{name}", what) for name, source in experts.items()}
    base = record.get("base")
    parameters = plain(record.get("parameters") or {}, what)
    if not isinstance(parameters, dict):
        raise refusal(what, f"`parameters` should be a mapping, got {shown(parameters)}")
    # Names that our own merge accepted may still be none that a table can show.
    named = dict(zip(expert_names(list(specs)), specs.values(), strict=True))
    weights = parameters.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    by_name = dict(zip(named, specs, strict=True))
    digests = {name: _digest(experts[by_name[name]]) for name in named}
    return Lineage(
        "epmq_gptq",
        text(record.get("method"), what, "method"),
        {key: value for key, value in parameters.items() if key != "weights"},
        None if base is None else _recorded(base, "base", what),
        named,
        {name: number(weights.get(by_name[name])) for name in named},
        text(record.get("trim"), what, "trim"),
        digests={name: digest for name, digest in digests.items() if digest},
        base_digest=_digest(base or {}),
    )


def _digest(source: Mapping[str, Any]) -> str | None:
    digest = source.get("digest")
    return digest if isinstance(digest, str) else None


def _recorded(source: Any, key: str, what: str) -> str:
    if not isinstance(source, Mapping):
        raise refusal(what, f"`{key}` should be a mapping, got {shown(source)}")
    name = text(source.get("name"), what, f"{key}.name")
    revision = text(source.get("revision"), what, f"{key}.revision")
    if name is None:
        raise refusal(what, f"`{key}.name` is missing")
    return name if revision is None else f"{name}@{revision}"


# ---- model card --------------------------------------------------------------------------------


def _from_card(content: str) -> Lineage | None:
    """From the configuration in the card's text, else from ``base_model`` of its front matter."""
    what = f"`{CARD}`"
    configurations = []
    for block in _BLOCK.findall(content):
        if "merge_method" in block:
            block = _one_document(block, what)
        try:
            data = _yaml(block, what)
        except EPMQInputError:
            continue  # a card may show any YAML
        if is_mergekit(data):
            configurations.append(data)
    if len(configurations) > 1:
        raise refusal(what, f"it shows {len(configurations)} mergekit configurations")
    if configurations:
        return mergekit_lineage(configurations[0], what)
    front = _FRONT.match(content)
    if front is None:
        return None
    metadata = _yaml(front[1], what)
    if not isinstance(metadata, Mapping) or metadata.get("base_model") is None:
        return None
    return _from_metadata(metadata, what)


def _from_metadata(metadata: Mapping[str, Any], what: str) -> Lineage:
    models, relation = metadata["base_model"], metadata.get("base_model_relation")
    if relation is not None and relation != "merge":
        raise refusal(what, f"`base_model_relation` is {shown(relation)}, not `merge`")
    if isinstance(models, str) and relation is None:
        raise refusal(what, "`base_model` names one model, and nothing says that it was merged")
    models = models if isinstance(models, list) else [models]
    if not 0 < len(models) <= MAX_EXPERTS:
        raise refusal(what, f"`base_model` should be a list of models, got {shown(models)}")
    specs = [text(model, what, "base_model") for model in models]
    if None in specs:
        raise refusal(what, "`base_model` has an empty entry")
    experts = expert_names(list(dict.fromkeys(specs)))
    return Lineage(
        "model card",
        experts=experts,
        weights=dict.fromkeys(experts),
        notes=["the card does not say which of its models, if any, is the base (`--base`)"],
    )
