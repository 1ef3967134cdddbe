"""Models in memory as experts: a module, a PEFT model, or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapters import Adapter
from .errors import EPMQInputError
from .state_dicts import StateDict


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
        return InMemoryExpert(StateDict(model, what=what))
    if hasattr(model, "peft_config"):
        return _from_peft(model, what)
    return InMemoryExpert(StateDict(model.state_dict(), what=what, config=_config(model)))


def is_in_memory(value: Any) -> bool:
    """Whether an expert was given as a model or as tensors."""
    return isinstance(value, (torch.nn.Module, Mapping, InMemoryExpert))


def _config(model: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


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
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise EPMQInputError(
            f"{what}: the PEFT model's adapter is merged into its base at the moment.",
            code="EPMQ-F34",
            subject=what,
            remedy="Call `unmerge_adapter()`, or give `merge_and_unload()`'s model.",
        )
    options = model.peft_config[names[0]].to_dict()
    # Without `save_embedding_layers` peft would ask the hub for the base's vocabulary.
    factors = get_peft_model_state_dict(model, adapter_name=names[0], save_embedding_layers=False)
    adapter = Adapter(options, StateDict(factors, what=what), what=what)
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    base = {name.replace(".original_module.", "."): tensor for name, tensor in base.items()}
    store = StateDict(base, what=what, config=_config(model))
    return InMemoryExpert(store, adapter)
