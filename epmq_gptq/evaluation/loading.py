"""One loader for every model: full precision, GPTQ or AWQ, from a folder or a hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from ..calibration.rows import form_of
from ..checks.engines.packed import PACKED
from ..errors import EPMQInputError
from ..host.loading import choose_device
from ..io.checkpoints import Checkpoint, check_folder, resolve_source
from ..io.dtypes import SPELLED
from ..io.families import family_of
from ..io.folders import read_json

_WHAT = "the model"


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
            computes ("dense" or GPTQModel's kernel).
        dtype: of the computation.
    """

    module: torch.nn.Module
    path: Path
    name: str
    revision: str | None
    form: str
    quantization: dict[str, Any] | None
    dtype: str

    @cached_property
    def tokenizer(self):
        """The tokenizer of its folder.

        Raises:
            EPMQInputError: the folder has none that can be read.
        """
        try:
            return transformers.AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise EPMQInputError(
                f"{_WHAT}: `{self.name}` has no tokenizer that can be read.",
                code="EPMQ-F15",
                subject=_WHAT,
                remedy="Save the tokenizer of its base into the folder.",
            ) from error

    def facts(self) -> dict[str, Any]:
        """Plain data about the model, for a file of results."""
        return {
            "name": self.name,
            "revision": self.revision,
            "architecture": type(self.module).__name__,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "quantization": self.quantization,
            "dtype": self.dtype,
            "device": str(next(self.module.parameters()).device),
        }

    def summary(self) -> str:
        """One line about the model."""
        how = "full precision"
        if self.quantization is not None:
            how = (
                "{method}, {bits} bits, groups of {group_size}, computed by {kernel}"
            ).format_map(self.quantization)
        return f"{self.name}: {type(self.module).__name__}, {how}, {self.dtype}"


def load_model(
    spec: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    dense: bool | None = None,
) -> Loaded:
    """Load a model for evaluation: a language model, T5 or CLIP, quantized or not.

    Args:
        spec: folder or hub id ``org/name[@revision]`` with safetensors weights.
        device: None for a GPU where torch sees one.
        dtype: of the computation; None for float32 on a CPU, else that of the checkpoint.
        dense: of a quantized model, compute with its dequantized weights in ``dtype`` and not with
            GPTQModel's kernel. None for dense on a CPU, where the kernels know half precision only:
            slow on many CPUs, and an error of their own in every quantized row of a table.

    Raises:
        EPMQInputError: it cannot be had or read, is quantized by another method than GPTQ or AWQ,
            or its architecture is not one of transformers.
    """
    device = choose_device(device)
    dtype = _dtype(dtype, device)
    dense = device == "cpu" if dense is None else dense
    source = resolve_source(spec, what=_WHAT)
    check_folder(source.path, what=_WHAT)
    checkpoint = Checkpoint(source.path, what=_WHAT)
    config = checkpoint.config()
    quantization = _quantization_of(source.path, config)
    if quantization is None:
        module = architecture_of(config).from_pretrained(
            source.path, dtype="auto" if dtype is None else dtype, local_files_only=True
        )
        module = module.to(device)
    else:
        module = _packed_module(checkpoint, config, quantization["method"], device, dtype, dense)
        kernels = {type(layer).__name__ for layer in packed_layers(module).values()}
        quantization["linears"] = len(packed_layers(module))
        quantization["kernel"] = "dense" if dense else ", ".join(sorted(kernels))
        if dense:
            _make_dense(module, checkpoint, dtype or torch.float32)
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
        if dtype not in SPELLED:
            raise EPMQInputError(
                f"`dtype` should be one of {', '.join(SPELLED)}, got `{dtype}`.",
                code="EPMQ-O01",
                subject="`dtype`",
                remedy="Leave it out for float32 on a CPU and the checkpoint's own on a GPU.",
            )
        return SPELLED[dtype]
    return torch.float32 if dtype is None and device == "cpu" else dtype


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


def _quantization_of(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint declares of its quantization; None of one in full precision."""
    declared = config.get("quantization_config")
    if declared is None and (path / "quantize_config.json").is_file():
        declared = read_json(path, "quantize_config.json", _WHAT)  # AutoGPTQ wrote no other
    if not isinstance(declared, dict):
        return None
    method = str(declared.get("quant_method") or declared.get("method") or "").lower()
    if method not in ("gptq", "awq"):
        raise EPMQInputError(
            f"{_WHAT}: it is quantized by `{method or 'an unnamed method'}`; `gptq` and `awq` "
            "can be loaded.",
            code="EPMQ-F07",
            subject=_WHAT,
            remedy="Give a GPTQ or AWQ checkpoint, or the model in full precision.",
        )
    kept = ("bits", "group_size", "sym", "desc_act")
    return {"method": method} | {name: declared.get(name) for name in kept}


def _packed_module(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    method: str,
    device: str,
    dtype: torch.dtype | None,
    dense: bool,
) -> torch.nn.Module:
    """The transformers model as GPTQModel loads it, its linear layers packed."""
    # Ours first: it settles how many workers GPTQModel may start, and adds our definitions.
    from ..host.door import install

    install()
    from gptqmodel import BACKEND, GPTQModel

    from ..host.definitions.loading import load_clip
    from ..host.remote_code import distrusted

    # The kernels hold half precision; what will be dense is read again in its own.
    half = dtype or SPELLED.get(config.get("dtype") or config.get("torch_dtype"))
    if half not in (torch.float16, torch.bfloat16):
        half = torch.bfloat16 if method == "awq" and device == "cpu" else torch.float16
    backend = BACKEND.AUTO
    if dense or device == "cpu":
        backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
    options = {"device": device, "dtype": half, "backend": backend}
    if form_of(config).name == "images":
        return load_clip(checkpoint.path, **options)
    with distrusted():
        return GPTQModel.load(os.fspath(checkpoint.path), **options).model


def packed_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name → module of every linear layer of a model that GPTQModel holds packed."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "qweight", None), torch.Tensor)
    }


def _dequantized(layer: torch.nn.Module) -> torch.Tensor:
    """The weight of a packed layer, ``(out, in)`` float32, as GPTQModel dequantizes it."""
    if hasattr(layer, "dequantize_weight"):
        # The class's own: on the instance the host puts one that torch.compile takes seconds for.
        return type(layer).dequantize_weight(layer).T.float().contiguous()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = dequantize_gemm(
        layer.qweight, layer.qzeros, layer.scales.float(), layer.bits, layer.group_size
    )
    return weight.T.float().contiguous()


@torch.no_grad()
def _make_dense(model: torch.nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Replace every packed layer by a dense one with the weights that it stands for, in place."""
    # GPTQModel's own `dequantize_model` does it for GPTQ alone, and in float16.
    for name, layer in packed_layers(model).items():
        dense = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        dense.weight.data = _dequantized(layer)
        if layer.bias is not None:
            dense.bias.data = layer.bias.float()
        model.set_submodule(name, dense)
    # Not `model.to`: it would round rotary frequencies, which transformers keeps in float32.
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    family = family_of(checkpoint.config().get("model_type"))
    prefix = "" if family is None else family.optional_prefix
    # GPTQModel loads in half precision; what the checkpoint holds in more is read again.
    for name in checkpoint:
        if checkpoint.info(name).torch_dtype is None or name.rpartition(".")[2] in PACKED:
            continue
        # Checkpoints of the hub have what transformers may have dropped, and the other way round.
        names = (name, name.removeprefix(prefix), prefix + name)
        target = next((state[own] for own in names if own in state), None)
        if target is not None and tuple(target.shape) == checkpoint.info(name).shape:
            target.copy_(checkpoint.read(name))
