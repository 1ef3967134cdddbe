"""Nothing is lost quietly: what cannot be trusted stops the run by name, or is recorded."""

from __future__ import annotations

import pytest
import tiny
import torch
from judge import nearest_share
from safetensors.torch import load_file, save_file
from tiny import EMBEDDING, V_PROJ, poison

from epmq_gptq import EPMQConfig, EPMQInputError, EPMQNumericalError


@pytest.fixture
def family(tmp_path):
    merged, experts = tiny.family(tmp_path, experts=2)
    rows = {name: tiny.rows(4, 40, seed=index) for index, name in enumerate(experts)}
    return merged, experts, rows


def load(merged, experts, **options):
    config = EPMQConfig(group_size=32, experts=experts, **({"alpha": 0.1} | options))
    return tiny.load(merged, config)


def test_a_non_finite_expert_weight_stops_the_run(family):
    merged, experts, rows = family
    poison(experts["expert1"], f"{V_PROJ}.weight", (3, 5), float("inf"))
    with pytest.raises(
        EPMQNumericalError, match=r"expert `expert1`.*v_proj.*1 .*\(3, 5\)"
    ) as caught:
        load(merged, experts).quantize(rows)
    assert (caught.value.expert, caught.value.module) == ("expert1", V_PROJ)


def test_a_non_finite_merged_weight_stops_the_run_whatever_the_policy(family):
    merged, experts, rows = family
    poison(merged, f"{V_PROJ}.weight", (0, 1))
    for policy in ("raise", "rtn"):
        with pytest.raises(EPMQNumericalError, match=rf"`{V_PROJ}`: the merged weight.*\(0, 1\)"):
            load(merged, experts, on_bad_module=policy).quantize(rows)


def test_a_non_finite_activation_names_the_expert_whose_rows_made_it(family):
    merged, experts, rows = family
    only_second = next(
        token
        for row in rows["expert1"]
        for token in row["input_ids"]
        if all(token not in other["input_ids"] for other in rows["expert0"])
    )
    poison(merged, EMBEDDING, (only_second, 7))
    with pytest.raises(EPMQNumericalError, match=r"expert `expert1`: the activations") as caught:
        load(merged, experts).quantize(rows)
    assert caught.value.module == "model.layers.0.self_attn.q_proj"


def test_rtn_is_a_choice_and_is_recorded(family, tmp_path):
    merged, experts, rows = family
    poison(experts["expert1"], f"{V_PROJ}.weight", (3, 5))
    model = load(merged, experts, on_bad_module="rtn")
    report = model.quantize(rows)["epmq"]
    # q, k and v share one input; k was folded before v met the NaN, but none of the three sums is
    # complete, so none is used.
    expected = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert {m.module for m in report.exceptions} == expected
    assert {m.target for m in report.exceptions} == {"rtn"}
    assert all("expert1" in m.reason and m.excess is None for m in report.exceptions)
    model.save(str(tmp_path / "out"))
    recorded = model.quantize_config.meta["epmq"]["exceptions"]
    assert {entry["module"] for entry in recorded} == expected
    W_m = load_file(merged / "model.safetensors")[f"{V_PROJ}.weight"]
    loaded = tiny.reload(tmp_path / "out")
    W = loaded.model.get_submodule(V_PROJ).dequantize_weight().T.float()
    assert nearest_share(W, W_m, group_size=32) > 0.95


def test_alpha_zero_is_refused_without_full_rank_and_allowed_with_it(family):
    merged, experts, _ = family
    few = {name: tiny.rows(1, 20, seed=0) for name in experts}
    with pytest.raises(EPMQNumericalError, match=r"alpha = 0 .* rank \d+ of 64"):
        load(merged, experts, alpha=0.0, on_bad_module="rtn").quantize(few)
    many = {name: tiny.rows(20, 60, seed=index) for index, name in enumerate(experts)}
    free = {r"layers.0.self_attn.[qkv]_proj": 0}
    report = load(merged, experts, alpha_pattern=free, bits=8).quantize(many)["epmq"]
    for module in report.modules[:3]:
        assert module.lam == module.alpha == 0.0 and module.excess < 0.1 * module.merge_excess


