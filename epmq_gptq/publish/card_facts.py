"""What a checkpoint's folder knows about itself: the facts of a model card, as the card shows them.

The folder may come from a stranger, so nothing in it is believed to have the type it should, and
what somebody else named becomes Markdown through :mod:`~epmq_gptq.publish.markdown` alone.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..calibration.rows import IMAGES, PAIRS, TEXT, form_of
from ..checks.engines.facts import Facts
from ..checks.serving import check_serving
from ..checks.validate import read_own
from ..errors import EPMQInputError
from ..experts.linears import Linear
from ..io.checkpoints import Checkpoint
from ..io.folders import read_json
from ..run_report import ExpertError, read_report
from .card_sources import Agreed, Part, agreed, parts_of
from .markdown import code, plain
from .page.retention import Retention, read_retention

WHAT = "the checkpoint"
_ROLES = {"merged": "merged model", "adapter's base": "base of an adapter"}
# Keys of the provenance that say how the target was made.
_SETTINGS = ("profile", "alpha", "eta", "rho", "anchor", "weighting", "bias_refit", "on_bad_module")
_HEADS = ("ForCausalLM", "LMHeadModel")


class CardFacts(BaseModel):
    """All that a card tells; rows of tables are Markdown, everything else is text of strangers.

    Attributes:
        title: of the card.
        names: of the experts.
        bits: the widths in use, joined by slashes.
        form: ``"text"``, ``"images"`` or ``"pairs"``: what the model is fed with.
        parts: base, merged model and experts: role, name, source, revision, sha256, and whether
            everybody can follow a link to it.
        merge_method, merge_tool, merge_parameters: how the merge was made, as far as it is known.
        settings, experts, retention, errors: rows of tables; the last two may be empty.
        exceptions: layers without the experts' target.
        left: experts that were not run to the end, and why.
        auto_class: of transformers, for a text model.
        serving: engine that takes the checkpoint → what is to be said of it, or "".
        refusing: lines about the engines that do not.
        license_note: why no licence is given.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    names: list[str]
    bits: str
    form: str
    parts: list[dict[str, Any]]
    merge_method: str | None
    merge_tool: str | None
    merge_parameters: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    experts: list[tuple[str, ...]]
    exceptions: list[dict[str, str]]
    left: dict[str, str]
    retention: list[tuple[str, ...]]
    errors: list[tuple[str, ...]]
    auto_class: str
    serving: dict[str, str]
    refusing: list[str]
    license_note: str


@dataclass(frozen=True)
class Source:
    """What is read of a checkpoint for its card.

    Attributes:
        facts: what is quantized, and how.
        record: the provenance, ``meta.epmq``.
        engines: engine → version, verdict and reasons, see :mod:`epmq_gptq.checks.serving`.
        parts: base, merged model and experts.
        sources: what these declare alike.
        figures: expert → its errors in all layers; {} where no report says so.
        retention: the scores of the experts, None where nothing was evaluated.
    """

    facts: Facts
    record: Mapping[str, Any]
    engines: dict[str, Any]
    parts: list[Part]
    sources: Agreed
    figures: dict[str, list[ExpertError]]
    retention: Retention | None

    @property
    def bits(self) -> list[int]:
        """The widths in use, in ascending order."""
        widths = {layer.settings.bits for layer in self.facts.layers}
        return sorted(widths or {self.facts.export.bits})


