"""The model card: what a checkpoint says of itself on a hub, in Markdown with metadata.

Everything that others named (experts, tasks, layers, merge parameters) goes through
:mod:`~epmq_gptq.markdown`; paths are never in it, names of local folders only if asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .card_facts import Facts, mapping, number, read_facts
from .card_loading import PLACEHOLDER, loading
from .card_sources import Declared, read_declared
from .errors import EPMQInputError
from .folders import CARD_NAME, reason_of
from .markdown import code, facts, plain, table
from .options import bad_option
from .row_forms import IMAGES, TEXT, form_of

PAPER = "https://arxiv.org/abs/2605.16882"
_TOOL = "epmq_gptq"
# The last line of a card of ours. The digest is of all above it: who edits a card owns it.
_MARKER = re.compile(r"^<!-- epmq_gptq card ([0-9a-f]{64}) -->\n?\Z", re.MULTILINE)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_TASKS = {
    "CLIPModel": "zero-shot-image-classification",
    "CLIPVisionModel": "image-feature-extraction",
    "CLIPVisionModelWithProjection": "image-feature-extraction",
}
_ROLES = {"merged": "merged model", "adapter's base": "base of an adapter"}
# Keys of the provenance that say how the target was made.
_SETTINGS = ("profile", "alpha", "eta", "rho", "anchor", "weighting", "bias_refit", "on_bad_module")


def model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    title: str | None = None,
    license: str | None = None,
    include_names: bool = False,
    sources: Mapping[str, Path] | None = None,
) -> str:
    """The card of a checkpoint that E-PMQ made; nothing is written.

    Args:
        folder: of the checkpoint.
        repo_id: the hub id that the examples name.
        title: default: the experts' names.
        license: a hub's identifier, instead of what all sources declare.
        include_names: also give the folder names of models that are on no hub.
        sources: folders of the merged model, the base and the experts, as ``model.epmq_sources``
            names them: their cards say licence, language and task. Without, models of a hub are
            looked for in its cache, and what an earlier card of ours says is kept.

    Raises:
        EPMQInputError: the folder is no such checkpoint, or an option cannot be used.
    """
    folder = Path(folder)
    if repo_id is not None:
        check_repo_id(repo_id)
    if license is not None and _LICENSE.fullmatch(license) is None:
        raise bad_option("license", "an identifier of a hub, such as apache-2.0", license)
    told = read_facts(folder, sources or {})
    known = _kept(told.sources.declared, None if sources else folder, told.sources.license_note)
    data = metadata(told, known, license)
    lines = [
        *_introduction(told, title, repo_id),
        *_lineage(told, include_names),
        *_quantization(told),
        *_retention(told),
        *_regret(told),
        *loading(told, repo_id or PLACEHOLDER),
        *_licence(told, data),
        *_limits(told),
    ]
    from huggingface_hub import ModelCardData

    body = f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n" + "\n".join(lines)
    return f"{body}\n<!-- {_TOOL} card {_digest(body)} -->\n"


def write_card(folder: str | Path, *, overwrite: bool = False, **options: Any) -> str:
    """Write :func:`model_card` as the folder's ``README.md``, all of it or nothing.

    Args:
        folder: of the checkpoint.
        overwrite: also replace a card that we did not write, or that was edited since.
        options: of :func:`model_card`.

    Returns:
        The card.

    Raises:
        EPMQInputError: as :func:`model_card`; or somebody else's card is there; or the folder
            cannot be written.
    """
    folder = Path(folder)
    text = model_card(folder, **options)
    file = folder / CARD_NAME
    if (file.exists() or file.is_symlink()) and not overwrite and not is_ours(folder):
        raise EPMQInputError(
            f"`{CARD_NAME}` is there already, and was not written by epmq_gptq or edited since.",
            code="EPMQ-F45",
            subject=f"`{CARD_NAME}`",
            remedy="Look at the new one with `--dry-run`; replace it with `overwrite=True` or "
            "`--overwrite`.",
        )
    partial = folder / f".{CARD_NAME}.{os.getpid()}.partial"
    try:
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise EPMQInputError(
            f"`{CARD_NAME}` cannot be written: {reason_of(error)}.",
            code="EPMQ-F45",
            subject=f"`{CARD_NAME}`",
            remedy="Give yourself the right to write into the folder, or copy it.",
        ) from error
    return text


def is_ours(folder: Path) -> bool:
    """Whether the folder's card is one that we wrote and nobody has edited since."""
    try:
        text = (folder / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    marker = _MARKER.search(text)
    return marker is not None and marker[1] == _digest(text[: marker.start()].removesuffix("\n"))


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        EPMQInputError: that.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if not isinstance(repo_id, str):
            raise HFValidationError("no string")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise bad_option(
            "repo_id",
            "`org/name` of letters, digits, `-`, `_` and `.`, 96 at most",
            repo_id,
            code="EPMQ-P03",
        ) from error


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _kept(now: Declared, folder: Path | None, note: str) -> Declared:
    """What is declared, completed by an earlier card where the sources are no longer at hand."""
    if folder is None or not is_ours(folder):
        return now
    before = read_declared(folder) or Declared()
    # Sources that differ stay without a licence, whatever an earlier card says.
    licensed = now if now.license or "differ" in note else before
    return Declared(
        licensed.license,
        licensed.license_name,
        licensed.license_link,
        now.language or before.language,
        now.pipeline_tag or before.pipeline_tag,
    )


# ---- metadata ----------------------------------------------------------------------------------


def metadata(told: Facts, known: Declared, license: str | None) -> dict[str, Any]:
    """The YAML block, by the rules of the hub's documentation (docs/hub/model-cards.md there).

    A quantization of a merged model that is on the hub is one of that model. Of any other merge
    the models that went in are the base models, and the relation is ``merge``.
    """
    models = [part.source for part in told.parts if part.role == "merged" and part.is_hub]
    relation = "quantized"
    if not models:
        models = [part.source for part in told.parts if part.is_hub]
        relation = "merge"
    serves = mapping(told.engines.get("transformers")).get("verdict") != "no"
    bits = told.bits
    data: dict[str, Any] = {
        "license": license or known.license,
        "license_name": None if license else known.license_name,
        "license_link": None if license else known.license_link,
        "language": list(known.language) or None,
        "library_name": "transformers" if serves else "gptqmodel",
        "pipeline_tag": known.pipeline_tag or _task(told),
        "base_model": list(dict.fromkeys(models)) or None,
        "base_model_relation": relation if models else None,
        "tags": ["gptq", "gptqmodel", "epmq", "quantized", "merge", *(f"{b}-bit" for b in bits)],
        "quantization": {
            "quant_method": "gptq",
            "targets": "E-PMQ",
            "bits": bits[0] if len(bits) == 1 else bits,
            "group_size": told.export.group_size,
            "sym": told.export.sym,
            "desc_act": told.export.desc_act,
        },
    }
    return {key: value for key, value in data.items() if value is not None}


def _task(told: Facts) -> str | None:
    architectures = told.config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if name in _TASKS:
        return _TASKS[name]
    # The hub has no task for T5 as such; its models say translation, summarization and so on.
    return "text-generation" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


# ---- sections ----------------------------------------------------------------------------------


def _introduction(told: Facts, title: str | None, repo_id: str | None) -> Iterator[str]:
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


def _lineage(told: Facts, include_names: bool) -> Iterator[str]:
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


def _quantization(told: Facts) -> Iterator[str]:
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


def _retention(told: Facts) -> Iterator[str]:
    columns = ("base", "expert", "merged", "gptq", "quantized")
    rows = []
    for name, scores in told.retention.items():
        scores = mapping(scores)
        values = {column: number(scores.get(column)) for column in columns}
        kept = retention(values["expert"], values["quantized"], scores.get("higher_is_better"))
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


def retention(expert: float | None, quantized: float | None, higher: Any) -> float | None:
    """The share of an expert's score that is left; None where it cannot be said."""
    above, below = (quantized, expert) if higher else (expert, quantized)
    return above / below if above is not None and below else None


def _regret(told: Facts) -> Iterator[str]:
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


def _licence(told: Facts, data: Mapping[str, Any]) -> Iterator[str]:
    yield from ["## Licence", ""]
    if "license" in data:
        name = data.get("license_name") or data["license"]
        link = f" ({data['license_link']})" if "license_link" in data else ""
        yield f"{code(name)}{link}. What the licences of the source models ask for holds here, too."
    else:
        yield f"Not stated: {plain(told.sources.license_note)}. The licences of all sources hold."
    yield ""


def _limits(told: Facts) -> Iterator[str]:
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
