"""One loader for every model: full precision, GPTQ or AWQ, from a folder or a hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from ..calibration.row_forms import form_of
from ..errors import EPMQInputError
from ..io.checkpoints import Checkpoint, check_folder, resolve_source
from ..io.folders import read_json
from .dense import make_dense, packed_names

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WHAT = "the model"
_CLIP = ("clip", "clip_vision_model")


@dataclass
class Loaded:
    """A model that can be evaluated, and what may be said of it in a table.

    Attributes:
        module: the transformers model, in evaluation mode.
        path: its local folder.
        name: hub id, or the last part of the folder; never an absolute path.
        revision: the commit of a hub id, else None.
        form: kind of its inputs: "text", "images" or "pairs".
        quantization: None of a full-precision model; else method, bits, group size and what
            computes ("dense" or the host's kernel).
        dtype: of the computation.
    """

    module: torch.nn.Module
    path: Path
    name: str
    revision: str | None
    form: str
    quantization: dict[str, Any] | None
    dtype: str
    _tokenizer: Any = field(default=None, repr=False)

    @property
    def tokenizer(self):
        """The tokenizer of its folder.

        Raises:
            EPMQInputError: the folder has none that can be read.
        """
        if self._tokenizer is None:
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                    self.path, local_files_only=True, trust_remote_code=False
                )
            except (OSError, ValueError, KeyError) as error:
                raise EPMQInputError(
                    f"{_WHAT}: `{self.name}` has no tokenizer that can be read.",
                    code="EPMQ-F15",
                    subject=_WHAT,
                    remedy="Save the tokenizer of its base into the folder.",
                ) from error
        return self._tokenizer

    def described(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "name": self.name,
            "revision": self.revision,
            "architecture": type(self.module).__name__,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "quantization": self.quantization,
            "dtype": self.dtype,
            "device": str(next(self.module.parameters()).device),
        }


def quantization_of(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization that a checkpoint declares, None of one in full precision."""
    declared = config.get("quantization_config")
    if declared is None and (path / "quantize_config.json").is_file():
        declared = read_json(path, "quantize_config.json", _WHAT)
    return declared if isinstance(declared, dict) else None


def load_model(
    spec: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    dense: bool | None = None,
) -> Loaded:
    """Load ``spec`` for evaluation.

    Args:
        spec: folder or hub id ``org/name[@revision]`` with safetensors weights.
        device: None for a GPU where torch sees one.
        dtype: of the computation; None for float32 on a CPU, else that of the checkpoint.
        dense: of a quantized model, compute with its dequantized weights in ``dtype`` and not with
            the host's kernel. None for dense on a CPU, where the kernels know half precision only.

    Raises:
        EPMQInputError: it cannot be had or read, is quantized by another method than GPTQ or AWQ,
            or its architecture is not one of transformers.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(dtype, device)
    dense = device == "cpu" if dense is None else dense
    source = resolve_source(spec, what=_WHAT)
    check_folder(source.path, what=_WHAT)
    checkpoint = Checkpoint(source.path, what=_WHAT)
    config = checkpoint.config()
    quantization = quantization_of(source.path, config)
    if quantization is None:
        module = _full_precision(source.path, config, dtype).to(device)
    else:
        module, quantization = _quantized(checkpoint, config, quantization, device, dtype, dense)
    checkpoint.close()
    module = module.eval()
    return Loaded(
        module=module,
        path=source.path,
        name=source.name,
        revision=source.revision,
        form=form_of(config).name,
        quantization=quantization,
        dtype=str(next(module.parameters()).dtype).removeprefix("torch."),
    )


def _dtype(dtype: str | torch.dtype | None, device: str) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise EPMQInputError(
                f"`dtype` should be one of {', '.join(DTYPES)}, got `{dtype}`.",
                code="EPMQ-O01",
                subject="`dtype`",
                remedy="Leave it out for float32 on a CPU and the checkpoint's own on a GPU.",
            )
        return DTYPES[dtype]
    if dtype is None and device == "cpu":
        return torch.float32
    return dtype


def architecture_of(config: dict[str, Any]) -> type[torch.nn.Module]:
    """The class of transformers that a checkpoint's config.json names.

    Raises:
        EPMQInputError: it names none, or one that transformers does not have.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise EPMQInputError(
            f"{_WHAT}: `architectures` of config.json should name a model class of transformers "
            f"{transformers.__version__}, got `{names}`.",
            code="EPMQ-F38",
            subject="`architectures`",
            remedy="Code that comes with a checkpoint is not run here; install a transformers that "
            "knows the architecture.",
        )
    return known


def _full_precision(
    path: Path, config: dict[str, Any], dtype: torch.dtype | None
) -> torch.nn.Module:
    return architecture_of(config).from_pretrained(
        path, dtype="auto" if dtype is None else dtype, local_files_only=True
    )


def _quantized(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    declared: dict[str, Any],
    device: str,
    dtype: torch.dtype | None,
    dense: bool,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    method = str(declared.get("quant_method") or declared.get("method") or "").lower()
    if method not in ("gptq", "awq"):
        raise EPMQInputError(
            f"{_WHAT}: it is quantized by `{method or 'an unnamed method'}`; `gptq` and `awq` "
            "can be loaded.",
            code="EPMQ-F07",
            subject=_WHAT,
            remedy="Give a GPTQ or AWQ checkpoint, or the model in full precision.",
        )
    # `.host` first: it settles how many workers GPTQModel may start, and adds our definitions.
    from ..host.door import install

    install()
    # The kernel holds half precision; what is dense is read again in its own.
    half = dtype or DTYPES.get(config.get("dtype") or config.get("torch_dtype"))
    if half not in (torch.float16, torch.bfloat16):
        half = torch.bfloat16 if method == "awq" and device == "cpu" else torch.float16
    module = _host_module(checkpoint.path, config, method, device, half, dense)
    kernels = {type(module.get_submodule(name)).__name__ for name in packed_names(module)}
    facts = {
        "method": method,
        "bits": declared.get("bits"),
        "group_size": declared.get("group_size"),
        "sym": declared.get("sym"),
        "desc_act": declared.get("desc_act"),
    }
    if dense:
        facts["linears"] = make_dense(module, checkpoint, dtype or torch.float32)
        facts["kernel"] = "dense"
    else:
        facts["linears"] = len(packed_names(module))
        facts["kernel"] = ", ".join(sorted(kernels))
    return module, facts


def _host_module(
    path: Path, config: dict[str, Any], method: str, device: str, dtype: torch.dtype, dense: bool
) -> torch.nn.Module:
    from gptqmodel import BACKEND, GPTQModel

    from ..host.remote_code import distrusted

    backend = BACKEND.AUTO
    if dense or device == "cpu":
        backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
    if config.get("model_type") in _CLIP:
        from ..host.definitions.loading import load_clip

        return load_clip(path, device=device, dtype=dtype, backend=backend)
    with distrusted():
        return GPTQModel.load(os.fspath(path), device=device, dtype=dtype, backend=backend).model
