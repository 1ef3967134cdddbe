"""What a model can do, whatever it is: full precision or quantized, from a folder or a hub.

    from epmq_gptq.evaluation import evaluate_suite, evaluate_tasks, load_model

    loaded = load_model("merged-4bit")
    result = evaluate_suite(loaded, build_suite("text4"))
    result = evaluate_tasks(loaded, ["hellaswag", "gsm8k"], limit=100)

One loader and one harness for every row of a table: two rows differ by their weights alone.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .harness import evaluate_tasks
    from .loading import Loaded, load_model
    from .results import Evaluation, Measure
    from .suites import evaluate_suite

__all__ = [
    "Evaluation",
    "Loaded",
    "Measure",
    "evaluate_suite",
    "evaluate_tasks",
    "load_model",
]

_PLACES = {
    "Evaluation": "results",
    "Measure": "results",
    "Loaded": "loading",
    "load_model": "loading",
    "evaluate_suite": "suites",
    "evaluate_tasks": "harness",
}


def __getattr__(name: str):
    # torch and GPTQModel take seconds to import; a table of results does without them.
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
