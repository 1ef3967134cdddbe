"""The definitions of our families, and their way into the host."""

from __future__ import annotations

from importlib import import_module

from gptqmodel.models import auto

from ...io.families import FAMILIES


def register() -> None:
    """Make them known to GPTQModel; one of the host's own is never replaced."""
    for family in FAMILIES:
        definition = import_module(f".{family.name}", __package__).DEFINITION
        for model_type in family.model_types:
            if model_type not in auto.MODEL_MAP:
                auto.MODEL_MAP[model_type] = definition
                auto.SUPPORTED_MODELS.append(model_type)
