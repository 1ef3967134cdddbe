"""A merge quantized anew from statistics that an earlier run kept: no rows, no forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import EPMQConfig
from ...errors import EPMQInputError, EPMQWarning
from ...io.checkpoints import Checkpoint
from ...io.declared import conflict
from ...io.hub import parse_hub_id
from .. import loading
from .bundle import Bundle

if TYPE_CHECKING:
    from ...experts.linears import Linear

# Options of a run that are in the sums, or that say where they come from, and why they stay.
_SETTLED = {
    "experts": "the statistics say which there are; `leave_out` leaves some out",
    "base": "nothing is read of it any more",
    "profile": "it stands for other options; set those",
    "eta": "the statistics are of targets with their own",
    "rho": "the statistics are of targets with their own",
    "held_out": "the rows were dealt out when the statistics were taken",
    "data_free": "it needs a task vector, which statistics do not hold",
    "save_statistics": "the new checkpoint's statistics would be those that it is made from",
}


def requantize(
    statistics: str | Path | Bundle,
    merged: str | Path | None = None,
    *,
    leave_out: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    progress: Callable[..., None] | None = None,
    **options: Any,
):
    """Quantize a merge from recorded statistics.

    At the recorded options the codes are those of the run that recorded them. With others the
    targets are solved anew from the same sums; those were taken behind layers that the recorded run
    had rounded in its own way (docs/statistics.md).

    Args:
        statistics: a bundle, its folder, or a checkpoint that holds one.
        merged: the merged model: folder or hub id; None where the statistics name one of a hub.
        leave_out: experts that shall not count.
        device: "cpu", "cuda"; None for a GPU where there is one.
        dtype: that weights are computed in; None for that of the recorded run.
        progress: called with keywords ``stage``, ``layer_idx`` and ``module_names``, as GPTQModel
            calls a ``subset_callback``.
        options: of ``EPMQConfig``, in place of the recorded ones: ``alpha``, ``alpha_pattern``,
            ``bits``, ``group_size``, ``expert_weights``, ``weighting``, ``dynamic``, ….

    Warns:
        EPMQWarning: experts are left out of statistics with ``eta`` or ``rho``.

    Returns:
        GPTQModel's model, quantized: ``save`` it. ``model.epmq_report`` says how it went.

    Raises:
        EPMQInputError: an option cannot be changed, or merge and statistics do not belong together.
        EPMQNumericalError: as of ``quantize``.
    """
    from ..door import install, merged_folder

    install()
    bundle = statistics if isinstance(statistics, Bundle) else Bundle(Path(statistics))
    config = recorded_config(bundle, leave_out, options)
    merged = merged if merged is not None else _recorded_merge(bundle)
    folder = merged_folder(merged)
    check_merge(bundle, folder)
    dtype = dtype or bundle.index.get("dtype", "float32")
    model = loading.load_merged(folder, config, dtype, loading.choose_device(device))
    model.subset_callback = progress
    try:
        model.quantize(bundle)
    finally:
        model.subset_callback = None
    return model


def recorded_config(
    bundle: Bundle, leave_out: Sequence[str], options: Mapping[str, Any]
) -> EPMQConfig:
    """The recorded configuration with some options in place of its own.

    Raises:
        EPMQInputError: an option cannot be changed any more, or an expert is not there.
    """
    for name, why in _SETTLED.items():
        if name in options:
            raise conflict(
                name,
                f"cannot be changed when statistics are quantized: {why}",
                "Leave it out, or quantize with calibration rows.",
            )
    known = list(bundle.experts)
    for name in leave_out:
        if name not in known:
            raise EPMQInputError(
                f"`leave_out` names {name!r}, which is not one of the experts {known}.",
                code="EPMQ-F21",
                subject="`leave_out`",
                remedy="Use the names that the statistics have.",
            )
    names = [name for name in known if name not in leave_out]
    if not names:
        raise EPMQInputError(
            f"`leave_out` names all experts that the statistics are of: {known}.",
            code="EPMQ-F20",
            subject="`leave_out`",
            remedy="Keep at least one.",
        )
    chosen = dict(bundle.options) | dict(options)
    weights = chosen.get("expert_weights", {})
    if isinstance(weights, Mapping) and "expert_weights" not in options:
        chosen["expert_weights"] = {n: w for n, w in weights.items() if n in names}
    config = EPMQConfig(
        experts={name: str(bundle.experts[name].get("source") or name) for name in names},
        **chosen,
    )
    _check_recorded(bundle, config)
    if len(names) < len(known) and config.runs_experts:
        warnings.warn(
            EPMQWarning(
                "these statistics are of targets that make up for what earlier layers got wrong "
                f"(eta={config.eta:g}, rho={config.rho:g}), in the recorded run, with all experts; "
                "without some of them the others may lose as well. Compare with a run on rows.",
                code="EPMQ-F55",
            ),
            stacklevel=3,
        )
    return config


def _check_recorded(bundle: Bundle, config: EPMQConfig) -> None:
    def refuse(option: str, cause: str, remedy: str) -> EPMQInputError:
        return EPMQInputError(
            f"`{option}`: {cause}.", code="EPMQ-F55", subject=f"`{option}`", remedy=remedy
        )

    if config.chooses_alpha and not bundle.held_out:
        raise refuse(
            "alpha",
            '"auto" chooses by rows that were held out, and the statistics have none',
            "Set a number.",
        )
    if config.bias_refit and not bundle.options.get("bias_refit"):
        raise refuse(
            "bias_refit",
            "the statistics were taken without what a bias is fitted to",
            "Leave it out, or record anew with `bias_refit: true`.",
        )


def _recorded_merge(bundle: Bundle) -> str:
    source, revision = bundle.merged.get("source"), bundle.merged.get("revision")
    asked = parse_hub_id(str(source))
    if asked is None or revision is None:
        raise conflict(
            "merged",
            f"is missing: the statistics are of a local model, `{source}`",
            "Give the folder of that merged model.",
        )
    return asked.at(revision)


def check_merge(bundle: Bundle, folder: Path) -> None:
    """Refuse a merge that is not the one that the statistics are of, bit for bit.

    Raises:
        EPMQInputError: D is relative to other weights.
    """
    checkpoint = Checkpoint(folder, what="the merged model")
    digest = checkpoint.digest()
    checkpoint.close()
    wanted = bundle.merged.get("sha256")
    if digest != wanted:
        raise EPMQInputError(
            f"the merged model `{folder.name}` is not the one that the statistics are of: its "
            f"SHA-256 is {digest[:12]}…, theirs {str(wanted)[:12]}….",
            code="EPMQ-F55",
            subject="the merged model",
            remedy=f"Give the weights of `{bundle.merged.get('source')}` as they were.",
        )


def check_linears(bundle: Bundle, linears: Sequence[Linear]) -> None:
    """Refuse layers of which the statistics hold nothing, or something of another shape.

    Raises:
        EPMQInputError: naming the first of them.
    """
    for linear in linears:
        group = bundle.layers.get(linear.name)
        if group is None:
            raise EPMQInputError(
                f"the statistics hold nothing of `{linear.name}`, which is to be quantized.",
                code="EPMQ-F55",
                subject=f"module `{linear.name}`",
                remedy="Leave it out with `dynamic`, as the recorded run did.",
            )
        found = group.layers[linear.name].outputs, group.columns
        if found != (linear.outputs, linear.inputs):
            raise EPMQInputError(
                f"the statistics of `{linear.name}` are of {found[0]} outputs and {found[1]} "
                f"inputs, it has {linear.outputs} and {linear.inputs}.",
                code="EPMQ-F55",
                subject=f"module `{linear.name}`",
                remedy="Give the merge that they were recorded of.",
            )
