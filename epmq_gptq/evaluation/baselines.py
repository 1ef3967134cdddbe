"""RTN, GPTQ, AWQ and E-PMQ of one merge, run alike: GPTQModel's own quantizers and ours.

What a table compares is decided here: every method is given the same bits, groups and calibration
rows, the baselines all rows pooled. Everything else is each method's default.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import EPMQError, EPMQInputError

METHODS = ("RTN", "GPTQ", "AWQ", "E-PMQ")


@dataclass(frozen=True)
class QuantizeSettings:
    """What every method is given alike, and what E-PMQ is given beside it.

    Attributes:
        bits, group_size: of the weights.
        batch_size: rows per forward pass.
        device: where it runs.
        dtype: that the merge is loaded in; of AWQ always bfloat16.
        options: more options of ``EPMQConfig``.
    """

    bits: int = 4
    group_size: int = 32
    batch_size: int = 8
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)


def host_config(method: str, experts: Mapping[str, Path], settings: QuantizeSettings):
    """The configuration that GPTQModel is given for ``method``."""
    from gptqmodel import AWQConfig, GPTQConfig, RTNConfig

    from ..config import EPMQConfig

    common = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "offload_to_disk": False,
    }
    if method == "E-PMQ":
        named = {name: str(path) for name, path in experts.items()}
        return EPMQConfig(**common, experts=named, **settings.options)
    return {"RTN": RTNConfig, "GPTQ": GPTQConfig, "AWQ": AWQConfig}[method](**common)


def quantize(
    method: str,
    merged: Path,
    experts: Mapping[str, Path],
    calibration: Mapping[str, Sequence[Any]],
    settings: QuantizeSettings,
    out: Path,
    *,
    overwrite: bool = False,
) -> float:
    """Quantize ``merged`` with ``method`` (one of ``METHODS``) and save it to ``out``.

    Args:
        merged: folder of the full-precision merge.
        experts: name → folder; read by E-PMQ alone.
        calibration: name → rows in any form that the model reads; RTN reads none.
        settings: the same for all methods.
        out: a new folder; of E-PMQ with ``overwrite`` also one to replace.

    Returns:
        Seconds of the quantization alone, without loading and saving.

    Raises:
        EPMQInputError: GPTQModel does not know this combination, or an input of E-PMQ is refused.
    """
    from ..host.door import install

    install()  # first: it settles how many workers the host may start
    from gptqmodel import BACKEND, GPTQModel

    rows = {name: list(calibration.get(name, ())) for name in experts}
    pooled = [row for own in rows.values() for row in own]
    data = {"RTN": None, "E-PMQ": rows}.get(method, pooled)  # the host refuses rows for RTN
    dtype, options = settings.dtype, {}
    if method == "AWQ":
        # 7.6 knows AWQ in half precision only, and on a CPU in bfloat16 with its torch kernel.
        dtype, options = torch.bfloat16, {"backend": BACKEND.AWQ_TORCH}
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
    start = time.perf_counter()
    model.quantize(data, batch_size=settings.batch_size, **options)
    seconds = time.perf_counter() - start
    model.save(str(out), **({"overwrite": True} if overwrite and method == "E-PMQ" else {}))
    return seconds
