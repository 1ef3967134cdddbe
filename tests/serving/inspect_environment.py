"""What the serving environment holds, as JSON on the last line. Run by its own interpreter.

Says whether this CPU has vLLM's int4 operator; if so, how far the stand-in is from it, relative to
the largest output; which of this project's modules could be imported; and which models vLLM knows.
"""

import importlib.util
import json
import sys

import torch
import vllm._custom_ops  # noqa: F401  # loads vLLM's compiled operators
from vllm.model_executor.models import ModelRegistry
from vllm_reference_wna16 import cpu_gemm_wna16

OUR_MODULES = ("epmq_gptq", "gptqmodel")


def largest_error(m: int, k: int, n: int, group_size: int, dtype: torch.dtype, bias: bool) -> float:
    x = torch.randn(m, k).to(dtype)
    q_weight = torch.randint(-(2**31), 2**31, (n // 16, 2 * k)).to(torch.int32)
    scales = (torch.rand(k // group_size, n) + 0.5).to(dtype)
    offset = torch.randn(n).to(dtype) if bias else None
    # NaN-filled, so that an output which is not written cannot pass.
    outputs = [torch.full((m, n), torch.nan, dtype=dtype) for _ in range(2)]
    for operator, output in zip(
        (torch.ops._C.cpu_gemm_wna16, cpu_gemm_wna16), outputs, strict=True
    ):
        operator(x, q_weight, output, scales, None, offset, 8, "vec")
    real, reference = (output.float() for output in outputs)
    return ((real - reference).abs().max() / reference.abs().max()).item()


def main() -> None:
    torch.manual_seed(0)
    real_operator = hasattr(torch.ops._C, "cpu_gemm_wna16")
    errors = {}
    if real_operator:
        for dtype in (torch.float16, torch.bfloat16):
            errors[str(dtype)] = max(
                largest_error(*shape, dtype=dtype, bias=bias)
                for shape in ((1, 128, 32, 128), (5, 256, 96, 32), (33, 512, 256, 128))
                for bias in (False, True)
            )
    importable = [name for name in OUR_MODULES if importlib.util.find_spec(name)]
    report = {
        "real_operator": real_operator,
        "errors": errors,
        "importable": importable,
        "architectures": sorted(ModelRegistry.get_supported_archs()),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
