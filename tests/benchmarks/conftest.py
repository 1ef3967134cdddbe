"""The benchmarks' modules are importable as when they are run as scripts; the suites, quick."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="session")
def suite_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def suites(suite_cache):
    """Name → the suite in its quick version."""
    from suites import SUITES, build_suite

    return {name: build_suite(name, quick=True, cache=suite_cache, device="cpu") for name in SUITES}


@pytest.fixture(params=["vision8", "text4", "seq2seq4"])
def suite(request, suites):
    return suites[request.param]
