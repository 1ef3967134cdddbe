"""α by held-out rows in whole runs: who chooses, what the rows count for, and the guard."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from gptqmodel.quantization.config import GPTQConfig
from judge import codes, dequantized, gptq64
from own_judge import Judge, anchored, excess, streams_of
from own_runs import STREAMS, Case, llama
from runs import gar_order
from safetensors.torch import load_file, save_file

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.calibration.batches import plan_inputs
from epmq_gptq.calibration.encoded import EncodedCalibration, RowCounts
from epmq_gptq.calibration.text import TokenRow, TokenRules
from epmq_gptq.host.task import EPMQ
from epmq_gptq.method import solve as solving
from epmq_gptq.method.choice import GRID, Chosen
from epmq_gptq.method.solve import PLAIN_DAMPING
from epmq_gptq.method.target import ANCHORS


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_target_is_solved_with_the_chosen_alpha_from_all_rows(case, tmp_path, anchor):
    weights, report = case.quantize(tmp_path / "out", anchor=anchor)
    streams = streams_of(weights, STREAMS)
    judge = Judge(llama, case.merged, case.experts, streams, case.batches, weights, eta=1, rho=1)
    for module in report.modules:
        X, gap, W_m = judge.moments(module.module)
        assert sum(module.tokens.values()) == len(X)
        kept = module.target == "merged"  # nothing was better: as GPTQ, with its damping
        H_E = anchored(X.T @ X, PLAIN_DAMPING if kept else module.alpha, anchor)
        best = W_m if kept else W_m + gap.T @ X @ torch.linalg.inv(H_E)
        reference = gptq64(best, H_E, bits=4, group_size=32, order=gar_order(H_E))
        ours = excess(weights[module.module], best, H_E)
        assert ours == pytest.approx(excess(reference, best, H_E), rel=0.02), module.module
        assert module.merge_excess == pytest.approx(excess(W_m, best, H_E), rel=1e-2, abs=1e-9)
    assert sum(m.target == "experts" for m in report.modules) > len(report.modules) / 2


def test_layers_of_one_input_share_a_choice_that_is_best_on_held_out_rows(case, tmp_path):
    _, report = case.quantize(tmp_path / "out")
    by_input = {}
    for module in report.modules:
        layer, _, leaf = module.module.rpartition(".")
        key = layer, {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv"}.get(leaf, leaf[0:4])
        by_input.setdefault(key, []).append(module)
        tried = {float(alpha) for alpha in module.held_out}
        assert tried < set(GRID) and 4 <= len(tried) <= 5
        best = max(module.held_out, key=module.held_out.get)
        if module.target == "experts":
            assert module.alpha == float(best)
            assert module.held_out[best] > 0 and module.held_out_gain > 0
        else:
            assert module.alpha is None and module.held_out[best] <= 0
    for members in by_input.values():
        assert len({m.alpha for m in members}) == 1
    assert report.provenance["alpha"] == "auto"


def test_a_report_with_an_alpha_that_cannot_be_solved_is_json(case, tmp_path, monkeypatch):
    def with_one(fitted, held_out, **options):
        return Chosen(0.1, {0.001: float("-inf"), 0.1: 1.0})

    monkeypatch.setattr(solving, "choose_alpha", with_one)
    _, report = case.quantize(tmp_path / "out")
    assert {tuple(m.held_out) for m in report.modules} == {("0.1",)}
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_pattern_may_leave_some_layers_a_number(case, tmp_path):
    _, report = case.quantize(tmp_path / "out", alpha_pattern={"mlp.down_proj": 3})
    for module in report.modules:
        if module.module.endswith("down_proj"):
            assert module.alpha == 3 and not module.held_out and module.held_out_gain is None
        else:
            assert module.held_out and module.alpha in (None, *GRID)


def test_every_expert_needs_a_row_to_fit_and_one_to_hold_out(case):
    rows = case.rows | {"expert1": case.rows["expert1"][:1]}
    model = tiny.load(case.merged, EPMQConfig(group_size=32, experts=case.experts))
    with pytest.raises(EPMQInputError, match="expert `expert1` has 1") as caught:
        model.quantize(rows)
    assert caught.value.code == "EPMQ-F22" and "set `alpha`" in caught.value.remedy


# ---- which rows are held out ---------------------------------------------------------------------


def calibration(lengths):
    rows = [TokenRow([1] * length) for length in lengths]
    counts = RowCounts(None, len(rows), len(rows), len(rows), tokens=sum(lengths))
    return EncodedCalibration({"a": rows}, {"a": counts})


def test_every_eighth_row_is_batched_apart():
    lengths = list(range(1, 21))
    plan = plan_inputs(calibration(lengths), TokenRules(), batch_size=3, held_out=0.125)
    found = {True: [], False: []}
    for batch, apart in zip(plan.batches, plan.held_out, strict=True):
        found[apart] += batch["attention_mask"].sum(1).tolist()
    assert found[True] == [8, 16]
    assert sorted(found[True] + found[False]) == lengths
    assert plan.tokens == {"a": sum(lengths)}


@pytest.mark.parametrize(("count", "share", "apart"), [(2, 0.125, 1), (3, 0.5, 1), (5, 0.5, 2)])
def test_few_rows_hold_out_one_and_never_more_than_half(count, share, apart):
    plan = plan_inputs(calibration([4] * count), TokenRules(), batch_size=1, held_out=share)
    assert sum(plan.held_out) == apart


def test_without_a_choice_nothing_is_held_out(case):
    plan = plan_inputs(calibration([4] * 20), TokenRules(), batch_size=3)
    assert not any(plan.held_out)


# ---- nothing better than the merge ---------------------------------------------------------------


@pytest.fixture(scope="module")
def contradiction(tmp_path_factory):
    """Two experts that want opposite things; the one has the rows, the other those held out."""
    folder = tmp_path_factory.mktemp("contradiction")
    merged, experts = tiny.family(folder, experts=2)
    states = [load_file(path / "model.safetensors") for path in experts.values()]
    mean = load_file(merged / "model.safetensors")
    states[1] = {name: (2 * mean[name] - tensor).contiguous() for name, tensor in states[0].items()}
    save_file(states[1], experts["expert1"] / "model.safetensors", {"format": "pt"})
    lengths = {"expert0": [60] * 7 + [12], "expert1": [12, 60]}
    rows = {
        name: [{"input_ids": tiny.rows(1, n, seed=7 + i)[0]["input_ids"]} for i, n in enumerate(of)]
        for name, of in lengths.items()
    }
    return merged, experts, rows


def quantize(contradiction, out, **options):
    merged, experts, rows = contradiction
    config = EPMQConfig(group_size=32, experts=experts, profile="paper", **options)
    model = tiny.load(merged, config)
    report = model.quantize(rows, batch_size=2)["epmq"]
    model.save(str(out))
    return report


def test_where_nothing_is_better_on_held_out_rows_the_merge_is_rounded(contradiction, tmp_path):
    report = quantize(contradiction, tmp_path / "out", alpha="auto")
    first = [m for m in report.modules if ".0.self_attn" in m.module and "o_proj" not in m.module]
    assert {m.target for m in first} == {"merged"} and {m.alpha for m in first} == {None}
    assert all(max(m.held_out.values()) <= 0 for m in first)
    assert (
        "held-out" in first[0].reason and "held-out" in report.provenance["exceptions"][0]["reason"]
    )
    # As GPTQ does it: the merge's weights, damped as GPTQModel damps.
    merged, _, rows = contradiction
    plain = tiny.load(merged, GPTQConfig(bits=4, group_size=32, damp_percent=PLAIN_DAMPING))
    plain.quantize([row for found in rows.values() for row in found], batch_size=2)
    plain.save(str(tmp_path / "plain"))
    ours, theirs = codes(tmp_path / "out"), codes(tmp_path / "plain")
    for module in first:
        differ = (ours[module.module] != theirs[module.module]).float().mean()
        assert differ < 0.01, module.module


@pytest.mark.parametrize("order", [{}, {"act_group_aware": False}])
def test_the_guard_takes_the_rounded_merge_where_the_rounded_target_is_worse(
    contradiction, tmp_path, monkeypatch, order
):
    """In both orders of columns: in the natural one GPTQModel rounds what it is given in place."""

    def careless(fitted, held_out, **options):
        return Chosen(0.001, {0.001: 1.0})

    compared, gain, rounded = [], EPMQ._gain, EPMQ._quantized

    def watched(self, Q, shift, guard):
        compared.append((self.full_name, guard.W_m.clone()))
        return gain(self, Q, shift, guard)

    monkeypatch.setattr(solving, "choose_alpha", careless)
    monkeypatch.setattr(EPMQ, "_gain", watched)
    # Blocks of fewer columns than the layers have.
    monkeypatch.setattr(EPMQ, "_quantized", lambda self, blocksize: rounded(self, 32))
    report = quantize(contradiction, tmp_path / "out", alpha="auto", **order)
    guarded = {m.module: m for m in report.modules if m.target == "merged"}
    first = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
    assert set(first) <= set(guarded)
    assert "rounded, its target was worse on the held-out rows" in guarded[first[0]].reason
    W_m = load_file(contradiction[0] / "model.safetensors")
    got = dequantized(tmp_path / "out")
    for name in first:
        step = W_m[f"{name}.weight"].abs().amax() * 2 / 15
        assert (got[name] - W_m[f"{name}.weight"]).abs().max() < 3 * step
    assert codes(tmp_path / "out")
    assert len(compared) > len(guarded) and all(
        torch.equal(W, W_m[f"{name}.weight"]) for name, W in compared
    )


def test_minmax_weighs_the_experts_by_what_is_kept_of_them(contradiction, tmp_path):
    merged, experts, _ = contradiction
    rows = {"expert0": tiny.rows(9, 60, seed=1), "expert1": tiny.rows(3, 20, seed=2)}
    reports = {}
    for weighting in ("raw", "minmax"):
        config = EPMQConfig(group_size=32, experts=experts, alpha=0.1, weighting=weighting)
        reports[weighting] = tiny.load(merged, config).quantize(rows, batch_size=3)["epmq"]
    for one, other in zip(*(reports[w].modules for w in ("raw", "minmax")), strict=True):
        assert not one.weights and set(other.weights) == set(experts)
        assert one.tokens == other.tokens
        assert sum(other.weights.values()) == pytest.approx(2)
    first = reports["minmax"].modules[0].weights
    assert first["expert1"] > 1 > first["expert0"]  # the quiet one
