"""The door to GPTQModel: what we lean on is there, and without an EPMQConfig nothing changes."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from gptqmodel import GPTQModel
from gptqmodel.models.base import BaseQModel
from gptqmodel.quantization.config import GPTQConfig
from judge import stored

from epmq_gptq import EPMQConfig, EPMQHostError, EPMQInputError
from epmq_gptq.host import door as host
from epmq_gptq.host import loop as layer_loop


def test_the_installed_host_has_everything_we_lean_on():
    host.probe()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(host, "version", lambda package: "8.0.1")
    with pytest.raises(EPMQHostError, match=r"supports GPTQModel 7.6–7.7, got 8.0.1"):
        host.probe()


@pytest.mark.parametrize("entry", sorted(host.LEANED_ON))
def test_a_host_whose_methods_moved_is_refused(monkeypatch, entry):
    owner, name, parameters = host.LEANED_ON[entry]
    monkeypatch.setitem(host.LEANED_ON, entry, (owner, name, (*parameters, "gone")))
    with pytest.raises(EPMQHostError, match=rf"{name}` without \['gone'\]"):
        host.probe()
    if owner is not None:
        monkeypatch.setitem(host.LEANED_ON, entry, (owner, f"{name}_moved", ()))
        with pytest.raises(EPMQHostError, match=rf"no `.*{name}_moved`"):
            host.probe()


def test_installing_twice_wraps_once():
    before = BaseQModel._quantize_with_calibration, BaseQModel.save
    host.install()
    assert (BaseQModel._quantize_with_calibration, BaseQModel.save) == before


def test_a_plain_gptq_config_runs_as_if_we_were_not_here(tmp_path, monkeypatch):
    merged, _ = tiny.family(tmp_path, experts=1, model=tiny.llama(layers=1))
    rows = tiny.rows(4, 40, seed=0)

    def run(out):
        model = tiny.load(merged, GPTQConfig(group_size=32))
        result = model.quantize(rows, batch_size=2)
        model.save(str(out))
        return result

    assert set(run(tmp_path / "with")) == {"gptq"}
    monkeypatch.setattr(
        BaseQModel, "_quantize_with_calibration", BaseQModel._quantize_with_calibration.__wrapped__
    )
    monkeypatch.setattr(BaseQModel, "save", BaseQModel.save.__wrapped__)
    run(tmp_path / "without")
    one, other = stored(tmp_path / "with"), stored(tmp_path / "without")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_triton_rounds_where_nvcc_is_missing_and_it_is_exact(compiled, exact, monkeypatch):
    from gptqmodel.quantization import gptq_cuda

    from epmq_gptq.kernels.rounding_triton import triton_block_update

    hosts = gptq_cuda.gptq_block_update
    monkeypatch.setattr(gptq_cuda, "block_update_available", lambda: compiled)
    monkeypatch.setattr(layer_loop, "triton_rounds", lambda device: exact)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ZeroDivisionError), layer_loop._fast_rounding("cuda:0"):
            ours = not compiled and exact
            assert gptq_cuda.gptq_block_update is (triton_block_update if ours else hosts)
            assert gptq_cuda.block_update_available() is (compiled or exact)
            raise ZeroDivisionError
    told = [str(warning.message) for warning in caught]
    assert bool(told) is (not compiled and not exact) and len(told) < 2
    assert not told or "the same result, in more time" in told[0]
    assert gptq_cuda.gptq_block_update is hosts
    assert gptq_cuda.block_update_available() is compiled


def test_quantizing_twice_is_refused(tmp_path):
    merged, experts = tiny.family(tmp_path, experts=1, model=tiny.llama(layers=1))
    rows = {"expert0": tiny.rows(4, 40, seed=0)}
    config = EPMQConfig(group_size=32, experts=experts)
    model = tiny.load(merged, config)
    model.quantize(rows)
    with pytest.raises(EPMQInputError, match="quantized already"):
        model.quantize(rows)


def test_excluding_every_layer_is_refused(tmp_path):
    merged, experts = tiny.family(tmp_path, experts=1, model=tiny.llama(layers=1))
    config = EPMQConfig(group_size=32, experts=experts, dynamic={"-:.*": {}})
    model = tiny.load(merged, config)
    with pytest.raises(EPMQInputError, match="no linear layer is left"):
        model.quantize({"expert0": tiny.rows(4, 40, seed=0)})


@pytest.mark.parametrize("load", [GPTQModel.load, GPTQModel.from_pretrained])
def test_a_revision_without_a_hub_id_of_its_own_is_refused(load, tmp_path):
    merged, experts = tiny.family(tmp_path, experts=1, model=tiny.llama(layers=1))
    config = EPMQConfig(group_size=32, experts=experts)
    for spec in (merged, str(merged), "org/merged@v1", "./merged"):
        with pytest.raises(EPMQInputError, match="`revision` goes with a hub id") as caught:
            load(model_id_or_path=spec, quantize_config=config, revision="main")
        assert caught.value.code == "EPMQ-O03" and str(tmp_path) not in str(caught.value)


def test_text_rows_are_tokenised_by_the_merged_models_tokenizer(tmp_path):
    merged, experts = tiny.family(tmp_path, experts=1, model=tiny.llama(layers=1))
    config = EPMQConfig(group_size=32, experts=experts)
    model = tiny.load(merged, config)
    rows = ["one byte is one token", {"text": "so are these"}, [5, 6, 7], {"input_ids": [8] * 4}]
    report = model.quantize({"expert0": rows}, batch_size=2)["epmq"]
    assert report.rows == {"expert0": 4} and report.tokens == {"expert0": 21 + 12 + 3 + 4}
