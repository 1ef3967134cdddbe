"""A tiny Llama in full precision and quantized in the ways that a checkpoint can be."""

import pytest
import tiny
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
    """method → folder of the quantized model."""
    from epmq_gptq.evaluation.baselines import QuantizeSettings, quantize

    folder = tmp_path_factory.mktemp("quantized")
    settings = QuantizeSettings(batch_size=4, options={"allow_duplicates": True})
    rows = {"only": tiny.rows(8, 32, seed=1)}
    found = {"rtn": "RTN", "awq": "AWQ", "epmq": "E-PMQ"}
    for name, method in found.items():
        quantize(method, merged, {"only": merged}, rows, settings, folder / name)
    return {name: folder / name for name in found}
