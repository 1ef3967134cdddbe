"""E-PMQ against stock GPTQ: same merge, rows, grid and machine, in one process, taken in turn.

    python benchmarks/overhead.py --width 512 --layers 2 --experts 4 --tokens 16384

Prints one JSON line per quantizer (GPTQ, and E-PMQ with the targets of each profile) and one per
ratio. A ratio is printed only after the parity gate: with the merge in the expert's place, every
layer's loss must be the host's within 1 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny
import torch
from gptqmodel.quantization.config import GPTQConfig

from epmq_gptq import EPMQConfig

ALPHA = 0.05  # also GPTQ's damping, so that both solve equally conditioned systems


def quantize(merged: Path, config, rows) -> tuple[float, dict[str, float]]:
    """Seconds of ``quantize()`` alone (loading is the same for both), and the loss per layer."""
    loaded = tiny.load(merged, config)
    start = time.perf_counter()
    log = loaded.quantize(rows, batch_size=8)["gptq"]
    seconds = time.perf_counter() - start
    return seconds, {f"{entry['layer']}.{entry['module']}": float(entry["loss"]) for entry in log}


def parity(merged: Path, rows: list) -> None:
    """Raise SystemExit unless E-PMQ in its limit reaches the losses of the host's GPTQ.

    Not their codes: the two add up fp32 Grams in another order, and one weight that tips over a
    rounding edge moves the rest of its row.
    """
    host = GPTQConfig(bits=4, group_size=128, damp_percent=ALPHA)
    ours = EPMQConfig(
        profile="paper", bits=4, group_size=128, experts={"merge": str(merged)}, alpha=ALPHA
    )
    _, expected = quantize(merged, host, rows)
    _, got = quantize(merged, ours, {"merge": rows})
    for name, loss in expected.items():
        if abs(got[name] - loss) > 0.01 * loss + 1e-9:  # the log rounds to 1e-10
            raise SystemExit(f"parity gate: `{name}` has loss {got[name]}, the host {loss}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens in all")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    length = 256
    count = options.tokens // length // options.experts
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        llama = tiny.llama(
            options.layers,
            options.width,
            intermediate_size=4 * options.width,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
        )
        merged, experts = tiny.family(folder, options.experts, model=llama)
        rows = {name: tiny.rows(count, length, seed=i) for i, name in enumerate(experts)}
        pooled = [row for expert_rows in rows.values() for row in expert_rows]
        parity(merged, pooled[:8])
        grid = dict(bits=4, group_size=128)
        seconds: dict[str, list[float]] = {"gptq": [], "paper": [], "best": []}
        for _ in range(options.runs):
            host = GPTQConfig(**grid, damp_percent=ALPHA)
            seconds["gptq"].append(quantize(merged, host, pooled)[0])
            for profile, more in (("paper", {"alpha": ALPHA}), ("best", {})):
                ours = EPMQConfig(**grid, profile=profile, experts=experts, **more)
                seconds[profile].append(quantize(merged, ours, rows)[0])
    shape = {key: getattr(options, key) for key in ("width", "layers", "experts", "tokens")}
    setting = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gptqmodel": version("gptqmodel"),
    }
    for name, times in seconds.items():
        row = {"quantizer": name, "min_s": min(times), "median_s": statistics.median(times)}
        print("\nRESULT", json.dumps(row | shape | setting))
    for profile in ("paper", "best"):
        ratios = [a / b for a, b in zip(seconds[profile], seconds["gptq"], strict=True)]
        found = {"profile": profile, "ratio_median": statistics.median(ratios), "ratios": ratios}
        print("RESULT", json.dumps(found | shape))


if __name__ == "__main__":
    main()
