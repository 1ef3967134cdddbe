"""One run of one quantizer in a process of its own, so that its peak memory is its own.

    python benchmarks/speed/worker.py CASE_AS_JSON QUANTIZER FOLDER

Prints one line, ``RESULT {...}``: seconds of ``quantize()`` alone, phases, peak memory, and the
loss of each layer.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder: GPTQModel looks for a package `kernels`, and would find our module.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from gptqmodel import GPTQModel

from epmq_gptq.io.phases import exact_phases, peak_memory
from speed.cases import Case, config_of, from_json, rows_of


def evict(folder: Path) -> None:
    """Put the files of a folder out of the system's cache."""
    os.sync()
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(case: Case, quantizer: str, folder: Path) -> dict:
    """The figures of one run."""
    shape = case.shape
    rows = rows_of(case)
    pooled = [row for own in rows.values() for row in own]
    data = {"gptq": pooled, "fast": {"merge": pooled}}.get(quantizer, rows)
    config = config_of(quantizer, folder, list(rows))
    model = GPTQModel.load(
        str(folder / "merged"), config, dtype=getattr(torch, shape.dtype), device=shape.device
    )
    if case.cold:
        evict(folder)
    before = peak_memory(shape.device)
    start = time.perf_counter()
    log = model.quantize(data, batch_size=shape.batch)
    seconds = time.perf_counter() - start
    report = log.get("epmq")
    timer = model.quant_region_timer.snapshot()
    return {
        "seconds": seconds,
        "peak": peak_memory(shape.device),
        "before": before,
        "phases": report.phases if report else {n: r["total"] for n, r in timer.items()},
        "losses": {f"{e['layer']}.{e['module']}": float(e["loss"]) for e in log["gptq"]},
    }


def main() -> None:
    """Run what the arguments say."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    case, quantizer, folder = from_json(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    with exact_phases():
        found = run(case, quantizer, folder)
    print("\nRESULT", json.dumps(found))


if __name__ == "__main__":
    main()
