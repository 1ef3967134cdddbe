"""Fixtures of the merging tests; plain helpers are in merging_models.py."""

from __future__ import annotations

import pytest
import torch

from epmq_gptq.merging import method


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 entries: one or a few rows each, so that every tensor has several."""
    monkeypatch.setattr(method, "BLOCK", 7)
