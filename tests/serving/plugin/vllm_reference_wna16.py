"""A stand-in for vLLM's CPU int4 GEMM, for tests on machines where vLLM has none.

vLLM's x86 wheel compiles `_C::cpu_gemm_wna16` for AVX512 only; its AVX2 library lacks it, and a
GPTQ checkpoint cannot be served. The stand-in computes the same product with plain torch, so that
everything around it (config, loader, fused projections, engine, server) is the real thing.
"""

import logging
import os

import torch

SCHEMA = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, "
    "Tensor? zeros, Tensor? bias, SymInt pack_factor, str isa_hint) -> ()"
)
FORCE_VARIABLE = "EPMQ_TEST_FORCE_REFERENCE_OP"
REGISTERED_MESSAGE = "reference cpu_gemm_wna16 registered"

BITS = 4
ZERO_POINT = 8  # symmetric GPTQ stores w/scale + 8, vLLM's uint4b8
BLOCK = 16  # output channels that vLLM keeps together

# A child of vLLM's logger, so that the line lands in the server's log.
logger = logging.getLogger("vllm.reference_wna16")
_library: torch.library.Library | None = None


def dequantize(q_weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight as float32 (K, N), from vLLM's CPU layout.

    Args:
        q_weight: int32 (N/16, 2K). Each row holds 16 output channels; word 2k + h has the
            channels 8h ... 8h+7 of input k, the first in the lowest bits.
        scales: (G, N), one row per group of K/G inputs.
    """
    n_groups, n = scales.shape
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    k = q_weight.numel() * len(shifts) // n
    # (N/16, K, 2, 8) -> (K, N/16, 2, 8) -> (K, N)
    words = q_weight.reshape(n // BLOCK, k, BLOCK // len(shifts), 1)
    nibbles = (words >> shifts) & (2**BITS - 1)
    values = nibbles.permute(1, 0, 2, 3).reshape(k, n) - ZERO_POINT
    return values.float() * scales.float().repeat_interleave(k // n_groups, dim=0)


def cpu_gemm_wna16(
    input: torch.Tensor,
    q_weight: torch.Tensor,
    output: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    """`output = input @ W + bias`: (M, K) @ (K, N), summed in float32, into `output` (M, N)."""
    if zeros is not None:
        raise NotImplementedError(
            "the reference cpu_gemm_wna16 covers symmetric GPTQ only, got zero points."
        )
    product = input.float() @ dequantize(q_weight, scales)
    if bias is not None:
        product += bias.float()
    output.copy_(product)


def register_where_missing() -> None:
    """vLLM general plugin, called in every process: leaves a real operator alone."""
    global _library

    import vllm._custom_ops  # noqa: F401  # loads the compiled operators, if there are any

    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return
    _library = torch.library.Library("_C", "FRAGMENT")
    _library.define(SCHEMA)
    _library.impl("cpu_gemm_wna16", cpu_gemm_wna16, "CPU")
    logger.info(REGISTERED_MESSAGE)


def pretend_avx2_if_asked() -> None:
    """vLLM platform plugin that offers no platform: it runs before the compiled library is chosen.

    With `EPMQ_TEST_FORCE_REFERENCE_OP=1` vLLM takes its AVX2 library, as it would on an older
    machine. The operator is then truly missing, which is closer to that machine than replacing it.
    """
    if os.environ.get(FORCE_VARIABLE) == "1":
        torch.cpu._is_avx512_supported = lambda: False
        torch.cpu._is_avx512_bf16_supported = lambda: False
        torch.cpu._is_amx_tile_supported = lambda: False
