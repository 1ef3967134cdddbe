"""The definitions by the ``model_type`` of a model's config.json, and their way into the host."""

from __future__ import annotations

from gptqmodel.models import auto
from gptqmodel.models.base import BaseQModel


def definitions() -> dict[str, type[BaseQModel]]:
    """``model_type`` → definition."""
    # Imported here: they import the rows, which need no definition.
    from . import clip, t5

    return {**clip.DEFINITIONS, **t5.DEFINITIONS}


def register() -> None:
    """Make them known to GPTQModel; one of the host's own is never replaced."""
    for model_type, definition in definitions().items():
        if model_type not in auto.MODEL_MAP:
            auto.MODEL_MAP[model_type] = definition
            auto.SUPPORTED_MODELS.append(model_type)
