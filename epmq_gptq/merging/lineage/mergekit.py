"""mergekit's configuration file, as its documentation describes it.

``models`` or ``slices`` with ``model`` each (``org/name@revision``, a path, ``model+adapter``, or a
mapping of these), ``base_model``, ``merge_method``, and ``parameters`` that may be a number, a list
over the layers (a gradient), or a list of ``{filter, value}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...io.declared import shown
from .facts import (
    MAX_EXPERTS,
    Lineage,
    expert_names,
    key_text,
    number,
    plain,
    published,
    refusal,
    text,
)
from .mergekit_models import NO_EXPERTS, base_of, listed_models, mapping, model_spec

# These rank the entries of task vectors, within each tensor; DARE drops them by chance.
_TRIMS = {"ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce"}
# Here `base_model` is one end of an interpolation, not what the experts were fine-tuned from.
_BASE_IS_MERGED = {"slerp", "nearswap", "arcee_fusion"}
# Here it only gives the tokenizer and the architecture; listed among the models, it is one of them.
_BASE_IS_UNUSED = {"linear", "karcher"}

_MAX_KEYS = 100  # no method has ten


def is_mergekit(data: Any) -> bool:
    """Whether parsed YAML looks like a configuration of one of mergekit's programs."""
    return isinstance(data, Mapping) and bool(
        {"merge_method", "gate_mode", "modules"} & {key for key in data if isinstance(key, str)}
        or ("experts" in data and "base_model" in data)
    )


def mergekit_lineage(data: Any, what: str) -> Lineage:
    """What a mergekit configuration says.

    Args:
        data: the parsed YAML.
        what: how errors call the file.

    Raises:
        EPMQInputError: it is none, or one of a merge that the experts have no counterpart of.
    """
    _refuse_other_programs(data, what)
    method = text(data.get("merge_method"), what, "merge_method")
    if method is None:
        raise refusal(what, "`merge_method` is missing")
    base = base_of(data, what)
    parameters = mapping(data.get("parameters"), what, "parameters")
    lineage = Lineage("mergekit", method, trim="per tensor" if method in _TRIMS else None)
    lists = listed_models(data, what)
    if method == "passthrough" and len({source.spec for each in lists for source in each}) > 1:
        raise refusal(
            what,
            "`merge_method: passthrough` takes layers of several models and merges none",
            NO_EXPERTS,
        )
    by_model = _input_parameters(data, what)
    own: dict[str, list[Mapping[str, Any]]] = {}
    for source in (source for each in lists for source in each):
        own.setdefault(source.spec, []).append(source.parameters)
    weights = _weights(own, by_model, parameters, lineage)
    for spec in own:
        if len(own[spec]) > len(lists):
            weights[spec] = None
            lineage.notes.append(f"`{published(spec)}` is merged more than once")
    if base is not None:
        _place_base(base, method, parameters, weights, lineage)
    _take_experts(weights, lineage, what)
    lineage.parameters = _other_parameters(parameters, own, by_model, lineage, what)
    lineage.dtype = text(data.get("dtype") or data.get("out_dtype"), what, "dtype")
    lineage.tokenizer_source = _tokenizer_source(data, what)
    return lineage


def _refuse_other_programs(data: Any, what: str) -> None:
    if not isinstance(data, Mapping):
        raise refusal(what, f"it should be a mapping, got {shown(data)}")
    if "experts" in data or "gate_mode" in data:
        raise refusal(
            what,
            "it is of mergekit-moe, which puts models side by side as routed modules; their "
            "merge has other layers than the models",
            NO_EXPERTS,
        )
    if "modules" in data:
        raise refusal(what, "`modules` merges parts of a model in different ways")


# ---- parameters --------------------------------------------------------------------------------


def _input_parameters(data: Mapping[str, Any], what: str) -> dict[str, Mapping[str, Any]]:
    """Parameters by model, an older place for them."""
    given = mapping(data.get("input_model_parameters"), what, "input_model_parameters")
    return {
        key_text(model): mapping(value, what, "input_model_parameters")
        for model, value in given.items()
    }


