"""The dtypes of stored tensors, by safetensors' names for them."""

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The same, by torch's own.
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Floats that are weights as they stand; codes of eight bits need scales.
FLOATS = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
# What weights are computed with: all but the one that would lose digits in float32.
WEIGHTS = {name: DTYPES[name] for name in ("F32", "F16", "BF16")}
# The same, as `config.json` and options spell them: "float32", ...
SPELLED = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHTS.values()}
