"""Settings that must be made before torch and GPTQModel are imported."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

# One OpenMP thread: two make the column loop of the rounding up to 10x slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# GPTQModel compiles its torch kernel anew for every model that is loaded; that costs a second each.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Hypothesis keeps tables of Unicode; not in the checkout.
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.mkdtemp(prefix="epmq-hypothesis-")

import hypothesis
import pytest
import torch

# GPTQModel's logger searches the whole path for IPython with every line that it draws.
sys.modules.setdefault("IPython", None)
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels are interpreted on CPUs
atexit.register(shutil.rmtree, os.environ["HYPOTHESIS_STORAGE_DIRECTORY"], ignore_errors=True)

# The same examples in every run. To look for others: HYPOTHESIS_PROFILE=search, with
# --hypothesis-seed.
hypothesis.settings.register_profile("search", deadline=None, database=None)
hypothesis.settings.register_profile("same", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_finish():
    """GPTQModel and accelerate collect garbage several times a run: not among what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """GPTQModel's own processors write a `logs` folder into the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process talks to, and an empty cache."""
    from hub import Hub
    from huggingface_hub import constants
    from huggingface_hub.hf_api import api

    with Hub() as double:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", double.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        # The address is also part of a template that was filled in when the library was imported.
        template = double.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(api, "endpoint", double.url)
        yield double


@pytest.fixture(scope="session")
def reader():
    """A process without this package that loads checkpoints."""
    from fresh import Reader

    process = Reader()
    yield process
    process.close()
