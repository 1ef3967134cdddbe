"""What a model can do, whatever it is: full precision or quantized, from a folder or a hub.

    from epmq_gptq.evaluation import TaskOptions, evaluate_model

    result = evaluate_model("merged-4bit", ["hellaswag", "gsm8k"], TaskOptions(limit=100))

One loader and one harness for every row of a table: two rows differ by their weights alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .harness import TaskOptions, evaluate_model, evaluate_tasks
    from .loading import Loaded, load_model
    from .results import Evaluation, Measure

__all__ = [
    "Evaluation",
    "Loaded",
    "Measure",
    "TaskOptions",
    "evaluate_model",
    "evaluate_tasks",
    "load_model",
]


def __getattr__(name: str):
    # torch and GPTQModel take seconds to import; a table of results does without them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = {"Evaluation": "results", "Measure": "results"}
    modules |= {"Loaded": "loading", "load_model": "loading"}
    return getattr(import_module(f".{modules.get(name, 'harness')}", __name__), name)
