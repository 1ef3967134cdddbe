"""The driver's modules are importable as they are when it is run as a script."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE.parents[1] / "benchmarks", HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