def test_scales_that_overflow_half_precision_stop_the_run(family):
    merged, experts, rows = family
    for folder in (merged, *experts.values()):
        poison(folder, f"{V_PROJ}.weight", (2, 0), 1e7)
    with pytest.raises(EPMQNumericalError, match=rf"`{V_PROJ}`: scales"):
        load(merged, experts).quantize(rows)


def test_an_input_that_is_always_zero_stops_the_run(family):
    merged, experts, rows = family
    poison(merged, "model.layers.1.post_attention_layernorm.weight", slice(None), 0.0)
    with pytest.raises(EPMQNumericalError, match=r"layers.1.mlp.gate_proj.*every input is zero"):
        load(merged, experts).quantize(rows)
    report = load(merged, experts, on_bad_module="rtn").quantize(rows)["epmq"]
    assert {m.module.split(".", 3)[3] for m in report.exceptions} == {
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    }


def test_dead_input_columns_keep_the_merged_column(family, tmp_path):
    merged, experts, rows = family
    poison(merged, "model.layers.0.input_layernorm.weight", 9, 0.0)
    model = load(merged, experts, bits=8)
    model.quantize(rows)
    model.save(str(tmp_path / "out"))
    loaded = tiny.reload(tmp_path / "out")
    W_m = load_file(merged / "model.safetensors")[f"{V_PROJ}.weight"]
    W = loaded.model.get_submodule(V_PROJ).dequantize_weight().T.float()
    torch.testing.assert_close(W[:, 9], W_m[:, 9], rtol=0, atol=float(W_m.abs().max()) / 100)
    assert W[:, 9].abs().max() > 0


# ---- refused before any compute ------------------------------------------------------------------


@pytest.fixture
def untouched(family, monkeypatch):
    """A family, and a guard: no forward pass may run."""
    from gptqmodel.looper.module_looper import ModuleLooper

    def run(*arguments, **options):
        raise AssertionError("the loop was entered")

    monkeypatch.setattr(ModuleLooper, "loop", run)
    return family


def test_calibration_must_name_the_experts(untouched):
    merged, experts, rows = untouched
    model = load(merged, experts)
    with pytest.raises(EPMQInputError, match=r"same experts.*without rows: expert1\."):
        model.quantize({"expert0": rows["expert0"]})
    with pytest.raises(EPMQInputError, match=r"not an expert: other\."):
        model.quantize(rows | {"other": rows["expert0"]})
    with pytest.raises(EPMQInputError, match=r"should map every expert's name"):
        model.quantize(rows["expert0"])
    with pytest.raises(EPMQInputError, match=r"expert `expert1` is empty"):
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


def test_an_already_quantized_expert_is_refused(untouched, tmp_path):
    merged, experts, rows = untouched
    file = experts["expert1"] / "model.safetensors"
    save_file(load_file(file) | {f"{V_PROJ}.qweight": torch.zeros(2, 2)}, file)
    with pytest.raises(EPMQInputError, match=r"expert `expert1`: already quantized"):
        load(merged, experts).quantize(rows)


def test_a_group_size_that_does_not_divide_is_refused(untouched):
    merged, experts, rows = untouched
    config = EPMQConfig(group_size=128, experts=experts)
    model = tiny.load(merged, config)
    with pytest.raises(EPMQInputError, match=r"`group_size` 128 does not divide the 64 inputs"):
        model.quantize(rows)


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


def test_a_curvature_that_needs_damping_is_not_damped_behind_your_back(family):
    """Too small an anchor: the host would raise its damping, or round to nearest, in silence."""
    merged, experts, _ = family
    few = {name: tiny.rows(1, 12, seed=0) for name in experts}
    with pytest.raises(EPMQNumericalError, match=r"q_proj.*not positive definite.*Raise `alpha`"):
        load(merged, experts, alpha=1e-13).quantize(few)
    report = load(merged, experts, alpha=1e-13, on_bad_module="rtn").quantize(few)["epmq"]
    assert {m.target for m in report.modules} == {"rtn"}
    assert all("not positive definite" in m.reason for m in report.modules)
