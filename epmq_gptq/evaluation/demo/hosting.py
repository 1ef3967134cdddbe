"""GPTQModel as the demo uses it: one method after the other, each saved and loaded again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .options import PAPER, PAPER_ALPHA
from .rows import Row

METHODS = ("RTN", "GPTQ", "AWQ", PAPER, "E-PMQ")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One OpenMP thread: for models this small, threads that wait for each other cost more.

    Measured on 2 busy cores, hidden size 128: a training step of 1,024 tokens takes 0.13 s with one
    thread and 1.05 s with two. On idle cores two are faster, but nobody can count on those.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class QuantizeSettings:
    """What every method is given alike; ``alpha`` is E-PMQ's, None for its profile's."""

    bits: int = 4
    group_size: int = 32
    alpha: float | None = None
    batch_size: int = 8


def quantize(
    method: str,
    merged: Path,
    experts: Mapping[str, Path],
    calibration: Mapping[str, Sequence[Row]],
    settings: QuantizeSettings,
    out: Path,
    *,
    overwrite: bool = False,
) -> None:
    """Quantize ``merged`` with ``method`` (one of ``METHODS``) and save it to ``out``.

    Baselines see the same rows as E-PMQ, pooled.
    """
    # Ours first: it settles how many workers the host may start, which RTN needs as well.
    from ... import EPMQConfig  # isort: skip
    from gptqmodel import BACKEND, AWQConfig, GPTQConfig, GPTQModel, RTNConfig

    rows = {name: [list(row.ids) for row in calibration[name]] for name in experts}
    pooled = [ids for name in experts for ids in rows[name]]
    common = {"bits": settings.bits, "group_size": settings.group_size, "offload_to_disk": False}
    dtype, backend, data = torch.float32, {}, pooled
    if method == "RTN":
        config = RTNConfig(**common)
    elif method == "GPTQ":
        config = GPTQConfig(**common)
    elif method == "AWQ":
        # On a CPU, 7.6 knows AWQ in bfloat16 and with its torch kernel only.
        config, dtype = AWQConfig(**common), torch.bfloat16
        backend = {"backend": BACKEND.AWQ_TORCH}
    else:
        common["experts"] = {name: str(path) for name, path in experts.items()}
        own = {"profile": "paper", "alpha": PAPER_ALPHA}
        config = EPMQConfig(**common, **(own if method == PAPER else {"alpha": settings.alpha}))
        data = rows
    model = GPTQModel.load(str(merged), config, dtype=dtype, device="cpu")
    # RTN reads no data, and the host refuses to be given some.
    model.quantize(None if method == "RTN" else data, batch_size=settings.batch_size, **backend)
    # `overwrite` is an option of our save; a baseline's place is always a new one.
    model.save(str(out), **({"overwrite": overwrite} if method == "E-PMQ" else {}))


def reload(path: Path) -> torch.nn.Module:
    """The saved checkpoint, read by the host's torch kernel and computed in float32.

    The kernel dequantizes (to the scales' float16) and the products are float32's, so that the
    packed weights are all that sets a quantized row of the table apart from the merged one. The
    kernel itself computes in half precision only, which many CPUs do slowly.
    """
    from gptqmodel import BACKEND, GPTQModel

    host = GPTQModel.load(str(path), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
    model = host.model
    for name, module in list(model.named_modules()):
        if hasattr(module, "dequantize_weight"):
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight.data = module.dequantize_weight().T.float().contiguous()
            model.set_submodule(name, dense)
    return model.float().eval()


def reload_awq(path: Path) -> torch.nn.Module:
    """The same for AWQ, whose kernel stays in place, in bfloat16."""
    from gptqmodel import BACKEND, GPTQModel

    host = GPTQModel.load(str(path), device="cpu", dtype=torch.bfloat16, backend=BACKEND.AWQ_TORCH)
    return host.model.eval()
