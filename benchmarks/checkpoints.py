"""What a run pays for being able to go on after a kill.

    python benchmarks/checkpoints.py            # a few minutes on two cores
    python benchmarks/checkpoints.py --gpu

The same run without a checkpoint, with one that commits as often as it may, and with one that
commits every layer, in turn. The parity gate: all save the same tensors. Prints one line each.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from gptqmodel import CheckpointConfig, GPTQModel
from speed.cases import SHAPES, Case, Shape, build, config_of, rows_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from judge import stored

from epmq_gptq.host.resume import session

SHAPES["llama-512x8"] = Shape("llama", 512, 1408, 8, 256)
SHAPES["llama-4096x4"] = Shape("llama", 4096, 14336, 4, 512, 32, 8, "cuda", "bfloat16")
MODES = ("none", "by time", "every layer")


def run(case: Case, folder: Path, mode: str) -> tuple[dict[str, float], dict]:
    """Seconds and bytes of one run, and its tensors."""
    shape, made = case.shape, folder / mode.replace(" ", "-")
    session.SHARE = float("inf") if mode == "every layer" else 0.05
    rows = rows_of(case)
    config = config_of("best", folder, list(rows))
    dtype = getattr(torch, shape.dtype)
    model = GPTQModel.load(str(folder / "merged"), config, dtype=dtype, device=shape.device)
    checkpoint = None if mode == "none" else CheckpointConfig(made / "checkpoint")
    start = time.perf_counter()
    model.quantize(rows, batch_size=shape.batch, checkpoint=checkpoint)
    found = {"seconds": time.perf_counter() - start}
    found["commit"] = model.epmq_report.phases.get("commit", 0.0)
    if checkpoint is not None:
        files = [file for file in (made / "checkpoint" / "objects").iterdir()]
        found["bytes"] = sum(file.stat().st_size for file in files)
    model.save(str(made / "out"))
    return found, stored(made / "out")


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    case = Case("llama-4096x4" if options.gpu else "llama-512x8", 4, options.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(case, folder)
        found = {mode: run(case, folder, mode) for mode in MODES}
    tensors = found["none"][1]
    print(f"{case.key}: {case.shape.layers} layers, {case.tokens} tokens")
    for mode, (figures, saved) in found.items():
        same = saved.keys() == tensors.keys() and all(
            torch.equal(saved[name], tensors[name]) for name in tensors
        )
        if not same:
            raise SystemExit(f"parity gate: a run with checkpoints {mode} saves other tensors")
        share = figures["commit"] / figures["seconds"]
        size = figures.get("bytes", 0) / 1e6
        print(
            f"{mode:<12} {figures['seconds']:7.1f} s, of which commits {figures['commit']:6.2f} s "
            f"({share:.1%}); {size:.1f} MB in the end"
        )


if __name__ == "__main__":
    main()
