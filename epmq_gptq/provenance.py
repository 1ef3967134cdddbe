"""What a checkpoint says about its making: enough to repeat it, nothing that is private.

No absolute paths and no calibration text; names, revisions, digests and counts.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from .checkpoints import Checkpoint, Source, describe_source
from .config import EPMQConfig
from .experts import Experts
from .merging import RECORD_NAME as MERGE_RECORD
from .report import QuantizationReport

SCHEMA = 1


def provenance(
    merged: Checkpoint, config: EPMQConfig, experts: Experts, report: QuantizationReport
) -> dict[str, Any]:
    """The record that goes into ``quantize_config.json`` under ``meta.epmq``."""
    from . import __version__

    record: dict[str, Any] = {
        "schema": SCHEMA,
        "method": "E-PMQ",
        "reference": "https://arxiv.org/abs/2605.16882",
        "versions": {
            "epmq_gptq": __version__,
            **{name: version(name) for name in ("gptqmodel", "torch", "transformers")},
        },
        "alpha": config.alpha,
        "on_bad_module": config.on_bad_module,
        "merged": _described(describe_source(merged.path), merged),
        "experts": [
            {"name": name}
            | _described(experts.sources[name], experts.checkpoint(name))
            | {"rows": report.rows[name], "tokens": report.tokens[name]}
            for name in experts.names
        ],
        "objective": {"excess": report.excess, "merge_excess": report.merge_excess},
    }
    if config.alpha_pattern:
        record["alpha_pattern"] = dict(config.alpha_pattern)
    if report.exceptions:
        record["exceptions"] = [
            {"module": m.module, "target": m.target, "reason": m.reason} for m in report.exceptions
        ]
    merge = merged.path / MERGE_RECORD
    if merge.is_file():
        record["merge"] = json.loads(merge.read_text(encoding="utf-8"))
    return record


def _described(source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    described = {"source": source.name, "revision": source.revision, "sha256": checkpoint.digest()}
    checkpoint.close()
    return described
