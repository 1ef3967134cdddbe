"""The sections of a model card, each the lines of some Markdown.

Everything that others named (experts, tasks, layers, merge parameters) goes through
:mod:`~epmq_gptq.publish.markdown`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..calibration.rows import IMAGES, TEXT, form_of
from .card_facts import Facts, mapping, number
from .markdown import code, facts, plain, table

PAPER = "https://arxiv.org/abs/2605.16882"
_ROLES = {"merged": "merged model", "adapter's base": "base of an adapter"}
# Keys of the provenance that say how the target was made.
_SETTINGS = ("profile", "alpha", "eta", "rho", "anchor", "weighting", "bias_refit", "on_bad_module")


def introduction(told: Facts, title: str | None, repo_id: str | None) -> Iterator[str]:
    names = [part.name for part in told.experts]
    bits = "/".join(map(str, told.bits))
    if title is None:
        title = repo_id.rpartition("/")[2] if repo_id else f"{' + '.join(names)}, {bits}-bit"
    yield from [f"# {plain(title)}", ""]
    form = form_of(told.config)
    engines = (
        "An ordinary GPTQ checkpoint: it loads without the package that made it."
        if form is TEXT
        else "A GPTQ checkpoint of an architecture that GPTQModel loads with epmq_gptq."
    )
    count = f"{len(names)} experts" if len(names) != 1 else "one expert"
    yield from [
        f"A merge of {count} ({', '.join(map(plain, names))}), quantized to {bits} bits. The codes "
        f"were rounded towards what the experts compute on their own data, not towards the merge "
        f"alone: E-PMQ ([arXiv 2605.16882]({PAPER})) in GPTQModel's layer loop. {engines}",
        "",
    ]


def lineage(told: Facts, include_names: bool) -> Iterator[str]:
    yield from ["## Lineage", ""]
    rows = []
    for part in told.parts:
        role = plain(_ROLES.get(part.role, part.role))
        if part.name:
            role += f" {plain(part.name)}"
        source = "local"
        if part.is_hub:
            source = f"[{plain(part.source)}](https://huggingface.co/{part.source})"
        elif include_names and part.source:
            source = f"{plain(part.source)} (local)"
        revision = code(part.revision[:12]) if part.is_hub and part.revision else "–"
        rows.append((role, source, revision, code(part.sha256[:12]) if part.sha256 else "–"))
    yield from facts(("model", "source", "revision", "SHA-256 of the weights"), rows)
    yield from _merge(told)


def _merge(told: Facts) -> Iterator[str]:
    merge = mapping(told.record.get("merge"))
    method = merge.get("method")
    if not isinstance(method, str):
        yield from ["How the merge was made is not recorded.", ""]
        return
    by = "" if merge.get("tool") is None else f", as recorded by {plain(merge['tool'])}"
    yield from [f"Merged with {code(method)}{by}.", ""]
    names = {part.name for part in told.experts}
    rows = [(code(key), _value(value, names)) for key, value in _parameters(merge)]
    if rows:
        yield from facts(("merge parameter", "value"), rows)


def _parameters(merge: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from mapping(merge.get("parameters")).items()
    for key in ("trim", "weights", "dtype"):
        if merge.get(key):
            yield key, merge[key]


def _value(value: Any, names: set[str]) -> str:
    """A merge parameter; one that names models other than the experts is not shown."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if number(value) is not None:
        return f"{value:g}"
    if isinstance(value, str) and re.fullmatch(r"[\w+ .-]{1,40}", value, re.ASCII):
        return plain(value)
    if isinstance(value, list) and all(number(each) is not None for each in value[:20]):
        more = ", …" if len(value) > 20 else ""
        return ", ".join(f"{each:g}" for each in value[:20]) + more
    if isinstance(value, Mapping) and set(value) <= names:
        return ", ".join(f"{plain(key)} {_value(each, names)}" for key, each in value.items())
    return "see `meta.epmq` in `quantize_config.json`"


def quantization(told: Facts) -> Iterator[str]:
    export, record = told.export, told.record
    yield from ["## How it was quantized", ""]
    group = "one per row" if export.group_size == -1 else str(export.group_size)
    rows = [
        ("bits", "/".join(map(str, told.bits))),
        ("group size", group),
        ("symmetric", "yes" if export.sym else "no"),
        ("activation order (`desc_act`)", "yes" if export.desc_act else "no"),
        ("quantized layers", str(len(told.linears))),
    ]
    if export.dynamic:
        rows.append(("layers with settings of their own", "yes (`dynamic`)"))
    for key in _SETTINGS:
        if key in record:
            rows.append((code(key), _setting(record[key])))
    objective = mapping(record.get("objective"))
    excess, merge_excess = number(objective.get("excess")), number(objective.get("merge_excess"))
    if excess is not None and merge_excess is not None:
        # "above the optimum": of eq. 12, summed over the layers.
        rows.append(("objective above its optimum (eq. 12), merged", f"{merge_excess:.4g}"))
        rows.append(("the same, quantized", f"{excess:.4g}"))
    versions = ", ".join(
        f"{plain(name)} {plain(each)}" for name, each in mapping(record.get("versions")).items()
    )
    rows.append(("made with", versions or "–"))
    yield from facts(("setting", "value"), rows)
    yield from _experts(told)
    yield from _exceptions(told)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if number(value) is not None else plain(value)


