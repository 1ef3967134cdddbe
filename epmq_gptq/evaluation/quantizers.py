"""RTN, GPTQ, AWQ and E-PMQ of one merge, run alike: the host's own baselines and ours.

What a table compares is decided here: all methods get the same bits, groups and calibration rows,
the baselines all of them pooled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import EPMQError, EPMQInputError

METHODS = ("RTN", "GPTQ", "AWQ", "E-PMQ")


@dataclass(frozen=True)
class QuantizeSettings:
    """What every method is given alike, and E-PMQ's anchor.

    Attributes:
        bits, group_size: of the weights.
        alpha: E-PMQ's anchor, None for that of its profile; the others have none.
        batch_size: rows per forward pass.
        device: where it runs.
        options: more options of ``EPMQConfig``.
    """

    bits: int = 4
    group_size: int = 32
    alpha: float | str | None = None
    batch_size: int = 8
    device: str = "cpu"
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Quantized:
    """What a run took.

    Attributes:
        load_seconds, seconds, save_seconds: of loading, of ``quantize`` alone, and of saving.
        bytes: of the saved folder.
    """

    load_seconds: float
    seconds: float
    save_seconds: float
    bytes: int


def host_config(method: str, experts: Mapping[str, Path], settings: QuantizeSettings):
    """The host's configuration of ``method``, or ours; defaults where nothing is said."""
    from .. import EPMQConfig  # isort: skip
    from gptqmodel import AWQConfig, GPTQConfig, RTNConfig

    common = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "offload_to_disk": False,
    }
    if method == "E-PMQ":
        named = {name: str(path) for name, path in experts.items()}
        options = {"alpha": settings.alpha} | dict(settings.options or {})
        return EPMQConfig(**common, experts=named, **options)
    return {"RTN": RTNConfig, "GPTQ": GPTQConfig, "AWQ": AWQConfig}[method](**common)


def quantize(
    method: str,
    merged: Path,
    experts: Mapping[str, Path],
    calibration: Mapping[str, Sequence[Any]],
    settings: QuantizeSettings,
    out: Path,
) -> Quantized:
    """Quantize ``merged`` with ``method`` (one of ``METHODS``) and save it to ``out``.

    Args:
        merged: folder of the full-precision merge.
        experts: name → folder; read by E-PMQ alone.
        calibration: name → rows in any form that the model reads.
        settings: the same for all methods.
        out: a new folder.

    Raises:
        EPMQInputError: the host does not know this combination, or an input of E-PMQ is refused.
    """
    from ..host.door import install

    install()  # first: it settles how many workers the host may start
    from gptqmodel import BACKEND, GPTQModel

    rows = {name: list(calibration[name]) for name in experts}
    pooled = [row for name in experts for row in rows[name]]
    dtype, options = torch.float32, {}
    data = {"RTN": None, "E-PMQ": rows}.get(method, pooled)  # the host refuses rows for RTN
    if method == "AWQ":
        # On a CPU, 7.6 knows AWQ in bfloat16 and with its torch kernel only.
        dtype, options = torch.bfloat16, {"backend": BACKEND.AWQ_TORCH}
    start = time.perf_counter()
    try:
        config = host_config(method, experts, settings)
        model = GPTQModel.load(str(merged), config, dtype=dtype, device=settings.device)
    except EPMQError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise EPMQInputError(
            f"{method} with {settings.bits} bits and groups of {settings.group_size}: GPTQModel "
            f"refuses `{merged.name}`: {str(error).rstrip('.')}.",
            code="EPMQ-F33",
            subject=method,
            remedy="Choose bits and a group size that its kernels know.",
        ) from error
    loaded = time.perf_counter()
    model.quantize(data, batch_size=settings.batch_size, **options)
    quantized = time.perf_counter()
    model.save(str(out))
    saved = time.perf_counter()
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Quantized(loaded - start, quantized - loaded, saved - quantized, size)