def _scalar(value: Any) -> float | None:
    """The number that a parameter is everywhere; None where it varies or is none."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        entry = value[0]
        value = entry.get("value") if entry.get("filter") in (None, "*") else None
    if isinstance(value, list) and len({number(point) for point in value}) == 1:
        value = value[0]  # a gradient from a number to itself
    return number(value)


def _weights(
    own: Mapping[str, list[Mapping[str, Any]]],
    by_model: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Any],
    lineage: Lineage,
) -> dict[str, float | None]:
    """Spec → weight, in the order of the merge."""
    weights: dict[str, float | None] = {}
    for spec, given in _given(own, by_model, parameters, "weight"):
        values = [_scalar(value) for value in given]
        if given and None in values:
            lineage.notes.append(
                f"the weight of `{published(spec)}` differs between layers or tensors"
            )
        same = len(given) > 0 and None not in values and len(set(values)) == 1
        if given and None not in values and not same:
            lineage.notes.append(f"the weight of `{published(spec)}` differs between slices")
        weights[spec] = values[0] if same else None
    return weights


def _given(
    own: Mapping[str, list[Mapping[str, Any]]],
    by_model: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Any],
    key: str,
) -> Iterator[tuple[str, list[Any]]]:
    """For each model the values that a parameter has, by the innermost place that says one."""
    for spec, each in own.items():
        outer = by_model.get(spec, {}).get(key, parameters.get(key))
        values = [given.get(key, outer) for given in each]
        yield spec, [value for value in values if value is not None]


def _place_base(
    base: str,
    method: str,
    parameters: Mapping[str, Any],
    weights: dict[str, float | None],
    lineage: Lineage,
) -> None:
    """Say what ``base_model`` is to the merge: the start of task vectors, or a part of it."""
    if method in _BASE_IS_MERGED:
        t = _scalar(parameters.get("t"))
        others = [spec for spec in weights if spec != base]
        if t is not None and len(others) == 1:
            weights[others[0]], weights[base] = t, 1 - t
        weights.setdefault(base, None)
        lineage.notes.append(
            f"`base_model` of `{method}` is one of the models that were merged; which model they "
            "were fine-tuned from is not said"
        )
    elif method in _BASE_IS_UNUSED and base in weights:
        lineage.notes.append(
            f"`base_model` is one of the models that `{method}` merged; which model they were "
            "fine-tuned from is not said"
        )
    else:
        weights.pop(base, None)
        lineage.base = base


def _take_experts(weights: Mapping[str, float | None], lineage: Lineage, what: str) -> None:
    if len(weights) > MAX_EXPERTS:
        raise refusal(what, f"it names {len(weights)} models, more than {MAX_EXPERTS}")
    kept = {spec: weight for spec, weight in weights.items() if weight is None or weight > 0}
    for spec in weights:
        if spec not in kept:
            why = "has weight 0 in the merge" if weights[spec] == 0 else "was subtracted"
            lineage.notes.append(f"`{published(spec)}` {why} and is left out")
    if not kept:
        raise refusal(what, "it names no model that was merged")
    lineage.experts = expert_names(list(kept))
    lineage.weights = {name: kept[spec] for name, spec in lineage.experts.items()}


def _other_parameters(
    parameters: Mapping[str, Any],
    own: Mapping[str, list[Mapping[str, Any]]],
    by_model: Mapping[str, Mapping[str, Any]],
    lineage: Lineage,
    what: str,
) -> dict[str, Any]:
    """All parameters but the weights; one that a model has of its own is under that model."""
    result = {key_text(key): value for key, value in parameters.items() if key != "weight"}
    names = {spec: name for name, spec in lineage.experts.items()}
    keys = {key for each in own.values() for given in each for key in given}
    keys |= {key for given in by_model.values() for key in given}
    if len(keys) > _MAX_KEYS:
        raise refusal(what, f"its models have {len(keys)} parameters, more than {_MAX_KEYS}")
    for key in sorted(keys - {"weight"}, key=str):
        values = {
            names[spec]: given[0] if len(given) == 1 else given
            for spec, given in _given(own, by_model, parameters, key)
            if given and spec in names
        }
        if values:
            result[key_text(key)] = values
    return plain(result, what)


def _tokenizer_source(data: Mapping[str, Any], what: str) -> str | None:
    source = data.get("tokenizer_source")
    if source is None and isinstance(data.get("tokenizer"), Mapping):
        source = data["tokenizer"].get("source")
    if isinstance(source, Mapping):
        return "model:" + model_spec(source, what)
    return text(source, what, "tokenizer_source")
