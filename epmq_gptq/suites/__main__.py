"""``python -m epmq_gptq.suites NAME``: build a suite and show what merging costs in it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from ..merging import merge_state_dicts
from .build import SUITES, build_suite, facts
from .suite import Score, Suite

MERGES = {
    "average": ("average", {}),
    "task arithmetic": ("task_arithmetic", {}),
    "TIES": ("ties", {}),
}


def load(folder: Path) -> torch.nn.Module:
    """The model of a folder, by the class that its configuration names."""
    import transformers

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


def main() -> None:
    """Print accuracy and loss of base, experts and plain merges."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--split", default="evaluation")
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    console = Console()
    with console.status("building") as status:
        suite = build_suite(
            options.suite,
            seed=options.seed,
            quick=options.quick,
            cache=options.cache,
            progress=lambda name, done: status.update(f"training {name}, {100 * done:.0f} %"),
        )
    console.print(result_table(suite, options.split))


def result_table(suite: Suite, split: str) -> Table:
    """Base, each expert on its own task, and every plain merge."""
    table = Table(title=f"{suite.name}, {facts(suite)['seconds']:.0f} s: accuracy (%) · loss")
    for column in ("model", *suite.tasks, "average"):
        table.add_column(column, justify="left" if column == "model" else "right")

    def row(label: str, scores: dict[str, Score]) -> None:
        shown = [f"{s.accuracy:.1f} · {s.loss:.2f}" for s in scores.values()]
        accuracy = sum(s.accuracy for s in scores.values()) / len(scores)
        loss = sum(s.loss for s in scores.values()) / len(scores)
        table.add_row(label, *shown, f"{accuracy:.1f} · {loss:.2f}")

    model = load(suite.base)
    row("base", suite.evaluate(model, split=split))
    own = {}
    for task, folder in suite.experts.items():
        own |= suite.evaluate(load(folder), [task], split=split)
    row("experts", own)
    stored = {name: _tensors(folder) for name, folder in suite.experts.items()}
    base = _tensors(suite.base)
    for label, (method, parameters) in MERGES.items():
        merged = merge_state_dicts(method, base, stored, parameters)
        model.load_state_dict(_in_model(model, merged), strict=False)
        row(label, suite.evaluate(model, split=split))
    return table


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _in_model(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names of the live model: a checkpoint's may have a prefix more."""
    names = model.state_dict().keys()
    return {
        next((n for n in names if name == n or name.endswith(f".{n}")), name): tensor
        for name, tensor in tensors.items()
    }


if __name__ == "__main__":
    main()
