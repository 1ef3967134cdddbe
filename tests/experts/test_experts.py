"""Experts are checked from headers, and their weights are read one at a time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epmq_gptq.errors import EPMQInputError, EPMQNumericalError
from epmq_gptq.experts.experts import Experts, check_finite
from epmq_gptq.experts.linears import Linear, StoredWeight


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
    for name in ("plain", "renamed"):
        delta = experts.delta(name, "layer.proj", torch.ones(2, 3))
        assert torch.equal(delta.dense, weights - 1) and delta.low_rank is None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_a_released_expert_is_mapped_no_more_and_can_be_read_again(tmp_path):
    weights = torch.arange(6.0).reshape(2, 3)
    folder = expert(tmp_path / "a", {"layer.proj.weight": weights})
    experts = Experts({"x": folder})
    experts.bind([LINEAR])

    def is_mapped():
        return f"{folder}/model.safetensors" in Path("/proc/self/maps").read_text()

    for _ in range(2):
        delta = experts.delta("x", "layer.proj", torch.ones(2, 3))
        assert is_mapped()
        experts.release("x")
        assert not is_mapped() and torch.equal(delta.dense, weights - 1)


def test_every_misfit_of_an_expert_is_listed_up_to_twenty(tmp_path):
    experts = Experts({"x": expert(tmp_path / "a", {"other": torch.ones(1)})})
    linears = [Linear(f"m{i}", (1, 1), (f"m{i}.weight",)) for i in range(23)]
    with pytest.raises(EPMQInputError, match=r"`m0.weight` is missing.*; and 3 more\.") as caught:
        experts.bind(linears)
    assert "m19" in str(caught.value) and "m20" not in str(caught.value)


def test_what_is_not_a_weight_in_use_is_refused_with_its_code(tmp_path):
    cases = {
        "EPMQ-F06": torch.ones(2, 3, dtype=torch.int32),
        "EPMQ-F03": torch.ones(3, 2),
    }
    for code, tensor in cases.items():
        folder = expert(tmp_path / code, {"layer.proj.weight": tensor})
        with pytest.raises(EPMQInputError, match=r"`layer.proj.weight` has") as caught:
            Experts({"x": folder}).bind([LINEAR])
        assert caught.value.code == code and caught.value.subject == "expert `x`"
    packed = expert(tmp_path / "q", {"layer.proj.qweight": torch.ones(1)})
    with pytest.raises(EPMQInputError, match="already quantized") as caught:
        Experts({"x": packed})
    assert caught.value.code == "EPMQ-F07"


def test_one_entry_of_a_stack_is_read_alone(tmp_path, monkeypatch):
    stack = torch.arange(4 * 8 * 3.0).reshape(4, 8, 3)
    folder = expert(tmp_path / "a", {"experts.gate_up_proj": stack})
    linear = Linear(
        "experts.2.up_proj",
        (4, 3),
        ("experts.2.up_proj.weight",),
        joined=(StoredWeight("experts.gate_up_proj", index=2, part=1),),
    )
    experts = Experts({"x": folder})
    experts.bind([linear])
    monkeypatch.setattr(experts.store("x"), "read", None)
    delta = experts.delta("x", "experts.2.up_proj", torch.zeros(4, 3))
    assert torch.equal(delta.dense, stack[2, 4:])
    assert torch.equal(experts.rows("x", "experts.2.up_proj", 1, 3), stack[2, 5:7])


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
