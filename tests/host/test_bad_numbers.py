"""Bad numbers: what cannot be trusted stops the run by name, or is recorded."""

from __future__ import annotations

import pytest
import tiny
import torch
from judge import nearest_share, stored
from readers import Reads
from safetensors.torch import load_file
from tiny import EMBEDDING, V_PROJ, poison

from epmq_gptq import EPMQConfig, EPMQNumericalError
from epmq_gptq.experts.passes.trajectories import ExpertTrajectories
from epmq_gptq.method.nonfinite import Peaks, first_bad
from epmq_gptq.method.statistics import GroupStatistics

Q_PROJ = "model.layers.0.self_attn.q_proj"


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


@pytest.mark.fault(
    "F29",
    injected="alpha = 0 with 40 tokens for 64 inputs",
    outcome="error EPMQ-F29 with the rank and the tokens",
)
def test_alpha_zero_is_refused_without_full_rank_and_allowed_with_it(family):
    merged, experts, _ = family
    few = {name: tiny.rows(1, 20, seed=0) for name in experts}
    wrong = r"alpha = 0 .* rank \d+ of 64 \(from 40 tokens\)"
    with pytest.raises(EPMQNumericalError, match=wrong) as caught:
        load(merged, experts, alpha=0.0, on_bad_module="rtn").quantize(few)
    assert caught.value.code == "EPMQ-F29"
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


@pytest.mark.fault(
    "F31",
    injected="a norm of zeros before the MLP of one layer",
    outcome='error EPMQ-F31 naming the first layer without inputs; with `on_bad_module="rtn"` '
    "they are rounded to nearest and reported",
)
def test_an_input_that_is_always_zero_stops_the_run(family):
    merged, experts, rows = family
    poison(merged, "model.layers.1.post_attention_layernorm.weight", slice(None), 0.0)
    wrong = r"layers.1.mlp.gate_proj.*every input is zero"
    with pytest.raises(EPMQNumericalError, match=wrong) as caught:
        load(merged, experts).quantize(rows)
    assert caught.value.code == "EPMQ-F31"
    report = load(merged, experts, on_bad_module="rtn").quantize(rows)["epmq"]
    assert {m.module.split(".", 3)[3] for m in report.exceptions} == {
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    }


@pytest.mark.fault(
    "F31",
    injected="a norm with one zero",
    outcome="the input that is dead keeps its merged column",
)
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


@pytest.mark.fault(
    "F30",
    injected="alpha = 1e6, and alpha = 1e-13 on fewer rows than inputs",
    outcome="W* is the merged weight within fp32; error EPMQ-F30 naming the layer and `alpha` "
    "(GPTQModel would raise its damping, or round to nearest, in silence)",
)
def test_a_curvature_that_needs_damping_is_not_damped_behind_your_back(family):
    """Too small an anchor: the host would raise its damping, or round to nearest, in silence."""
    merged, experts, rows = family
    few = {name: tiny.rows(1, 12, seed=0) for name in experts}
    wrong = r"q_proj.*not positive definite.*Raise `alpha`"
    with pytest.raises(EPMQNumericalError, match=wrong) as caught:
        load(merged, experts, alpha=1e-13).quantize(few)
    assert caught.value.code == "EPMQ-F30"
    report = load(merged, experts, alpha=1e-13, on_bad_module="rtn").quantize(few)["epmq"]
    assert {m.target for m in report.modules} == {"rtn"}
    assert all("not positive definite" in m.reason for m in report.modules)
    strong = load(merged, experts, eta=0, rho=0, alpha=1e6).quantize(rows)["epmq"]
    assert all(module.merge_excess < 1e-3 for module in strong.modules)


# ---- activations: who, where and since which token ----------------------------------------------


def run(family, batch_size=1, **options):
    merged, experts, rows = family
    config = EPMQConfig(group_size=32, experts=experts, **({"alpha": 0.1} | options))
    model = tiny.load(merged, config)
    model.quantize(rows, batch_size=batch_size)
    return model


