"""What `quantize` refuses before any compute, when it is called from Python."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import V_PROJ

from epmq_gptq import EPMQConfig, EPMQInputError


@pytest.fixture
def untouched(tmp_path, monkeypatch):
    """A family, and a guard: no forward pass may run."""
    from gptqmodel.looper.module_looper import ModuleLooper

    def run(*arguments, **options):
        raise AssertionError("the loop was entered")

    monkeypatch.setattr(ModuleLooper, "loop", run)
    merged, experts = tiny.family(tmp_path, experts=2)
    return merged, experts, {n: tiny.rows(4, 40, seed=i) for i, n in enumerate(experts)}


def load(merged, experts):
    return tiny.load(merged, EPMQConfig(group_size=32, experts=experts, alpha=0.1))


def test_calibration_must_name_the_experts(untouched):
    merged, experts, rows = untouched
    model = load(merged, experts)
    with pytest.raises(EPMQInputError, match=r"same experts.*without rows: expert1\."):
        model.quantize({"expert0": rows["expert0"]})
    with pytest.raises(EPMQInputError, match=r"not an expert: other\."):
        model.quantize(rows | {"other": rows["expert0"]})
    with pytest.raises(EPMQInputError, match=r"should map every expert's name"):
        model.quantize(rows["expert0"])
    with pytest.raises(EPMQInputError, match=r"expert `expert1`: it holds no rows"):
        model.quantize(rows | {"expert1": []})


def test_an_expert_of_another_shape_or_with_missing_tensors_is_refused(untouched, tmp_path):
    merged, experts, rows = untouched
    other = tiny.save(tiny.llama(layers=1), tmp_path / "one-layer")
    with pytest.raises(EPMQInputError, match=r"expert `x`: `num_hidden_layers` is 1"):
        load(merged, {"x": other}).quantize({"x": rows["expert0"]})
    file = experts["expert1"] / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{V_PROJ}.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(5)
    save_file(tensors, file)
    missing = r"expert `expert1`: `\S+v_proj.weight` is missing\. 2 other errors besides"
    with pytest.raises(EPMQInputError, match=missing):
        load(merged, experts).quantize(rows)
    tensors[f"{V_PROJ}.weight"] = torch.zeros(32, 64)
    save_file(tensors, file)
    shapes = r"up_proj.weight` has shape \(3, 4\).*down_proj.weight` has shape \(5,\)"
    with pytest.raises(EPMQInputError, match=shapes):
        load(merged, experts).quantize(rows)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"calibration_concat_separator": "x"}, "calibration_concat_separator"),
        ({"calibration_sort": "shuffle"}, "calibration_sort"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_options_that_would_mix_experts_are_refused(untouched, options, name):
    merged, experts, rows = untouched
    with pytest.raises(EPMQInputError, match=f"`{name}`"):
        load(merged, experts).quantize(rows, **options)
