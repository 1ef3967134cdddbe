"""The preflight itself: stores and options in, everything that is wrong with them out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import EPMQInputError, EPMQWarning
from ..experts.linears import Linear, resolve
from ..io.console import human_size
from ..io.phases import held_memory
from ..method.chunks import free_memory
from . import estimates
from .bases import compare_bases
from .coverage import check_coverage, widths
from .duplicates import check_duplicates, equal_models
from .findings import Finding, Preflight
from .finite import Finite
from .serving import Export, check_serving
from .similarity import TaskVectors, judge
from .structure import compare_configs, normalised
from .tensors import check_tensors
from .tokenizers import Tokenizers
from .weights import BASE, MERGED, Models

VERIFY = ("headers", "sample", "full")
_NOTHING_LEFT = Finding(
    "error",
    "EPMQ-O03",
    "`dynamic`",
    "no linear layer is left to quantize: `dynamic` excludes all of them.",
    "Exclude fewer.",
)


@dataclass(frozen=True)
class Wanted:
    """What a run is asked for, as far as its inputs and what it costs depend on it.

    Attributes:
        export: how layers shall be quantized.
        allow_duplicates, on_bad_module, save_statistics: as in ``EPMQConfig``.
        runs_experts, chooses_alpha: what the targets need.
        keeps_apart: whether the experts' sums are held apart until a layer is solved.
    """

    export: Export = Export()
    allow_duplicates: bool = False
    on_bad_module: str = "raise"
    save_statistics: bool = False
    runs_experts: bool = False
    chooses_alpha: bool = False
    keeps_apart: bool = False

    @classmethod
    def of(cls, config: Any) -> Wanted:
        """What an ``EPMQConfig`` asks for."""
        return cls(
            Export(
                int(config.bits),
                int(config.group_size),
                bool(config.sym),
                bool(config.desc_act),
                config.dynamic,
                bool(config.lm_head),
            ),
            config.allow_duplicates,
            config.on_bad_module,
            config.save_statistics,
            config.runs_experts,
            config.chooses_alpha,
            config.save_statistics or config.weighting == "minmax",
        )


def preflight(
    wanted: Wanted,
    merged: Any,
    experts: Any,
    linears: Sequence[Linear],
    tokens: Mapping[str, int] | None = None,
    *,
    verify: str = "sample",
    device: str = "cpu",
    dtype_bytes: int | None = None,
) -> Preflight:
    """Everything that can be said of a run before any compute; raises nothing that it can report.

    Headers, configurations and tokenizers are always compared. ``verify="sample"`` also reads up to
    32 MB of weights per model, and more only of models that seem to be equal; ``"full"`` reads all
    weights and looks for NaN and infinities.

    Args:
        wanted: what the run is asked for.
        merged: tensors of the merged model (a checkpoint or a state dict).
        experts: the ``Experts``; bound to ``linears`` here where they fit.
        linears: the layers that will be quantized, in forward order.
        tokens: calibration tokens per expert, or None where they are not known yet.
        verify: ``"headers"``, ``"sample"`` or ``"full"``.
        device: for the estimate of the time.
        dtype_bytes: of the computation; None for that of the merged model's layers.

    Raises:
        EPMQInputError: ``verify`` is none of the three.
    """
    check_verify(verify)
    start = time.perf_counter()
    result = Preflight(verify=verify)
    if not linears:
        result.add([_NOTHING_LEFT])
    base = None if experts.base is None else experts.base[0]
    _headers(result, merged, experts, linears, base)
    config = merged.config()
    found, result.serving = check_serving(wanted.export, linears, config)
    result.add(found)
    if tokens is not None:
        found, result.coverage = check_coverage(tokens, widths(linears, config))
        result.add(found)
    result.estimates = {"disk": estimates.disk(merged, linears, wanted.export, dtype_bytes)}
    if wanted.save_statistics:
        parts = len(experts.names) * (2 if wanted.chooses_alpha else 1)
        result.estimates["disk"]["statistics"] = estimates.recorded(linears, parts)
    if tokens:
        count, total = len(experts.names), sum(tokens.values())
        result.estimates |= _run_estimates(
            wanted, merged, linears, total, count, device, dtype_bytes
        )
        result.add(_room(result.estimates["memory"]["peak"], device))
    # Weights that do not fit cannot be compared; what is wrong with them is said already.
    if verify != "headers" and experts.names and not _unfit(result):
        _weights(result, merged, experts, linears, base, wanted)
    result.seconds = time.perf_counter() - start
    return result


def run_preflight(config: Any, *inputs: Any, **depth: Any) -> Preflight:
    """What ``quantize`` does first; it leaves the experts bound to the layers.

    Args:
        config: the run's ``EPMQConfig``.
        inputs, depth: the other arguments of :func:`preflight`.

    Warns:
        EPMQWarning: for every warning that was found, once each.

    Raises:
        EPMQInputError: the run cannot succeed; all errors of the first kind, see
            :meth:`Preflight.raise_errors`.
    """
    result = preflight(Wanted.of(config), *inputs, **depth)
    result.raise_errors()
    for finding in result.warnings:
        warnings.warn(EPMQWarning(str(finding), code=finding.code), stacklevel=3)
    return result


def check_verify(verify: str) -> None:
    """Refuse a depth that does not exist, with EPMQInputError."""
    if verify not in VERIFY:
        raise EPMQInputError(
            f"`verify` should be one of {', '.join(VERIFY)}, got {verify!r}.",
            code="EPMQ-O01",
            subject="`verify`",
            remedy='Leave it out for "sample".',
        )


def _headers(
    result: Preflight, merged: Any, experts: Any, linears: Sequence[Linear], base: Any | None
) -> None:
    config = merged.config()
    tied = list(_tied_head(merged, linears))
    linears = [linear for linear in linears if linear not in tied]
    checked = check_tensors(merged, merged, linears, MERGED)
    result.models[MERGED] = checked.table
    result.add(checked.findings)
    result.add(_head(linear) for linear in tied)
    tokenizers = Tokenizers(merged.path)
    others = [(f"expert `{name}`", name) for name in experts.names]
    if base is not None:
        others.append((BASE, None))
    for what, name in others:
        store = base if name is None else experts.store(name)
        adapter = None if name is None else experts.adapter(name)
        # First: where the network is another one, its tensors are the consequence.
        try:
            theirs = store.config()
        except EPMQInputError as error:
            result.add([Finding.from_error(error, subject=what)])
            theirs = {}
        result.add(compare_configs(config, theirs, what))
        if adapter is not None:
            result.add(compare_bases(adapter.base, experts.expert(name).base, what))
        checked = check_tensors(merged, store, linears, what, adapter=adapter)
        result.models[what if name is None else name] = checked.table
        result.add(checked.findings)
        # An adapter's folder holds the tokenizer that it was trained with, if any.
        folder = store.path if adapter is None else getattr(adapter.tensors, "path", None)
        result.add(tokenizers.compare(folder, what))


def _tied_head(merged: Any, linears: Sequence[Linear]) -> Iterator[Linear]:
    tied = merged.config().get("tie_word_embeddings")
    for linear in linears:
        if "lm_head" in linear.name and (tied or resolve(linear, merged) is None):
            yield linear


def _head(linear: Linear) -> Finding:
    return Finding(
        "error",
        "EPMQ-F37",
        "`lm_head`",
        f"`lm_head` is on, but the merged model's head `{linear.name}` is tied to the embeddings.",
        "Leave `lm_head` out.",
    )


def _unfit(result: Preflight) -> bool:
    return any(f.code not in ("EPMQ-F33", "EPMQ-F22") for f in result.errors)


def _dtype_bytes(merged: Any, linears: Sequence[Linear]) -> int:
    stored = next(filter(None, (resolve(linear, merged) for linear in linears)), None)
    dtype = merged.info(stored.tensor).torch_dtype if stored is not None else None
    return (dtype or torch.float32).itemsize


def _room(peak: int, device: str) -> Iterator[Finding]:
    """Of the device and the machine together, for the host may leave layers on either."""
    free = 0
    for one in {torch.device(device), torch.device("cpu")}:
        room = free_memory(one)
        if room is None:
            return
        # A model that is loaded already is part of the estimate.
        free += room[0] + held_memory(one if one.type == "cuda" else None)
    if peak > free:
        yield Finding(
            "warning",
            "EPMQ-F46",
            "memory",
            f"the run is estimated to hold {human_size(peak)} at its peak, and "
            f"{human_size(free)} can be had.",
            "Set a smaller `batch_size` or give fewer rows, or make room.",
        )


def _run_estimates(
    wanted: Wanted,
    merged: Any,
    linears: Sequence[Linear],
    tokens: int,
    experts: int,
    device: str,
    dtype_bytes: int | None,
) -> dict[str, Any]:
    shares = widths(linears, merged.config())
    # What passes from layer to layer; routed modules may be narrower.
    hidden = normalised(merged.config())["hidden_size"] or min(shares, default=0)
    dtype_bytes = dtype_bytes or _dtype_bytes(merged, linears)
    targets = {"runs_experts": wanted.runs_experts, "chooses_alpha": wanted.chooses_alpha}
    return {
        "memory": estimates.memory(
            merged,
            linears,
            tokens=tokens,
            hidden=hidden,
            dtype_bytes=dtype_bytes,
            apart=experts if wanted.keeps_apart else 1,
            **targets,
        ),
        "time": estimates.duration(
            linears,
            tokens=tokens,
            experts=experts,
            shares=shares,
            rate=estimates.measure_rate(device),
            forward_rate=estimates.measure_rate(device, torch.bfloat16)
            if dtype_bytes == 2
            else None,
            device=device,
            **targets,
        ),
    }


def _weights(
    result: Preflight,
    merged: Any,
    experts: Any,
    linears: Sequence[Linear],
    base: Any | None,
    wanted: Wanted,
) -> None:
    try:
        experts.bind(linears)
    except EPMQInputError as error:
        result.add([Finding.from_error(error)])
        return
    models = Models(merged, experts, base)
    result.add(
        check_duplicates(equal_models(models, linears), allow_duplicates=wanted.allow_duplicates)
    )
    full = result.verify == "full"
    total = sum(linear.outputs * linear.inputs for linear in linears)
    vectors = TaskVectors(experts.names, has_base=base is not None, total=total)
    finite = Finite()
    for rows in models.everything(linears) if full else models.sample(linears):
        blocks = {name: models.rows(name, rows) for name in models.names}
        vectors.add(blocks)
        for name, W in blocks.items():
            finite.add(name, rows, W)
        del blocks
        for name in experts.names:
            experts.release(name)
    result.similarity = vectors.to_dict()
    result.add(judge(result.similarity, experts.names))
    if full:
        used = {stored.tensor for li in linears if (stored := resolve(li, merged)) is not None}
        models.bytes_read += finite.add_tensors(merged, used)
        result.finite = finite.to_dict()
        half = {
            name
            for name, table in result.models.items()
            if next(iter(table["dtypes"]), "") == "F16"
        }
        result.add(finite.large(half))
    # What a sample meets by chance is no verdict on the whole: the run itself raises it.
    stops = full and wanted.on_bad_module == "raise"
    result.add(finite.findings("error" if stops else "warning"))
    result.bytes_read = models.bytes_read