def _experts(told: Facts) -> Iterator[str]:
    free = told.record.get("data_free")
    free = free if isinstance(free, list) else []
    rows = []
    for expert in told.record.get("experts") or []:
        if isinstance(expert, Mapping):
            name, weight = str(expert.get("name", "")), number(expert.get("weight"))
            used = [number(expert.get(key)) for key in ("rows", "tokens")]
            cells = ["–" if each is None else f"{each:,.0f}" for each in used]
            if name in free:
                cells = ["none (data-free)", "–"]
            rows.append((plain(name), *cells, "1" if weight is None else f"{weight:g}"))
    yield from table(("expert", "calibration rows", "tokens", "weight"), rows)


def _exceptions(told: Facts) -> Iterator[str]:
    exceptions = told.record.get("exceptions")
    exceptions = [each for each in exceptions or [] if isinstance(each, Mapping)]
    words = {"rtn": "rounded to nearest", "merged": "rounded towards the merged weight"}
    if exceptions:
        yield from [f"Layers without the experts' target ({len(exceptions)}):", ""]
        for each in exceptions[:10]:
            what = words.get(str(each.get("target")), plain(each.get("target")))
            yield f"- {code(each.get('module'))}: {what}; {plain(each.get('reason'))}"
        if len(exceptions) > 10:
            yield "- … the others are in `meta.epmq` of `quantize_config.json`"
        yield ""
    for name, reason in mapping(told.record.get("left")).items():
        yield from [f"Expert {plain(name)} was not run to the end: {plain(reason)}.", ""]


def retention(told: Facts) -> Iterator[str]:
    columns = ("base", "expert", "merged", "gptq", "quantized")
    rows = []
    for name, scores in told.retention.items():
        scores = mapping(scores)
        values = {column: number(scores.get(column)) for column in columns}
        kept = kept_share(values["expert"], values["quantized"], scores.get("higher_is_better"))
        arrow = "↑" if scores.get("higher_is_better") else "↓"
        metric = f"{plain(scores.get('metric', ''))} {arrow}"
        cells = ["–" if value is None else f"{value:.4g}" for value in values.values()]
        kept_text = "–" if kept is None else f"{100 * kept:.1f} %"
        rows.append((plain(name), plain(scores.get("task", "")), metric, *cells, kept_text))
    if not rows:
        return
    yield from ["## What was kept of every expert", ""]
    head = ("expert", "task", "metric", "base", "expert", "merged", "GPTQ", "this model", "kept")
    yield from table(head, rows)
    yield from [
        "Kept: this model's score over the expert's (the other way round where lower is better). "
        "GPTQ: the same merge by plain GPTQ at the same settings.",
        "",
    ]


def kept_share(expert: float | None, quantized: float | None, higher: Any) -> float | None:
    """The share of an expert's score that is left; None where it cannot be said."""
    above, below = (quantized, expert) if higher else (expert, quantized)
    return above / below if above is not None and below else None


def regret(told: Facts) -> Iterator[str]:
    figures: dict[str, list[Mapping[str, Any]]] = {}
    modules = told.report.get("modules")
    for module in modules if isinstance(modules, list) else []:
        for name, each in mapping(mapping(module).get("experts")).items():
            figures.setdefault(name, []).append(mapping(each))
    rows = []
    for name, each in figures.items():
        means = [_mean(each, key) for key in ("merged", "quantization", "rounded")]
        worst = max((number(e.get("rounded")) or 0.0 for e in each), default=0.0)
        cells = ["–" if mean is None else f"{100 * mean:.2f} %" for mean in means]
        rows.append((plain(name), str(len(each)), *cells, f"{100 * worst:.2f} %"))
    if not rows:
        return
    yield from ["## Error per expert", ""]
    head = ("expert", "layers", "by merging", "by quantizing", "together", "worst layer")
    yield from table(head, rows)
    yield from [
        "Mean over the layers of the squared deviation of a layer's output from the expert's, "
        "relative to the expert's output (eq. 9), on calibration rows. The two parts need not add "
        "up: what rounding moves towards an expert makes up for what merging took.",
        "",
    ]


def _mean(figures: list[Mapping[str, Any]], key: str) -> float | None:
    values = [value for each in figures if (value := number(each.get(key))) is not None]
    return sum(values) / len(values) if values else None


def licence(told: Facts, data: Mapping[str, Any]) -> Iterator[str]:
    yield from ["## Licence", ""]
    if "license" in data:
        name = data.get("license_name") or data["license"]
        link = f" ({data['license_link']})" if "license_link" in data else ""
        yield f"{code(name)}{link}. What the licences of the source models ask for holds here, too."
    else:
        yield f"Not stated: {plain(told.sources.license_note)}. The licences of all sources hold."
    yield ""


def limits(told: Facts) -> Iterator[str]:
    yield from ["## Limits", ""]
    if not told.retention:
        yield "- Nothing was evaluated for this card: what is kept of the experts is not measured."
    else:
        yield "- The scores are of the tasks named above, and say nothing of others."
    if told.report:
        yield (
            "- Errors per expert are of single layers on calibration rows; they rank layers and "
            "experts, and are no scores of the model."
        )
    yield "- It shares the biases and the faults of the models it was made of."
    yield (
        "- Calibration data is not part of this repository; the experts' kinds of input were seen, "
        "others were not."
    )
    if form_of(told.config) is IMAGES:
        yield "- Activations are float16; image preprocessing is that of the merged model."
    yield ""
