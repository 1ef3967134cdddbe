"""What the checks for bad numbers cost: `python benchmarks/finite_checks.py`.

Quantizes one layer of a Llama (random weights; time does not depend on them) and adds up the
seconds within every check for numbers that are not finite. Prints them and their share of the run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny

from epmq_gptq import EPMQConfig
from epmq_gptq.experts import experts
from epmq_gptq.experts.passes import trajectories
from epmq_gptq.host import solver, task
from epmq_gptq.method import deltas, statistics
from epmq_gptq.method.nonfinite import Peaks

# The checks, where they are looked up; `WeightDelta.size` also tells whether a weight differs.
CHECKS = [
    (Peaks, "add"),
    (statistics.GroupStatistics, "_check_finite"),
    (trajectories, "_is_finite"),
    (deltas.WeightDelta, "size"),
    (solver, "check_finite"),
    (task, "check_finite"),
    (experts, "check_finite"),
    (task.EPMQ, "_check_scales"),
]


class Stopwatch:
    """Seconds within functions, each second once per thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running = threading.local()

    def watch(self, owner, name: str) -> None:
        """Replace a function of a class or a module by one whose time is counted."""
        own = getattr(owner, name)

        def timed(*arguments, **options):
            if getattr(self._running, "now", False):
                return own(*arguments, **options)
            self._running.now, start = True, time.perf_counter()
            try:
                return own(*arguments, **options)
            finally:
                self._running.now = False
                label = f"{owner.__name__.rpartition('.')[2]}.{name}"
                spent = time.perf_counter() - start
                self.seconds[label] = self.seconds.get(label, 0.0) + spent

        setattr(owner, name, timed)


def main() -> None:
    """Run once, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16, help="of each of two experts")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eta", type=float, default=0.5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"intermediate_size": 4 * options.hidden, "max_position_embeddings": options.length}
        base = tiny.llama(layers=1, hidden=options.hidden, **shape)
        merged, sources = tiny.family(Path(folder), experts=2, model=base)
        rows = {
            name: tiny.rows(options.rows, options.length, seed=index)
            for index, name in enumerate(sources)
        }
        config = EPMQConfig(experts=sources, alpha=0.1, eta=options.eta, rho=options.eta)
        model = tiny.load(merged, config)
        watch = Stopwatch()
        for owner, name in CHECKS:
            watch.watch(owner, name)
        start = time.perf_counter()
        model.quantize(rows)
        wall = time.perf_counter() - start
    for label, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1]):
        print(f"{label:<32} {seconds:8.3f} s")
    total = sum(watch.seconds.values())
    print(f"{'all checks':<32} {total:8.3f} s of {wall:.1f} s, {100 * total / wall:.2f} %")


if __name__ == "__main__":
    main()
