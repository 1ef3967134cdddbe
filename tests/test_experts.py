"""Experts are checked from headers, and their weights are read one at a time."""

import pytest
import torch
from safetensors.torch import save_file

from epmq_gptq.errors import EPMQInputError, EPMQNumericalError
from epmq_gptq.experts import Experts, check_finite
from epmq_gptq.linears import Linear


def expert(folder, tensors, config=None):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(config)
    return str(folder)


LINEAR = Linear("layer.proj", (2, 3), ("layer.proj.weight", "renamed.w1.weight"))


def test_a_weight_is_found_under_the_name_it_is_stored_by(tmp_path):
    weights = torch.arange(6.0).reshape(2, 3)
    experts = Experts(
        {
            "plain": expert(tmp_path / "a", {"layer.proj.weight": weights}),
            "renamed": expert(tmp_path / "b", {"renamed.w1.weight": weights.half()}),
        }
    )
    experts.bind([LINEAR])
    assert experts.names == ["plain", "renamed"]
    assert torch.equal(experts.read("plain", "layer.proj"), weights)
    assert experts.read("renamed", "layer.proj").dtype == torch.float16


def test_every_misfit_of_an_expert_is_listed_up_to_twenty(tmp_path):
    experts = Experts({"x": expert(tmp_path / "a", {"other": torch.ones(1)})})
    linears = [Linear(f"m{i}", (1, 1), (f"m{i}.weight",)) for i in range(23)]
    with pytest.raises(EPMQInputError, match=r"`m0.weight` is missing.*; and 3 more\.") as caught:
        experts.bind(linears)
    assert "m19" in str(caught.value) and "m20" not in str(caught.value)


def test_integer_weights_and_other_networks_are_refused(tmp_path):
    whole = expert(tmp_path / "a", {"layer.proj.weight": torch.ones(2, 3, dtype=torch.int32)})
    with pytest.raises(EPMQInputError, match=r"dtype I32, not a floating one"):
        Experts({"x": whole}).bind([LINEAR])
    other = expert(tmp_path / "b", {"w": torch.ones(1)}, config='{"hidden_size": 8}')
    with pytest.raises(EPMQInputError, match=r"expert `x`: `hidden_size` is 8, .* has 16"):
        Experts({"x": other}).check_structure({"hidden_size": 16})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_index_is_named(tmp_path, value):
    weights = torch.ones(2, 3)
    weights[1, 1] = weights[1, 2] = value
    experts = Experts({"x": expert(tmp_path / "a", {"layer.proj.weight": weights})})
    experts.bind([LINEAR])
    with pytest.raises(
        EPMQNumericalError, match=r"expert `x`: tensor `layer.proj.weight` holds 2 .* \(1, 1\)"
    ):
        experts.check("x", "layer.proj")


def test_large_finite_values_are_fine():
    check_finite(torch.full((4,), 3e38), "w")
    check_finite(torch.full((4,), 60000.0, dtype=torch.float16), "w")
