"""The GPU kernels against what they replace: time, share of the measured peak, error."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from epmq_gptq.kernels.exact import has_triton
from epmq_gptq.kernels.factor import inverse_factor, torch_inverse_factor
from epmq_gptq.kernels.gram import ROWS, mixed_gram_update, torch_gram_update, triangle_update
from epmq_gptq.kernels.product import split_product_update, torch_product_update
from epmq_gptq.kernels.rounding import WIDTH, blocks_agree, torch_block_update

WIDTHS = (768, 1024, 3072, 4096, 14336)
# Of float64 sums; larger ones take minutes.
_CHECKED = 4096


def gpu_seconds(work: Callable, arguments: tuple) -> float:
    """The best of five runs on a GPU, after one that may compile."""
    work(*arguments)
    best = float("inf")
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work(*arguments)
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return best


def gram_error(update: Callable, X: torch.Tensor) -> float:
    """Largest |H − float64| over sqrt(h_ii h_jj), of the upper triangle."""
    H = torch.zeros(X.shape[1], X.shape[1], device=X.device)
    update(H, X)
    wide = X.double()
    norm = wide.norm(dim=0)
    return float(((H - wide.T @ wide).abs().triu() / torch.outer(norm, norm)).max())


def product_error(update: Callable, A: torch.Tensor, B: torch.Tensor) -> float:
    """Largest |D − float64| over the norms of row and column."""
    D = torch.zeros(len(A), B.shape[1], device=A.device)
    update(D, A, B)
    left, right = A.double(), B.double()
    norms = torch.outer(left.norm(dim=1), right.norm(dim=0))
    return float(((D - left @ right).abs() / norms).max())


def table(device: str = "cuda") -> str:
    """Markdown of all kernels and widths on this GPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    A = torch.randn(8192, 8192, device=device).bfloat16()
    peak = 2 * 8192**3 / gpu_seconds(torch.matmul, (A, A))
    grams = {
        "Gram, fp32 (stock)": torch_gram_update,
        "Gram, fp32 triangle": triangle_update,
        "Gram, half with fp32 sums": mixed_gram_update,
    }
    if has_triton():
        from epmq_gptq.kernels.gram_triton import triton_gram_update

        grams["Gram, Triton triangle"] = triton_gram_update
    products = {"ΔW H, fp32": torch_product_update, "ΔW H, split bf16": split_product_update}
    factors = {
        "factor of the inverse, stock": torch_inverse_factor,
        "factor of the inverse, flipped": inverse_factor,
    }
    lines = [
        f"{torch.cuda.get_device_name(device)}; bf16 product of 8192³: {peak / 1e12:.0f} TFLOP/s",
        "",
        "| kernel | d | ms | TFLOP/s | % of that peak | error |",
        "|---|---|---|---|---|---|",
    ]
    for d in WIDTHS:
        X = torch.randn(ROWS, d, device=device).bfloat16()
        H = torch.zeros(d, d, device=device)
        check = functools.partial(gram_error, X=X) if d <= _CHECKED else None
        for name, update in grams.items():
            lines.append(_row(name, d, update, (H, X), 2 * ROWS * d * d, peak, check))
        W, G = torch.randn(min(d, 4096), d, device=device), torch.randn(d, d, device=device)
        D = torch.zeros_like(W)
        check = functools.partial(product_error, A=W, B=G) if d <= _CHECKED else None
        for name, update in products.items():
            lines.append(_row(name, d, update, (D, W, G), 2 * W.numel() * d, peak, check))
        X = X.float()
        spread = torch.addmm(torch.eye(d, device=device), X.T, X, alpha=1 / ROWS)
        for name, factor in factors.items():
            lines.append(_row(name, d, factor, (spread,), 4 / 3 * d**3, peak, None))
    return "\n".join([*lines, "", *_rounding(device)]) + "\n"


def _row(
    name: str,
    d: int,
    update: Callable,
    arguments: tuple,
    work: float,
    peak: float,
    check: Callable[[Callable], float] | None,
) -> str:
    try:
        seconds = gpu_seconds(update, arguments)
        told = "" if check is None else f"{check(update):.1e}"
    except RuntimeError as missing:
        return f"| {name} | {d} | {str(missing).splitlines()[0]} | | | |"
    rate = work / seconds
    return (
        f"| {name} | {d} | {seconds * 1e3:.2f} | {rate / 1e12:.1f} | {100 * rate / peak:.0f} "
        f"| {told} |"
    )


def _rounding(device: str) -> list[str]:
    """Seconds of one block of 128 columns and 4096 rows, by what rounds it."""
    from gptqmodel.quantization import gptq_cuda

    ways: dict[str, Callable] = {"torch operations": torch_block_update}
    if gptq_cuda.block_update_available():
        ways["GPTQModel's CUDA kernel"] = gptq_cuda.gptq_block_update
    if has_triton():
        from epmq_gptq.kernels.rounding_triton import triton_block_update

        ways["Triton"] = triton_block_update
    lines = ["| rounding, 4096 x 128 | ms | bits of the reference |", "|---|---|---|"]
    rows = 4096
    work = torch.randn(rows, WIDTH, device=device)
    hinv = torch.eye(WIDTH, device=device)
    scale, zero = (torch.full((1, rows), value, device=device) for value in (0.2, 8.0))
    group = torch.zeros(WIDTH, dtype=torch.int32, device=device)
    out = [torch.zeros(rows, WIDTH, device=device) for _ in range(3)]
    for name, way in ways.items():
        seconds = gpu_seconds(way, (work.clone(), hinv, scale, zero, group, *out, 15))
        lines.append(f"| {name} | {seconds * 1e3:.2f} | {blocks_agree(way, device)} |")
    return lines