def only_in_second(rows):
    """The first token of expert1's rows that expert0 has not: id, row and position."""
    known = {token for row in rows["expert0"] for token in row["input_ids"]}
    for number, row in enumerate(rows["expert1"]):
        for position, token in enumerate(row["input_ids"]):
            if token not in known:
                return token, number, position
    raise AssertionError("no such token")


@pytest.mark.fault(
    "F27",
    injected="a NaN in the embedding of one token, which only the rows of one of two experts hold; "
    "batches of one row, and of three rows of different lengths (padded)",
    outcome="error EPMQ-F27: the layer, that expert, the channels, and the batch, row, position "
    "and id of that token",
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_bad_activation_is_named_by_its_token(family, batch_size):
    merged, experts, rows = family
    for index, row in enumerate(rows["expert1"]):
        row["input_ids"] = row["input_ids"][: 40 - 3 * index]
    token, row, position = only_in_second(rows)
    poison(merged, EMBEDDING, (token, 7))
    where = rf"token {position} \(id {token}\) of row {row % batch_size} of batch "
    where += rf"{row // batch_size} of `expert1`"
    with pytest.raises(EPMQNumericalError, match=rf"`expert1`.*`{Q_PROJ}`.*{where}") as caught:
        run(family, batch_size, eta=0, rho=0)
    assert (caught.value.code, caught.value.module) == ("EPMQ-F27", Q_PROJ)
    assert caught.value.expert == "expert1"


@pytest.mark.fault(
    "F27",
    injected="an infinity written by a hook into one token of one batch, at the input of a layer "
    "in the middle of the model",
    outcome="error EPMQ-F27 that names this layer and token",
)
def test_an_infinity_in_one_batch(family):
    merged, experts, rows = family
    config = EPMQConfig(group_size=32, experts=experts, alpha=0.1, eta=0, rho=0)
    model = tiny.load(merged, config)
    seen = []

    def plant(module, arguments):
        seen.append(1)
        if len(seen) % 8 == 6:  # of four batches each, the second of expert1
            X = arguments[0].clone()
            X[0, 11, 3] = float("-inf")
            return (X, *arguments[1:])
        return None

    hook = model.model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(plant)
    where = r"`model.layers.1.mlp.gate_proj`.*token 11 \(id \d+\) of row 0 of batch \d of `expert"
    with pytest.raises(EPMQNumericalError, match=where):
        model.quantize(rows)
    hook.remove()


@pytest.mark.fault(
    "F27",
    injected="the same NaN in an expert's own embedding: only its own pass meets it",
    outcome="error EPMQ-F27 naming the expert, the layer and the token where it begins",
)
def test_a_bad_activation_of_an_experts_own_pass(family):
    merged, experts, rows = family
    token, row, position = only_in_second(rows)
    poison(experts["expert1"], EMBEDDING, (token, 7))
    where = (
        rf"`model.layers.0`.*token {position} \(id {token}\) of row 0 of batch {row} of `expert1`"
    )
    with pytest.raises(EPMQNumericalError, match=where) as caught:
        run(family, eta=0.5, rho=0.5)
    assert (caught.value.code, caught.value.expert) == ("EPMQ-F27", "expert1")


@pytest.mark.fault(
    "F27",
    injected="activations of 1e25, which are finite and whose squares are not",
    outcome="error EPMQ-F27 that says so, with the largest of them and its token",
)
def test_squares_that_overflow_are_told_apart(family):
    merged, experts, rows = family
    token, row, position = only_in_second(rows)
    poison(merged, "model.layers.0.input_layernorm.weight", 5, 1e25)
    with pytest.raises(EPMQNumericalError, match=r"are finite, but their squares .* largest is \d"):
        run(family, eta=0, rho=0)


@pytest.mark.fault(
    "F27",
    injected="NaN, ∞ and −∞ in padding, in real tokens, in float16 and bfloat16, and among the "
    "mixed tokens of a routed module",
    outcome="padding is never blamed; the first bad token is, by row and position, or by its place "
    "among the mixed ones",
)
def test_where_a_token_is_found():
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0, 3:] = False
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for value in (float("nan"), float("inf"), float("-inf")):
            X = torch.randn(2, 5, 8).to(dtype)
            X[0, 4, 1] = value
            assert first_bad(3, X, keep) is None
            assert first_bad(3, X)[:3] == (3, 0, 4)
            X[1, 2, 7] = value
            assert first_bad(3, X, keep)[:3] == (3, 1, 2)
            assert first_bad(3, X.reshape(10, 8)[5:])[:3] == (3, None, 2)
    peaks = Peaks()
    peaks.add("e", 0, torch.tensor([[[1.0], [-7.0], [3.0]]]), None)
    peaks.add("e", 1, torch.tensor([[[2.0], [90.0]]]), torch.tensor([[True, False]]))
    assert peaks.first_bad("e") is None and peaks.first_bad("other") is None
    assert peaks.largest("e") == (0, 0, 1, 7.0)
    assert peaks.largest("other") is None


