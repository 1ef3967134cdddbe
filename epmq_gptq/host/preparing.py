"""What a run makes of its inputs before the first forward pass: batches, α, the experts' passes."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from gptqmodel.models.base import BaseQModel

from ..calibration.batches import CalibrationPlan, input_rules, plan_inputs
from ..calibration.draws import read_calibration
from ..calibration.encoded import EncodedCalibration
from ..checks.estimates import recorded
from ..config import EPMQConfig, paper_alpha
from ..errors import EPMQInputError, EPMQWarning
from ..experts.experts import Experts
from ..experts.linears import Linear
from ..experts.passes.trajectories import ExpertTrajectories
from ..io.checkpoints import Checkpoint
from ..io.declared import conflict
from ..io.output import check_space
from ..io.phases import Phases
from ..method.weighting import Weighting
from .provenance import merge_record
from .recorded.recording import Recording


def planned(
    model: BaseQModel,
    experts: Experts,
    calibration,
    sort: str | None,
    batch_size: int,
    concat_size: int | None = None,
) -> CalibrationPlan:
    """The batches of every expert, a share of them held out where α is to be chosen.

    Raises:
        EPMQInputError: as of reading, encoding and batching the rows; an expert has too few.
    """
    config = model.quantize_config
    data_free = config.data_free
    rules = input_rules(model)
    if not isinstance(calibration, EncodedCalibration):
        sets = read_calibration(
            calibration,
            experts.names,
            data_free=data_free,
            concat_size=concat_size,
            form=rules.form,
        )
        calibration = rules.encode(sets)
    elif concat_size is not None:
        raise conflict(
            "calibration_concat_size",
            "came with rows that are tokens and blocks already",
            "Leave it out, or set `concat` and `seqlen` of the sources.",
        )
    calibration.check_experts(experts.names, data_free)
    if config.chooses_alpha:
        _check_held_out(calibration)
    return plan_inputs(
        calibration,
        rules,
        batch_size=batch_size,
        sort=sort,
        pad=model.dynamic_expert_index is None,
        masked=model.support_batch_quantize,
        held_out=config.held_out if config.chooses_alpha else 0.0,
    )


def _check_held_out(calibration: EncodedCalibration) -> None:
    for name, rows in calibration.rows.items():
        if len(rows) < 2:
            raise EPMQInputError(
                f'`alpha="auto"` holds out some of each expert\'s rows, expert `{name}` has '
                f"{len(rows)}.",
                code="EPMQ-F22",
                subject=f"expert `{name}`",
                remedy="Give it at least two rows, or set `alpha` (the paper: 0.01 for CLIP and "
                "T5, 1 for language models).",
            )


def settle_alpha(config: EPMQConfig, merged: Checkpoint) -> None:
    """Put the paper's constant of the model's family where ``profile="paper"`` left it open."""
    if config.alpha is None:
        merge = merge_record(merged.path).get("method")
        config.alpha = paper_alpha(str(merged.config().get("model_type")), merge)


def device_of(config: EPMQConfig) -> str:
    """Where a run computes, whether the host or the user has named it."""
    return getattr(config.device, "value", None) or str(config.device or "cpu")


def trajectories_of(
    model: BaseQModel,
    merged: Checkpoint,
    experts: Experts,
    plan: CalibrationPlan,
    linears: list[Linear],
    phases: Phases,
) -> ExpertTrajectories | None:
    """The experts' own passes, if a target needs them.

    Where the user left ``eta`` and ``rho`` open and the experts cannot be run, the paper's targets
    take their place, with a warning.
    """
    config = model.quantize_config
    if not config.runs_experts:
        return None
    try:
        return ExpertTrajectories(
            merged,
            experts,
            plan,
            linears,
            device=torch.device(device_of(config)),
            dtype=next(model.model.parameters()).dtype,
            keep_going=config.on_bad_module == "rtn",
            phases=phases,
        )
    except EPMQInputError as error:
        if config.targets_asked_for:
            raise
        warnings.warn(
            EPMQWarning(
                f"experts cannot be run, so targets are the paper's (eta = rho = 0): {error.cause}",
                code=error.code,
            ),
            stacklevel=2,
        )
        config.eta = config.rho = 0.0
        return None


def recording_of(
    config: EPMQConfig,
    experts: Experts,
    weighting: Weighting,
    linears: list[Linear],
    runs_experts: bool,
) -> Recording | None:
    """What keeps the statistics, if they are to be kept; they wait in the temporary folder.

    Raises:
        EPMQInputError: its disk is too small for them.
    """
    if not config.save_statistics:
        return None
    parts = len(experts.names) * (2 if config.chooses_alpha else 1)
    check_space(
        Path(tempfile.gettempdir()) / "statistics",
        recorded(linears, parts),
        option="save_statistics",
        remedy="Free some space, or set the variable TMPDIR to a folder on another disk.",
    )
    return Recording(
        experts.names,
        weighting,
        lambda layer, expert, W_m: experts.delta(expert, layer, W_m),
        lacks=not runs_experts and not config.bias_refit,
    )
