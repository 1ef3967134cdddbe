"""A tiny Llama in full precision and quantized in the ways that a checkpoint can be."""

import pytest
import tiny
import torch
from eval_tasks import write_tasks


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    # AWQ wants at least 64 outputs in every layer, so no grouped-query attention.
    return tiny.save(tiny.llama(2, 64, num_key_value_heads=4), folder / "merged")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, merged):
    """method → folder of the quantized model, saved by the host."""
    import os

    from epmq_gptq import EPMQConfig  # isort: skip
    from gptqmodel import BACKEND, AWQConfig, GPTQModel, RTNConfig

    folder = tmp_path_factory.mktemp("quantized")
    before = os.getcwd()
    os.chdir(folder)
    common = {"bits": 4, "group_size": 32, "offload_to_disk": False}
    rows = tiny.rows(8, 32, seed=1)
    try:
        for method in ("rtn", "awq", "epmq"):
            dtype, options, data = torch.float32, {}, rows
            if method == "rtn":
                config, data = RTNConfig(**common), None
            elif method == "awq":
                config, dtype = AWQConfig(**common), torch.bfloat16
                options = {"backend": BACKEND.AWQ_TORCH}
            else:
                config = EPMQConfig(**common, experts={"only": str(merged)}, allow_duplicates=True)
                data = {"only": rows}
            model = GPTQModel.load(str(merged), config, device="cpu", dtype=dtype)
            model.quantize(data, batch_size=4, **options)
            model.save(str(folder / method))
    finally:
        os.chdir(before)
    return {method: folder / method for method in ("rtn", "awq", "epmq")}