@pytest.mark.fault(
    "F27",
    injected="an infinity in z, the expert's own input of a layer, behind a finite output",
    outcome="error EPMQ-F27 that says it is in that expert's own pass, with its token",
)
def test_a_bad_own_input(family, monkeypatch):
    inputs = ExpertTrajectories.inputs

    def planted(self, linear, batch):
        Z = inputs(self, linear, batch)
        if linear == Q_PROJ and batch == 6:
            Z[0, 9, 2] = float("inf")
        return Z

    monkeypatch.setattr(ExpertTrajectories, "inputs", planted)
    where = rf"in that expert's own pass, .*`{Q_PROJ}`.*token 9 \(id \d+\) of row 0 of batch 2"
    with pytest.raises(EPMQNumericalError, match=where):
        run(family, eta=0.5, rho=0)


# ---- at the edge ---------------------------------------------------------------------------------


@pytest.mark.fault(
    "N01",
    injected="rows of weights that are all zero, 1e-45, 1e-38, 1e-9 and 3e-8: GPTQModel 7.6 "
    "divides 0 by a scale of 0, or writes a scale that is 0 in half precision",
    outcome="such groups are rounded to exact zeros with a scale that survives; every tensor on "
    "disk is finite, and the rest of the layer is as good as ever",
)
@pytest.mark.parametrize("options", [{}, {"sym": False}, {"desc_act": True, "static_groups": True}])
def test_scales_of_nothing(family, tmp_path, options):
    merged, experts, rows = family
    for folder in (merged, *experts.values()):
        for group, value in enumerate([0.0, 1e-45, 1e-38, 1e-9, 3e-8]):
            poison(folder, f"{V_PROJ}.weight", slice(4 * group, 4 * group + 4), value)
    model = run(family, eta=0, rho=0, act_group_aware=False, **options)
    model.save(str(tmp_path / "out"))
    tensors = stored(tmp_path / "out")
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
    assert bool((tensors[f"{V_PROJ}.scales"] > 0).all())
    W = tiny.reload(tmp_path / "out").model.get_submodule(V_PROJ).dequantize_weight().T.float()
    W_m = load_file(merged / "model.safetensors")[f"{V_PROJ}.weight"]
    assert not W[:20].any()
    assert (W - W_m)[20:].norm() < 0.5 * W_m[20:].norm()


@pytest.mark.fault(
    "F27",
    injected="activations of 1.5e19, whose squares float32 holds and whose sum of squares it does "
    "not",
    outcome="error EPMQ-F27",
)
def test_a_gram_that_overflows_only_as_a_sum():
    """Every square is finite, their sum is not."""
    statistics = GroupStatistics(4, {"m": 2}, Reads())
    statistics.add("e", torch.full((4000, 4), 1.5e19))
    with pytest.raises(EPMQNumericalError, match="expert `e`"):
        statistics.fold()
