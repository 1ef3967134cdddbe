"""What a checkpoint says about its making: enough to repeat it, nothing that is private.

No absolute paths and no calibration text; names, revisions, digests and counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..config import EPMQConfig
from ..errors import EPMQInputError
from ..experts.experts import Expert, Experts
from ..io.checkpoints import Checkpoint, Source, describe_source
from ..io.folders import read_json
from ..merging import RECORD_NAME as MERGE_RECORD
from ..merging.lineage import read_lineage
from ..run_report import QuantizationReport

SCHEMA = 1


def provenance(
    merged: Checkpoint, config: EPMQConfig, experts: Experts, report: QuantizationReport
) -> dict[str, Any]:
    """The record that goes into ``quantize_config.json`` under ``meta.epmq``."""
    merge = merge_record(merged.path)
    record = _run(config, report) | {
        "merged": _described(describe_source(merged.path), merged),
        "experts": [
            {"name": name}
            | _expert(experts.expert(name))
            | {"rows": report.rows.get(name, 0), "tokens": report.tokens.get(name, 0)}
            | {"weight": config.expert_weights.get(name, 1.0)}
            for name in experts.names
        ],
    }
    if experts.base is not None:
        record["base"] = _described(experts.base[1], experts.base[0])
    if merge:
        record["merge"] = merge
    return record


def requantized(
    index: Mapping[str, Any], config: EPMQConfig, report: QuantizationReport
) -> dict[str, Any]:
    """The same of a checkpoint that was made from recorded statistics.

    Args:
        index: of the statistics: what it says of models is said again.
        config: of this run; its experts are those that count.
        report: of this run.
    """
    experts = {expert["name"]: expert for expert in index["experts"]}
    left_out = [name for name in experts if name not in config.experts]
    record = _run(config, report) | {
        "profile": index["profile"],
        "merged": index["merged"],
        "experts": [
            experts[name] | {"weight": config.expert_weights.get(name, 1.0)}
            for name in config.experts
        ],
        "statistics": {
            "versions": index["versions"],
            "options": index["options"],
            "left_out": left_out,
        },
    }
    for key in ("base", "merge"):
        if index.get(key):
            record[key] = index[key]
    return record


def _run(config: EPMQConfig, report: QuantizationReport) -> dict[str, Any]:
    """What a run says of itself, whatever its sums are from."""
    from .. import __version__

    record: dict[str, Any] = {
        "schema": SCHEMA,
        "method": "E-PMQ",
        "reference": "https://arxiv.org/abs/2605.16882",
        "versions": {
            "epmq_gptq": __version__,
            **{name: version(name) for name in ("gptqmodel", "torch", "transformers")},
        },
        "profile": config.profile,
        "alpha": config.alpha,
        "eta": config.eta,
        "rho": config.rho,
        "anchor": config.anchor,
        "bias_refit": config.bias_refit,
        "on_bad_module": config.on_bad_module,
        "weighting": config.weighting,
        "objective": {"excess": report.excess, "merge_excess": report.merge_excess},
    }
    if config.data_free:
        record["data_free"] = list(config.data_free)
    if config.alpha_pattern:
        record["alpha_pattern"] = dict(config.alpha_pattern)
    if report.exceptions:
        record["exceptions"] = [
            {"module": m.module, "target": m.target, "reason": m.reason} for m in report.exceptions
        ]
    if report.left:
        record["left"] = dict(report.left)
    return record


def merge_record(folder: Path) -> dict[str, Any]:
    """How the merged model was made, as far as its folder says; {} where that is not usable."""
    # Files of strangers: what cannot be read must not cost a finished run.
    with contextlib.suppress(EPMQInputError):
        lineage = read_lineage(folder).to_record()
        if lineage["tool"] != "epmq_gptq":
            return lineage
        # Our own record says more: digests, the paper, the version.
        return read_json(folder, MERGE_RECORD, "the merged model") | {"tool": "epmq_gptq"}
    return {}


def _expert(expert: Expert) -> dict[str, Any]:
    if expert.adapter is None:
        return _described(expert.source, expert.store)
    described = _described(expert.source, expert.adapter)
    return described | {"adapter_of": _described(expert.base, expert.store)}


def _described(source: Source, weights: Any) -> dict[str, Any]:
    """Name, revision and digest of a checkpoint, a state dict or an adapter."""
    described = {"source": source.name, "revision": source.revision, "sha256": weights.digest()}
    weights.close()
    return described
