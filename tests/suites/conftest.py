"""The three suites in their quick versions, built once, and how well their models do."""

from __future__ import annotations

from pathlib import Path

import pytest

from epmq_gptq.suites import SUITES, build_suite
from epmq_gptq.suites.__main__ import load


@pytest.fixture(scope="session")
def suite_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def suites(suite_cache):
    return {name: build_suite(name, quick=True, cache=suite_cache, device="cpu") for name in SUITES}


@pytest.fixture(params=sorted(SUITES))
def suite(request, suites):
    return suites[request.param]


@pytest.fixture(scope="session")
def scores(suites):
    """Suite → (scores of the base, of each expert on its own task)."""
    found = {}
    for name, suite in suites.items():
        own = {}
        for task, folder in suite.experts.items():
            own |= suite.evaluate(load(folder), [task])
        found[name] = suite.evaluate(load(suite.base)), own
    return found
