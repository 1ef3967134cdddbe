"""Three suites of small tasks that need no network: what a merge costs, and what a method repairs.

Each has a base, one fully fine-tuned expert of it per task, rows to calibrate with and two splits
to measure on. They are trained from seeds once and kept in the cache.
"""

from .build import SUITES, build_suite
from .suite import SPLITS, Score, Suite

__all__ = ["SPLITS", "SUITES", "Score", "Suite", "build_suite"]
