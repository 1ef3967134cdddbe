"""The models that a mergekit configuration lists, whole or in slices of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...io.declared import shown
from .facts import MAX_EXPERTS, refusal, text

NO_EXPERTS = (
    "E-PMQ has no experts to round such a model towards; quantize it with plain GPTQ, or write a "
    "recipe if there are models with these layers."
)


@dataclass
class ListedModel:
    """One model of one list of models."""

    spec: str
    parameters: Mapping[str, Any]


def listed_models(data: Mapping[str, Any], what: str) -> list[list[ListedModel]]:
    """The models of each slice; without slices there is one list.

    Raises:
        EPMQInputError: there is no such list, or its slices have no counterpart in the models.
    """
    models, slices = data.get("models"), data.get("slices")
    if (models is None) == (slices is None):
        raise refusal(what, "it should have either `models` or `slices`")
    if models is not None:
        return [[_source(item, what) for item in _list(models, what, "models")]]
    lists, end = [], 0
    for index, entry in enumerate(_list(slices, what, "slices")):
        place = f"slices[{index}]"
        entry = mapping(entry, what, place)
        sources = _list(entry.get("sources"), what, f"{place}.sources")
        ranges = {_layer_range(source, what, place) for source in sources}
        if len(ranges) != 1 or next(iter(ranges))[0] != end:
            raise refusal(
                what,
                f"`{place}` puts layers at other places than they have in their models; such a "
                "merge has layers that the experts do not have",
                NO_EXPERTS,
            )
        end = next(iter(ranges))[1]
        shared = mapping(entry.get("parameters"), what, f"{place}.parameters")
        lists.append([_source(source, what, shared) for source in sources])
    if len({tuple(sorted(source.spec for source in each)) for each in lists}) > 1:
        raise refusal(what, "its slices merge different models, so no expert has all layers")
    return lists


def base_of(data: Mapping[str, Any], what: str) -> str | None:
    """``base_model``, which slices may have of their own.

    Raises:
        EPMQInputError: slices have different ones.
    """
    given = [data.get("base_model")]
    if isinstance(data.get("slices"), list):
        own = [each.get("base_model") for each in data["slices"] if isinstance(each, Mapping)]
        given = [given[0] if base is None else base for base in own] or given
    bases = {None if base is None else model_spec(base, what) for base in given}
    if len(bases) > 1:
        raise refusal(what, "its slices have different models as `base_model`")
    return next(iter(bases))


def _layer_range(source: Any, what: str, place: str) -> tuple[int, int]:
    value = source.get("layer_range") if isinstance(source, Mapping) else None
    whole = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not whole or not all(type(end) is int for end in value) or not 0 <= value[0] < value[1]:
        raise refusal(
            what, f"`{place}`: `layer_range` should be two numbers of layers, got {shown(value)}"
        )
    return value[0], value[1]


def _source(item: Any, what: str, shared: Mapping[str, Any] | None = None) -> ListedModel:
    if isinstance(item, str):
        return ListedModel(model_spec(item, what), shared or {})
    item = mapping(item, what, "model")
    own = mapping(item.get("parameters"), what, "parameters")
    return ListedModel(model_spec(item.get("model"), what), {**(shared or {}), **own})


def model_spec(value: Any, what: str) -> str:
    """A model's reference as ``path-or-id[@revision][+adapter[@revision]]``.

    Raises:
        EPMQInputError: it is none of the forms that mergekit knows.
    """
    if not isinstance(value, Mapping) or "model" not in value:
        return _part(value, what)
    spec, adapter = _part(value["model"], what), value.get("lora")
    return spec if adapter is None else f"{spec}+{_part(adapter, what)}"


def _part(value: Any, what: str) -> str:
    revision = None
    if isinstance(value, Mapping):
        revision = text(value.get("revision"), what, "revision")
        value = value.get("path")
    name = text(value, what, "model")
    if name is None:
        raise refusal(what, "a model has no name")
    return name if revision is None else f"{name}@{revision}"


def mapping(value: Any, what: str, key: str) -> Mapping[str, Any]:
    """A mapping; an empty one for None.

    Raises:
        EPMQInputError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise refusal(what, f"`{key}` should be a mapping, got {shown(value)}")
    return value


def _list(value: Any, what: str, key: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise refusal(what, f"`{key}` should be a list of models, got {shown(value)}")
    if len(value) > MAX_EXPERTS:
        raise refusal(what, f"`{key}` has {len(value)} entries, more than {MAX_EXPERTS}")
    return value
