"""Packed linear layers as ordinary ones that hold exactly the weights the packed ones stand for.

The host's CPU kernels compute in half precision only, which many CPUs do slowly and which would
add an error of its own to every quantized row of a table. A dense layer is as fast as that of the
full-precision model, and the packed weights are all that sets the two apart.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..io.checkpoints import Checkpoint

# Of a quantized layer, in a checkpoint; its bias stays an ordinary tensor.
PACKED = ("qweight", "qzeros", "scales", "g_idx")


def is_packed(module: torch.nn.Module) -> bool:
    """Whether ``module`` is one of the host's quantized linear layers, GPTQ's or AWQ's."""
    return isinstance(getattr(module, "qweight", None), torch.Tensor)


def packed_names(model: torch.nn.Module) -> list[str]:
    """Names of the quantized linear layers of ``model``."""
    return [name for name, module in model.named_modules() if is_packed(module)]


def dense_weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a packed layer, ``(out, in)`` float32.

    GPTQ's are dequantized by the host to the dtype of its scales, AWQ's from the scales in float32.
    """
    if hasattr(module, "dequantize_weight"):
        # The class's own: on the instance the host puts one that torch.compile takes seconds for.
        return type(module).dequantize_weight(module).T.float().contiguous()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = dequantize_gemm(
        qweight=module.qweight,
        qzeros=module.qzeros,
        scales=module.scales.float(),
        bits=module.bits,
        group_size=module.group_size,
    )
    return weight.T.float().contiguous()


@torch.no_grad()
def make_dense(model: torch.nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Replace every packed layer of ``model`` by a dense one, and compute in ``dtype``.

    The host loads all tensors in half precision; those that the checkpoint holds in more are read
    again.

    Args:
        model: as the host loaded it; changed in place.
        checkpoint: where it was loaded from.
        dtype: of all floating tensors afterwards.

    Returns:
        How many layers were packed.
    """
    names = packed_names(model)
    for name in names:
        module = model.get_submodule(name)
        dense = torch.nn.Linear(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            device=module.qweight.device,
        )
        dense.weight.data = dense_weight(module)
        if module.bias is not None:
            dense.bias.data = module.bias.float()
        model.set_submodule(name, dense)
    model.to(dtype)
    _restore(model, checkpoint)
    return len(names)


def _restore(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    state = model.state_dict()
    for name in checkpoint:
        if checkpoint.info(name).torch_dtype is None or name.rpartition(".")[2] in PACKED:
            continue
        target = next((state[own] for own in _own_names(name) if own in state), None)
        if target is not None and tuple(target.shape) == checkpoint.info(name).shape:
            target.copy_(checkpoint.read(name))
    checkpoint.close()


def _own_names(name: str) -> Iterable[str]:
    # transformers 5 dropped this prefix of CLIP's vision tower; checkpoints of the hub have it.
    return name, name.removeprefix("vision_model."), f"vision_model.{name}"
