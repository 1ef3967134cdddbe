"""Settings that must be made before torch and GPTQModel are imported."""

import os

# One OpenMP thread: two make the column loop of the rounding up to 10x slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """GPTQModel's own processors write a `logs` folder into the working directory."""
    monkeypatch.chdir(tmp_path)