def read_source(folder: Path, folders: Mapping[str, Path]) -> Source:
    """Read the checkpoint in ``folder``.

    Args:
        folder: of a checkpoint that E-PMQ made.
        folders: of its sources, see :func:`~epmq_gptq.publish.card_sources.declared_by`.

    Raises:
        EPMQInputError: it cannot be read, or E-PMQ did not make it.
    """
    checkpoint = Checkpoint(folder, what=WHAT)
    checkpoint.close()
    quantization = read_json(folder, "quantize_config.json", WHAT)
    record = mapping(mapping(quantization.get("meta")).get("epmq"))
    if not record:
        raise EPMQInputError(
            f"{WHAT}: `{folder.name}` does not say that E-PMQ made it (`meta.epmq` in "
            "`quantize_config.json`).",
            code="EPMQ-P01",
            subject="`quantize_config.json`",
            remedy="Give a folder that `save` of an E-PMQ run wrote.",
        )
    facts = read_own(checkpoint, quantization).facts
    linears = [Linear(layer.name, (layer.outputs, layer.inputs), ()) for layer in facts.layers]
    parts = parts_of(record)
    return Source(
        facts=facts,
        record=record,
        engines=check_serving(facts.export, linears, facts.config)[1],
        parts=parts,
        sources=agreed(parts, folders),
        figures=_figures(folder),
        retention=read_retention(folder),
    )


def _figures(folder: Path) -> dict[str, list[ExpertError]]:
    figures: dict[str, list[ExpertError]] = {}
    # A run whose report cannot be read still has a card: without these figures.
    with contextlib.suppress(EPMQInputError):
        for module in read_report(folder).modules:
            for name, each in module.experts.items():
                figures.setdefault(name, []).append(each)
    return figures


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, {} in place of anything else."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, None in place of anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with contextlib.suppress(OverflowError):
        return value if math.isfinite(value) else None
    return None


# ---- the facts of the card ---------------------------------------------------------------------


def card_facts(source: Source, title: str | None, repo_id: str | None, names: bool) -> CardFacts:
    """The facts of a card.

    Args:
        source: what was read.
        title: default: the name in ``repo_id``, else the experts' names.
        repo_id: the hub id of the checkpoint.
        names: whether to give the folder names of models that are on no hub.
    """
    experts = [part.name for part in source.parts if part.role == "expert"]
    bits = "/".join(map(str, source.bits))
    if title is None:
        title = repo_id.rpartition("/")[2] if repo_id else f"{' + '.join(experts)}, {bits}-bit"
    merge = mapping(source.record.get("merge"))
    method, tool = merge.get("method"), merge.get("tool")
    is_known = isinstance(method, str)
    exceptions = source.record.get("exceptions")
    exceptions = exceptions if isinstance(exceptions, list) else []
    form = form_of(source.facts.config)
    return CardFacts(
        title=title,
        names=experts,
        bits=bits,
        form={id(IMAGES): "images", id(PAIRS): "pairs"}.get(id(form), "text"),
        parts=[_part(part, names) for part in source.parts],
        merge_method=method if is_known else None,
        merge_tool=None if tool is None else str(tool),
        merge_parameters=[
            (code(key), _value(value, set(experts)))
            for key, value in (_parameters(merge) if is_known else ())
        ],
        settings=list(_settings(source)),
        experts=list(_experts(source)),
        exceptions=[
            {key: str(each.get(key)) for key in ("module", "target", "reason")}
            for each in exceptions
            if isinstance(each, Mapping)
        ],
        left={str(name): str(why) for name, why in mapping(source.record.get("left")).items()},
        retention=list(_retention(source.retention)),
        errors=list(_errors(source.figures)),
        auto_class=(
            "AutoModelForCausalLM" if source.facts.architecture.endswith(_HEADS) else "AutoModel"
        ),
        serving={
            engine: _sentences(_reasons(source, engine, "limited"))
            for engine in source.engines
            if _serves(source, engine)
        },
        refusing=list(_refusing(source)),
        license_note=source.sources.license_note,
    )


def _part(part: Part, names: bool) -> dict[str, Any]:
    return {
        "role": _ROLES.get(part.role, part.role),
        "name": part.name,
        "source": part.source if part.is_hub or names else "",
        "link": part.is_hub,
        "revision": part.revision[:12] if part.is_hub and part.revision else "",
        "sha256": part.sha256[:12],
    }


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


