"""E-PMQ against stock GPTQModel: time, memory, and what they depend on.

    make bench-speed                 # 40 minutes on two cores
    python benchmarks/speed.py --quick

First the parity gate: with the merge as its one expert, every layer's loss must be the host's
within 1 %. Then rounds: each runs every quantizer of every case in turn, each in a process of its
own, and a ratio is of two runs of the same round. Writes benchmarks/RESULTS.md, a chart beside it,
and all figures as JSON. With a GPU: the kernels, and a Llama of 8B's width.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from speed.cases import Case, build, to_json
from speed.tables import chart, legend, memory_table, phase_table, ratio_table

ROOT = Path(__file__).resolve().parents[1]
ALL = ("gptq", "fast", "paper", "best")
CPU = {
    Case("clip-384", 8, 17408): ALL,
    Case("llama-512", 8, 8192): ("gptq", "paper", "best"),
    Case("llama-512", 8, 32768): ("gptq", "paper", "best"),
    Case("llama-512", 8, 65536): ("gptq", "paper"),
    Case("llama-1024", 2, 32768): ("gptq", "paper"),
    Case("llama-1024", 8, 32768): ALL,
    Case("llama-1024", 20, 32768): ("gptq", "paper"),
    Case("llama-1024", 8, 32768, cold=True): ("paper",),  # its ratios are to the warm runs
}
GPU = {Case("llama-8b", 4, 131072): ALL}
QUICK = {Case("llama-256", 2, 2048): ALL, Case("llama-256", 4, 2048): ALL}


def run(case: Case, quantizer: str, folder: Path) -> dict:
    """The figures of one run in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, str(ROOT / "benchmarks" / "speed" / "worker.py")]
    done = subprocess.run(
        [*command, to_json(case), quantizer, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{case.key}, {quantizer}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def parity(folder: Path) -> float:
    """The largest difference of a layer's loss from the host's, relative; raises SystemExit.

    Not of codes: the two add up fp32 Grams in another order, and one weight that tips over a
    rounding edge moves the rest of its row.
    """
    case = Case("llama-256", 2, 2048)
    build(case, folder)
    expected, got = (run(case, name, folder)["losses"] for name in ("gptq", "fast"))
    if not expected or expected.keys() != got.keys():
        raise SystemExit(f"parity gate: layers {sorted(got)}, the host has {sorted(expected)}")
    worst = 0.0
    for name, loss in expected.items():
        # The host's log rounds to 1e-10.
        apart = max(0.0, abs(got[name] - loss) - 1e-9) / loss
        worst = max(worst, apart)
        if apart > 0.01:
            raise SystemExit(f"parity gate: `{name}` has loss {got[name]}, the host {loss}")
    return worst


def measured(cases: dict[Case, tuple[str, ...]], rounds: int, scratch: Path) -> dict:
    """Case → quantizer → figures, round by round."""
    runs: dict[Case, dict[str, list]] = {case: {} for case in cases}
    for case, quantizers in cases.items():
        folder = scratch / case.key
        folder.mkdir()
        build(case, folder)
        for number in range(rounds):
            # Every other round backwards: nobody always comes first.
            for name in quantizers[:: -1 if number % 2 else 1]:
                found = run(case, name, folder)
                runs[case].setdefault(name, []).append(found)
                print(f"{case.key} {name}: {found['seconds']:.1f} s", flush=True)
        runs[case] = {name: runs[case][name] for name in quantizers}
    return runs


def document(
    runs: dict, worst: float, minutes: float, rounds: int, kernels: str, picture: str
) -> str:
    """benchmarks/RESULTS.md."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ("epmq_gptq", "torch", "gptqmodel", "transformers", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return f"""# Speed

`make bench-speed`: {minutes:.0f} minutes, {rounds} rounds; {platform.machine()}, \
{os.cpu_count()} cores, {threads} thread(s), {gpu}; python {platform.python_version()}, {versions}.
Random weights, 4 bits, groups of 128, rows of equal length. Seconds are those of `quantize()`, \
preflight included. A ratio is of two runs of one round.

{legend()}
Parity gate: the losses of `fast` and `gptq` differ by {100 * worst:.3f} % at most (1 % allowed).

## Time

{ratio_table(runs)}
![time against experts and tokens]({picture})

## Phases, seconds

{phase_table(runs)}
## Memory

Peak of the process (on a GPU: of the device), once it is loaded and after the run.

{memory_table(runs)}
## Kernels

{kernels}"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all runs")
    parser.add_argument("--gpu", action="store_true", help="the GPU's cases alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--work", type=Path, help="where models lie meanwhile")
    options = parser.parse_args()

    import torch

    has_gpu = torch.cuda.is_available()
    if options.gpu and not has_gpu:
        raise SystemExit("--gpu: torch sees no GPU here")
    cases = QUICK if options.quick else {} if options.gpu else dict(CPU)
    if has_gpu and not options.quick:
        cases |= GPU
    kernels = (
        "No GPU here; an H200's are in [results/kernels-h200.md](results/kernels-h200.md). "
        "`python benchmarks/speed.py --gpu` measures them.\n"
    )
    start = time.perf_counter()
    if has_gpu:
        from speed.kernel_times import table

        kernels = table()
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        gate = Path(scratch) / "parity"
        gate.mkdir()
        worst = parity(gate)
        print(f"parity: {100 * worst:.3f} %", flush=True)
        runs = measured(cases, options.rounds, Path(scratch))
    minutes = (time.perf_counter() - start) / 60
    results = options.out / "results"
    results.mkdir(parents=True, exist_ok=True)
    chart(runs, results / "speed.svg")
    figures = [
        {"case": dataclasses.asdict(case), "quantizer": name, "runs": found}
        for case, one in runs.items()
        for name, found in one.items()
    ]
    (results / "speed.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = document(runs, worst, minutes, options.rounds, kernels, "results/speed.svg")
    (options.out / "RESULTS.md").write_text(text, encoding="utf-8")
    print(f"wrote {options.out / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
