"""The linear layers that the host will quantize, from the model it has built; no weight is read."""

from __future__ import annotations

from collections.abc import Iterator

import transformers
from gptqmodel.models.base import BaseQModel
from gptqmodel.utils.model import get_layers_with_prefixes

from .linears import Linear


def quantizable_linears(model: BaseQModel) -> Iterator[Linear]:
    """The layers the host will quantize, in forward order, `dynamic` exclusions left out."""
    config = model.quantize_config
    names = model.simple_layer_modules(model_config=model.model.config, quantize_config=config)
    _, layers = get_layers_with_prefixes(model.model, model.extract_layers_node())
    full_names = [f"{layer}.{name}" for layer in layers for group in names for name in group]
    if config.lm_head:
        full_names.append(model.lm_head)
    modules = dict(model.model.named_modules())
    for name in full_names:
        module = modules.get(name)
        if module is None or config.dynamic_get(layer_name=name) is False:
            continue
        yield Linear(
            name,
            tuple(module.weight.shape),
            _stored_names(model, name),
            transposed=isinstance(module, transformers.Conv1D),
        )


def _stored_names(model: BaseQModel, module: str) -> tuple[str, ...]:
    """Names a checkpoint may hold this module's weight under: the host knows the renamings."""
    source = model.turtle_model
    candidates = source._checkpoint_tensor_candidates(module, "weight") if source else []
    plain = f"{module}.weight"
    return (plain, *(name for name in candidates if name != plain))
