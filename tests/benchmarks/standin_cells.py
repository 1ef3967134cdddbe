"""What a worker does in the tests of the runner: figures from a formula, failures on demand."""

from __future__ import annotations

import os
from pathlib import Path

TASKS = ("a", "b")


def score(accuracy: float, loss: float = 1.0) -> dict:
    return {task: {"accuracy": accuracy, "loss": loss, "items": 50} for task in TASKS}


def figures(cell, place, folder, key):
    """As ``run_cell``. Held-out rows like alpha 1 and gamma 0.5 best, the shown ones others."""
    work = Path(place["work"])
    with open(work / "calls.txt", "a", encoding="utf-8") as calls:
        calls.write(f"{cell.name}\n")
    if cell.method == "AWQ" and cell.bits == 3:
        return {"refused": "no kernel for 3 bits"}
    if cell.method == "RTN" and cell.bits == 3:
        raise RuntimeError("the disk is full")
    if cell.method == "GPTQ" and cell.bits == 3 and cell.merger == "ties":
        os._exit(7)
    if cell.kind == "suite":
        return {"tasks": list(TASKS), "folder": "x"}
    result = {"scores": {"evaluation": score(50 + (cell.alpha or 0))}, "seconds": 1.5}
    if cell.held_out:
        gamma = cell.parameters.get("reduce_non_diagonal_ratio")
        good = cell.alpha == 1.0 or gamma == 0.5
        result["scores"]["held_out"] = score(90 if good else 10)
    if cell.kind == "merge":
        place_of = work / "merges" / key
        place_of.mkdir(parents=True, exist_ok=True)
        result["merged"] = f"merges/{key}"
    if cell.kind == "quantize":
        assert (work / folder).is_dir(), "the merge comes first"
    if cell.kind == "budget":
        part = {"scores": result["scores"], "seconds": 2.0, "ratio": 1.0}
        return {"budget": {"GPTQ": part, "E-PMQ": part | {"seconds": 3.0, "ratio": 1.5}}}
    return result