def _settings(source: Source) -> Iterator[tuple[str, str]]:
    export, record = source.facts.export, source.record
    yield "bits", "/".join(map(str, source.bits))
    yield "group size", "one per row" if export.group_size == -1 else str(export.group_size)
    yield "symmetric", "yes" if export.sym else "no"
    yield "activation order (`desc_act`)", "yes" if export.desc_act else "no"
    yield "quantized layers", str(len(source.facts.layers))
    if export.dynamic:
        yield "layers with settings of their own", "yes (`dynamic`)"
    for key in _SETTINGS:
        if key in record:
            yield code(key), _setting(record[key])
    objective = mapping(record.get("objective"))
    excess, merge_excess = number(objective.get("excess")), number(objective.get("merge_excess"))
    if excess is not None and merge_excess is not None:
        # "above the optimum": of eq. 12, summed over the layers.
        yield "objective above its optimum (eq. 12), merged", f"{merge_excess:.4g}"
        yield "the same, quantized", f"{excess:.4g}"
    versions = mapping(record.get("versions")).items()
    made = ", ".join(f"{plain(name)} {plain(each)}" for name, each in versions)
    yield "made with", made or "–"


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if number(value) is not None else plain(value)


def _experts(source: Source) -> Iterator[tuple[str, ...]]:
    free, experts = source.record.get("data_free"), source.record.get("experts")
    for expert in experts if isinstance(experts, list) else []:
        if isinstance(expert, Mapping):
            name, weight = str(expert.get("name", "")), number(expert.get("weight"))
            used = [number(expert.get(key)) for key in ("rows", "tokens")]
            cells = ["–" if each is None else f"{each:,.0f}" for each in used]
            if isinstance(free, list) and name in free:
                cells = ["none (data-free)", "–"]
            yield plain(name), *cells, "1" if weight is None else f"{weight:g}"


def _retention(retention: Retention | None) -> Iterator[tuple[str, ...]]:
    for name, one in (retention.experts if retention else {}).items():
        values = (one.base, one.expert, one.merged, one.gptq, one.quantized)
        cells = ["–" if value is None else f"{value:.4g}" for value in values]
        kept = one.percent()
        metric = f"{plain(one.metric)} {'↑' if one.higher_is_better else '↓'}"
        yield (
            plain(name), plain(one.task), metric, *cells, "–" if kept is None else f"{kept:.1f} %"
        )  # fmt: skip


def _errors(figures: Mapping[str, list[ExpertError]]) -> Iterator[tuple[str, ...]]:
    for name, each in figures.items():
        cells = []
        for key in ("merged", "quantization", "rounded"):
            values = [value for one in each if (value := getattr(one, key)) is not None]
            cells.append(f"{100 * sum(values) / len(values):.2f} %" if values else "–")
        worst = max((one.rounded or 0.0 for one in each), default=0.0)
        yield plain(name), str(len(each)), *cells, f"{100 * worst:.2f} %"


# ---- engines -----------------------------------------------------------------------------------


def _serves(source: Source, engine: str) -> bool:
    """Whether an engine is worth a recommendation."""
    verdict = mapping(source.engines.get(engine)).get("verdict")
    # "limited" of a text model is slower or needs a dtype; of another kind nobody has tried it.
    return verdict == "yes" or (verdict == "limited" and form_of(source.facts.config) is TEXT)


def _reasons(source: Source, engine: str, verdict: str) -> str:
    reasons = mapping(source.engines.get(engine)).get("reasons", [])
    return "; ".join(reason["reason"] for reason in reasons if reason["verdict"] == verdict)


def _refusing(source: Source) -> Iterator[str]:
    form = form_of(source.facts.config)
    for engine, entry in source.engines.items():
        shown = engine == "GPTQModel" or (engine == "transformers" and form is PAIRS)
        if _serves(source, engine) or (form is not TEXT and shown):
            continue
        reasons = _reasons(source, engine, mapping(entry).get("verdict", "no"))
        if form is IMAGES and engine == "transformers":
            reasons += "; `load_clip` gives the transformers model"
        yield f"{engine} {plain(entry.get('version', ''))}: {_sentences(reasons)}"


def _sentences(reasons: str) -> str:
    """Our own sentences, with a stranger's layer names between backticks."""
    return "".join(
        part if index % 2 == 0 else plain(part) for index, part in enumerate(reasons.split("`"))
    )
