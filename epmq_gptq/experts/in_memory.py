"""Models in memory as experts: a module, a PEFT model, or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import EPMQInputError
from ..io.state_dicts import StateDict
from .adapters import Adapter


class InMemoryExpert:
    """What ``EPMQConfig.experts`` holds for a model in memory.

    The host copies the configuration once per layer; the weights must not be copied with it.

    Attributes:
        store: the weights; of a PEFT model, those of its base.
        adapter: what the PEFT model's active adapter changes, or None.
    """

    def __init__(self, store: StateDict, adapter: Adapter | None = None):
        self.store, self.adapter = store, adapter

    def __deepcopy__(self, memo: dict) -> InMemoryExpert:
        return self

    def __repr__(self) -> str:
        return repr(self.store)


def in_memory(model: Any, *, what: str) -> InMemoryExpert:
    """Take a module or a state dict as an expert; nothing is copied.

    Args:
        model: ``nn.Module``, PEFT model, or mapping of names to tensors.
        what: how errors call it.

    Raises:
        EPMQInputError: it has no weights, or a PEFT adapter that cannot be used exactly.
    """
    if isinstance(model, Mapping):
        factor = next((name for name in model if ".lora_" in str(name)), None)
        if factor is not None:
            raise EPMQInputError(
                f"{what}: the state dict is that of a PEFT model (it holds `{factor}`), and does "
                "not say how its factors are scaled.",
                code="EPMQ-F34",
                subject=what,
                remedy="Give the PEFT model itself, or the folder of its `save_pretrained()`.",
            )
        return InMemoryExpert(StateDict(_plain_names(model), what=what))
    model = _unwrapped(model)
    if hasattr(model, "peft_config"):
        return _from_peft(model, what)
    tensors = _plain_names(model.state_dict())
    return InMemoryExpert(StateDict(tensors, what=what, config=_config(model)))


def is_in_memory(value: Any) -> bool:
    """Whether an expert was given as a model or as tensors."""
    return isinstance(value, (torch.nn.Module, Mapping, InMemoryExpert))


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside of ``torch.compile`` and of data parallelism."""
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    # Asked of `_modules`, for a PEFT model hands attributes on to the model inside of it.
    while "_orig_mod" in model._modules or isinstance(model, parallel):
        model = model._modules.get("_orig_mod", model._modules.get("module"))
    return model


def _plain_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without what ``torch.compile`` and data parallelism put into its names."""
    plain = {
        name.replace("_orig_mod.", "") if isinstance(name, str) else name: tensor
        for name, tensor in tensors.items()
    }
    if all(isinstance(name, str) and name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
    return plain


def _config(model: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


# States of PEFT's layers in which the model is not base plus adapter: what they mean, the way out.
_NOT_AS_TRAINED = {
    "merged": (
        "merged into its base",
        "Call `unmerge_adapter()`, or give `merge_and_unload()`'s model.",
    ),
    "disable_adapters": ("disabled", "Enable it, or give the base alone."),
}


def _from_peft(model: Any, what: str) -> InMemoryExpert:
    from peft import get_peft_model_state_dict

    active = model.active_adapters
    active = active() if callable(active) else active
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1 or len(model.peft_config) != 1:
        raise EPMQInputError(
            f"{what}: the PEFT model has the adapters {sorted(model.peft_config)}, of which "
            f"{names} are active; which one the expert is must be clear.",
            code="EPMQ-F34",
            subject=what,
            remedy="Keep one adapter (`delete_adapter`), or give the adapter's folder.",
        )
    for state, (name, remedy) in _NOT_AS_TRAINED.items():
        if any(getattr(module, state, False) is True for module in model.modules()):
            raise EPMQInputError(
                f"{what}: the PEFT model's adapter is {name} at the moment.",
                code="EPMQ-F34",
                subject=what,
                remedy=remedy,
            )
    options = model.peft_config[names[0]].to_dict()
    # Without `save_embedding_layers` peft would ask the hub for the base's vocabulary.
    factors = get_peft_model_state_dict(model, adapter_name=names[0], save_embedding_layers=False)
    adapter = Adapter(options, StateDict(_plain_names(factors), what=what), what=what)
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in _plain_names(model.state_dict()).items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    base = {name.replace(".original_module.", "."): tensor for name, tensor in base.items()}
    store = StateDict(base, what=what, config=_config(model))
    return InMemoryExpert(store, adapter)
